"""CE-U: cross entropy unlearning."""

import math

import torch
from torch import Tensor

from pyunlearn.errors import ArgumentError
from pyunlearn.methods.reduction import reduced, token_means
from pyunlearn.models.distributions import Distributions


def ceu(
    model: Distributions, targets: Tensor, example: Tensor, counts: Tensor, *, skip: int = 1, reduction: str = "mean"
) -> Tensor:
    """Cross entropy with the model's own distribution from which the forget token has been struck out.

        loss_i = mean over its tokens after the first `skip` of -sum over v of q[v] log p[v]
        q = p without the token, scaled to sum to 1; a constant

    Its gradient in the logits is p - q: it grows with p[token], at most 2 in sum of magnitudes, where gradient ascent's is 1 - p[token] and
    vanishes on what is known by heart. It is taken from q itself and not as p / (1 - p) times that of log p, which has no digit left
    where 1 - p is below float32's rounding.

    Args:
        model: the model's distributions at N scored rows.
        targets: (N,) the forget tokens.
        example: (N,) whose each is, in [0, B), ascending.
        counts: (B,) tokens of each example.
        skip: so many of each text's first tokens do not count; of a shorter text all but the last.
        reduction: "mean" over the examples, or "none".

    Returns:
        () the mean loss, or (B,) losses, nats a token.

    Raises:
        ArgumentError: for a skip that is no whole number, 0 or more.

    Source: Yang 2025, arXiv 2503.01224; that the first token is left out is in the author's code.
    """
    if not isinstance(skip, int) or skip < 0:
        raise ArgumentError(f"skip must be a whole number of tokens, 0 or more, got {skip!r}")
    losses = model.kl_from(model.detached(), targets, math.inf) + model.entropy(targets, math.inf)
    left_out = torch.minimum(torch.full_like(counts, skip), counts - 1)
    place = torch.arange(len(example), device=example.device) - (counts.cumsum(0) - counts)[example]
    counted = torch.where(place >= left_out[example], losses, 0)
    return reduced(token_means(counted, example, counts - left_out), reduction)
