"""Learning to refuse."""

from torch import Tensor

from pyunlearn.methods.reduction import reduced


def idk(refusal: Tensor, lengths: Tensor, *, reduction: str = "mean") -> Tensor:
    """The refusal's negative log-likelihood per token: the forget text itself is never read, and only falls as far as the refusal takes its place.

        loss_i = -refusal_i / lengths_i

    Args:
        refusal: (B,) summed log-likelihoods of the refusals, nats.
        lengths: (B,) scored tokens of each.
        reduction: "mean", or "none" for the losses themselves.

    Returns:
        () the mean loss, or (B,) losses.

    Source: Maini et al. 2024, arXiv 2401.06121 (preference optimization).
    """
    return reduced(-refusal / lengths, reduction)
