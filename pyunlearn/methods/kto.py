"""Kahneman-Tversky optimization, with nothing but undesirable texts."""

from typing import Annotated

import torch
from torch import Tensor

from pyunlearn.methods.reduction import reduced
from pyunlearn.options import Number


def kto(forget: Tensor, reference: Tensor, *, beta: Annotated[float, Number(above=0)] = 0.1, divergence: float = 0.0, reduction: str = "mean") -> Tensor:  # fmt: skip
    """Lets go of an example that is far below its reference, and hardly pulls at one that is far above.

        loss_i = 1/beta (1 - sigmoid(beta (divergence - (forget_i - reference_i))))

    Args:
        forget, reference: (B,) summed log-likelihoods under the model and under the reference, nats.
        beta: how soon it lets go, per nat.
        divergence: z0 of the paper, which estimates it from the batch; a constant here, so that each example stays by itself.
        reduction: "mean", or "none" for the losses themselves.

    Returns:
        () the mean loss, or (B,) losses.

    Source: Ethayarajh et al. 2024, arXiv 2402.01306, its loss of undesirable texts, times 1/beta.
    """
    return reduced(torch.sigmoid(beta * (forget - reference - divergence)) / beta, reduction)
