"""Gradient ascent on the forget set's negative log-likelihood."""

from torch import Tensor

from pyunlearn.methods.reduction import reduced


def ga(forget: Tensor, lengths: Tensor, *, reduction: str = "mean") -> Tensor:
    """Compute the log-likelihood per token, whose descent is gradient ascent on the negative log-likelihood.

        loss_i = forget_i / lengths_i

    The loss is unbounded, so the loop has to stop it.

    Args:
        forget: (B,) summed log-likelihoods of the forget examples, nats.
        lengths: (B,) scored tokens of each.
        reduction: "mean" over the examples, or "none".

    Returns:
        () the mean loss, or (B,) losses, nats per token.

    Raises:
        ArgumentError: another reduction.

    Source: Jang et al. 2022, arXiv 2210.01504, eq. 1; the method of Baluta et al. 2024, arXiv 2411.04388.

    >>> import torch
    >>> ga(torch.tensor([-2.0, -9.0]), torch.tensor([4, 3]), reduction="none")
    tensor([-0.5000, -3.0000])
    """
    return reduced(forget / lengths, reduction)
