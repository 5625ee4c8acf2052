"""Gradient ascent that ends at a given likelihood."""

import torch
from torch import Tensor

from pyunlearn.methods._reduction import reduced


def hinge(forget: Tensor, *, delta: float = 6.0, reduction: str = "mean") -> Tensor:
    """Ascends on the whole text until its negative log-likelihood is delta.

        loss_i = max(0, delta + forget_i)

    The paper's delta suits short answers. A longer text of T tokens is still exposed there: give about 3 T to 4 T.

    Args:
        forget: (B,) summed log-likelihoods, nats.
        delta: negative log-likelihood of the whole text at which it lets go, nats.
        reduction: "mean", or "none" for the losses themselves.

    Returns:
        () the mean loss, or (B,) losses.

    Source: Wang et al. 2024, arXiv 2406.09179v1, unlearning with control.
    """
    return reduced(torch.relu(delta + forget), reduction)
