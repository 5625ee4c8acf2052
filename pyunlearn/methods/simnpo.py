"""SimNPO: negative preference optimization without a reference model."""

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from pyunlearn.methods.reduction import reduced
from pyunlearn.options import Number


def simnpo(
    forget: Tensor,
    lengths: Tensor,
    *,
    beta: Annotated[float, Number(above=0)] = 2.5,
    delta: Annotated[float, Number()] = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Compute NPO with the length-normalized likelihood and a margin in place of a reference model.

        loss_i = -2/beta log sigmoid(-beta (forget_i / lengths_i + delta))

    Args:
        forget: (B,) summed log-likelihoods, nats.
        lengths: (B,) scored tokens of each.
        beta: slope, per nat per token; the larger, the sooner the gradient vanishes.
        delta: margin, nats per token: the gradient vanishes where the likelihood per token is below -delta.
        reduction: "mean" over the examples, or "none".

    Returns:
        () the mean loss, or (B,) losses, nats per token.

    Raises:
        ArgumentError: another reduction.

    Source: Fan et al. 2024, arXiv 2410.07163, eq. 6, with the margin as in the authors' code.

    >>> import torch
    >>> simnpo(torch.tensor([-0.4, -4.0]), torch.tensor([4, 4]), reduction="none")
    tensor([0.4608, 0.0631])
    """
    return reduced(-(2 / beta) * F.logsigmoid(-beta * (forget / lengths + delta)), reduction)
