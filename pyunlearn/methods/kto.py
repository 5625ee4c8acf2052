"""Kahneman-Tversky optimization on undesirable texts alone."""

from typing import Annotated

import torch
from torch import Tensor

from pyunlearn.methods.reduction import reduced
from pyunlearn.options import Number


def kto(
    forget: Tensor,
    reference: Tensor,
    *,
    beta: Annotated[float, Number(above=0)] = 0.1,
    divergence: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Lower the likelihood of the forget text relative to the reference model, with a loss that saturates at both ends.

        loss_i = 1/beta (1 - sigmoid(beta (divergence - (forget_i - reference_i))))

    The gradient is small where the text is far less or far more likely than under the reference model.

    Args:
        forget: (B,) summed log-likelihoods under the model, nats.
        reference: (B,) the same under the reference model.
        beta: slope, per nat; the larger, the sooner the loss saturates.
        divergence: z0 of the paper, nats. The paper estimates it from the batch; a constant keeps examples independent.
        reduction: "mean" over the examples, or "none".

    Returns:
        () the mean loss, or (B,) losses, nats.

    Raises:
        ArgumentError: another reduction.

    Source: Ethayarajh et al. 2024, arXiv 2402.01306, the loss of undesirable texts, times 1/beta.

    >>> kto(torch.tensor([-3.0, -30.0]), torch.tensor([-3.0, -3.0]), reduction="none")
    tensor([5.0000, 0.6297])
    """
    return reduced(torch.sigmoid(beta * (forget - reference - divergence)) / beta, reduction)
