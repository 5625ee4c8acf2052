"""Negative preference optimization."""

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from pyunlearn.methods.reduction import reduced
from pyunlearn.options import Number


def npo(
    forget: Tensor, reference: Tensor, *, beta: Annotated[float, Number(above=0)] = 0.1, reduction: str = "mean"
) -> Tensor:
    """Gradient ascent that lets go of an example as it becomes less likely than under the reference model.

        loss_i = -2/beta log sigmoid(-beta (forget_i - reference_i))

    Args:
        forget, reference: (B,) summed log-likelihoods under the model and under the reference, nats.
        beta: how soon it lets go, per nat; beta -> 0 is gradient ascent on the sum.
        reduction: "mean", or "none" for the losses themselves.

    Returns:
        () the mean loss, or (B,) losses.

    Source: Zhang et al. 2024, arXiv 2404.05868, eq. 3.
    """
    return reduced(-(2 / beta) * F.logsigmoid(-beta * (forget - reference)), reduction)
