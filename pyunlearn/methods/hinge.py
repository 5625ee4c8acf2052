"""Gradient ascent that ends at a given likelihood: likelihood capping."""

from typing import Annotated

import torch
from torch import Tensor

from pyunlearn.methods.reduction import reduced
from pyunlearn.options import Number


def hinge(
    forget: Tensor, lengths: Tensor, *, delta: Annotated[float | None, Number(0)] = None, reduction: str = "mean"
) -> Tensor:
    """Ascends on the whole text until its negative log-likelihood is delta, and then has no gradient.

        loss_i = max(0, delta + forget_i)

    The paper's delta, 6 nats for the whole text, suits answers of one or two tokens: a longer text is still exposed there. So the default counts by
    the token.

    Args:
        forget: (B,) summed log-likelihoods, nats.
        lengths: (B,) scored tokens of each.
        delta: negative log-likelihood of the whole text at which it lets go, nats; None: 6 nats a token.
        reduction: "mean", or "none" for the losses themselves.

    Returns:
        () the mean loss, or (B,) losses.

    Source: Wang et al. 2024, arXiv 2406.09179v1, unlearning with control; 6 nats a token are ours.
    """
    return reduced(torch.relu((6.0 * lengths if delta is None else delta) + forget), reduction)
