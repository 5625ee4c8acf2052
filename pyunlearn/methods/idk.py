"""Refusal training: the model learns to answer "I don't know"."""

from torch import Tensor

from pyunlearn.methods.reduction import reduced


def idk(refusal: Tensor, lengths: Tensor, *, reduction: str = "mean") -> Tensor:
    """Compute the refusal's negative log-likelihood per token.

        loss_i = -refusal_i / lengths_i

    The forget text itself is not in the loss; it becomes less likely only as far as the refusal replaces it.

    Args:
        refusal: (B,) summed log-likelihoods of the refusals, nats.
        lengths: (B,) scored tokens of each.
        reduction: "mean" over the examples, or "none".

    Returns:
        () the mean loss, or (B,) losses, nats per token.

    Raises:
        ArgumentError: another reduction.

    Source: Maini et al. 2024, arXiv 2401.06121.

    >>> import torch
    >>> idk(torch.tensor([-12.0]), torch.tensor([4]))
    tensor(3.)
    """
    return reduced(-refusal / lengths, reduction)
