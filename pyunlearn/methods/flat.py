"""FLAT: an f-divergence between refusal and forget text, computed from forget data alone."""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from pyunlearn.errors import ArgumentError
from pyunlearn.methods.reduction import reduced
from pyunlearn.options import Choice


def flat(
    winner_probability: Tensor,
    loser_probability: Tensor,
    *,
    divergence: Annotated[str, Choice(("kl", "tv", "pearson", "js"))] = "kl",
    reduction: str = "mean",
) -> Tensor:
    """Raise the mean token probability of the refusal, w, and lower that of the forget text, f.

        kl       -w + exp(f - 1)
        tv       -tanh(w) / 2 + tanh(f) / 2
        pearson  -w + f^2 / 4 + f
        js       log(1 + exp(-w)) + f + log(1 + exp(-f)) - 2 log 2

    Each is the negative variational lower bound of an f-divergence between the two.

    Args:
        winner_probability: (B,) w, mean over the refusal's scored tokens, 0 to 1; padding is not counted.
        loser_probability: (B,) f, the same of the forget text.
        divergence: "kl", "tv", "pearson" or "js".
        reduction: "mean" over the examples, or "none".

    Returns:
        () the mean loss, or (B,) losses.

    Raises:
        ArgumentError: another divergence or reduction.

    Source: Wang et al. 2024, arXiv 2410.11143.

    >>> flat(torch.tensor([0.2]), torch.tensor([0.9]))
    tensor(0.7048)
    >>> flat(torch.tensor([0.2]), torch.tensor([0.9]), divergence="pearson")
    tensor(0.9025)
    """
    winner, loser = winner_probability, loser_probability
    if divergence == "kl":
        losses = -winner + (loser - 1).exp()
    elif divergence == "tv":
        losses = (torch.tanh(loser) - torch.tanh(winner)) / 2
    elif divergence == "pearson":
        losses = -winner + loser.square() / 4 + loser
    elif divergence == "js":
        losses = F.softplus(-winner) + loser + F.softplus(-loser) - 2 * math.log(2)
    else:
        raise ArgumentError(f'divergence must be "kl", "tv", "pearson" or "js", got {divergence!r}')
    return reduced(losses, reduction)
