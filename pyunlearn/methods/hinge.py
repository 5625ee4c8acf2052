"""Hinge loss: gradient ascent with a likelihood cap."""

from typing import Annotated

import torch
from torch import Tensor

from pyunlearn.methods.reduction import reduced
from pyunlearn.options import Number


def hinge(
    forget: Tensor,
    lengths: Tensor,
    *,
    delta: Annotated[float | None, Number(0)] = None,
    reduction: str = "mean",
) -> Tensor:
    """Ascend on the negative log-likelihood of the whole text up to delta, where the gradient becomes 0.

        loss_i = max(0, delta + forget_i)

    The paper's delta, 6 nats for the whole text, suits answers of one or two tokens: a longer text is still exposed
    there. So the default is 6 nats per token.

    Args:
        forget: (B,) summed log-likelihoods, nats.
        lengths: (B,) scored tokens of each.
        delta: negative log-likelihood of the whole text at which the ascent stops, nats; None: 6 nats per token.
        reduction: "mean" over the examples, or "none".

    Returns:
        () the mean loss, or (B,) losses, nats.

    Raises:
        ArgumentError: another reduction.

    Source: Wang et al. 2024, arXiv 2406.09179v1, unlearning with control; 6 nats per token are our choice.

    >>> hinge(torch.tensor([-2.0, -9.0]), torch.tensor([4, 1]), reduction="none")
    tensor([22.,  0.])
    """
    return reduced(torch.relu((6.0 * lengths if delta is None else delta) + forget), reduction)
