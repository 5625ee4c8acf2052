"""FLAT: a divergence between refusal and forget text, from forget data alone."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pyunlearn.errors import ArgumentError
from pyunlearn.methods.reduction import reduced


def flat(
    winner_probability: Tensor, loser_probability: Tensor, *, divergence: str = "kl", reduction: str = "mean"
) -> Tensor:
    """Raises the mean probability of the refusal's tokens, w, and lowers that of the forget text's, f.

        kl       -w + exp(f - 1)
        tv       -tanh(w) / 2 + tanh(f) / 2
        pearson  -w + f^2 / 4 + f
        js       log(1 + exp(-w)) + f + log(1 + exp(-f)) - 2 log 2

    Args:
        winner_probability, loser_probability: (B,) mean probabilities of the tokens of refusal and forget text: of real tokens, not of padding.
        divergence: "kl", "tv", "pearson" or "js".
        reduction: "mean", or "none" for the losses themselves.

    Returns:
        () the mean loss, or (B,) losses.

    Raises:
        ArgumentError: for another divergence.

    Source: Wang et al. 2024, arXiv 2410.11143.
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
