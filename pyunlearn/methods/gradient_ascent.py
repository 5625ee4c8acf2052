"""Gradient ascent on the forget set's negative log-likelihood."""

from torch import Tensor

from pyunlearn.methods.reduction import reduced


def ga(forget: Tensor, lengths: Tensor, *, reduction: str = "mean") -> Tensor:
    """The log-likelihood per token: minimised, it makes the text improbable. Unbounded: it needs a stop.

        loss_i = forget_i / lengths_i

    Args:
        forget: (B,) summed log-likelihoods of the forget examples, nats.
        lengths: (B,) scored tokens of each.
        reduction: "mean", or "none" for the losses themselves.

    Returns:
        () the mean loss, or (B,) losses.

    Source: the classical method of arXiv 2411.04388; Jang et al. 2022, arXiv 2210.01504, eq. 1.
    """
    return reduced(forget / lengths, reduction)
