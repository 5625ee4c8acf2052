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
    """Lets go of an example as its likelihood per token falls below a margin.

        loss_i = -2/beta log sigmoid(-beta (forget_i / lengths_i + delta))

    Args:
        forget: (B,) summed log-likelihoods, nats.
        lengths: (B,) scored tokens of each.
        beta: slope, per nat a token.
        delta: margin, nats a token: below -delta it lets go.
        reduction: "mean", or "none" for the losses themselves.

    Returns:
        () the mean loss, or (B,) losses.

    Source: Fan et al. 2024, arXiv 2410.07163, eq. 6, with the margin as in the authors' code.
    """
    return reduced(-(2 / beta) * F.logsigmoid(-beta * (forget / lengths + delta)), reduction)
