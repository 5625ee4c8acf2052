"""Negative preference optimization."""

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from pyunlearn.methods.reduction import reduced
from pyunlearn.options import Number


def npo(
    forget: Tensor,
    reference: Tensor,
    *,
    beta: Annotated[float, Number(above=0)] = 0.1,
    reduction: str = "mean",
) -> Tensor:
    """Compute the NPO loss: its gradient vanishes as a text becomes less likely than under the reference model.

        loss_i = -2/beta log sigmoid(-beta (forget_i - reference_i))

    Args:
        forget: (B,) summed log-likelihoods under the model, nats.
        reference: (B,) the same under the reference model.
        beta: slope, per nat; the larger, the sooner the gradient vanishes. beta -> 0 is gradient ascent on the sum.
        reduction: "mean" over the examples, or "none".

    Returns:
        () the mean loss, or (B,) losses, nats.

    Raises:
        ArgumentError: another reduction.

    Source: Zhang et al. 2024, arXiv 2404.05868, eq. 3.

    >>> import torch
    >>> npo(torch.tensor([-3.0, -30.0]), torch.tensor([-3.0, -3.0]), reduction="none")
    tensor([13.8629,  1.3009])
    """
    return reduced(-(2 / beta) * F.logsigmoid(-beta * (forget - reference)), reduction)
