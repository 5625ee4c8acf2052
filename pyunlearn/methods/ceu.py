"""CE-U: cross entropy unlearning."""

import math
from typing import Annotated

import torch
from torch import Tensor

from pyunlearn.errors import ArgumentError
from pyunlearn.methods.reduction import reduced, token_means
from pyunlearn.models.distributions import Distributions
from pyunlearn.options import Whole


def ceu(
    model: Distributions,
    targets: Tensor,
    example: Tensor,
    counts: Tensor,
    *,
    skip: Annotated[int, Whole(0)] = 1,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute the cross entropy with the model's own distribution without the forget token.

        loss_i = mean over its tokens after the first `skip` of -sum over v of q[v] log p[v]
        q = p without the token, scaled to sum to 1; a constant

    The gradient with respect to the logits is p - q. It grows with p[token] and its magnitudes sum to 2 at most, while
    the gradient of gradient ascent, 1 - p[token], vanishes on memorized tokens. It is computed from q itself and not as
    p / (1 - p) times the gradient of log p, which has no correct digit where 1 - p is below float32's rounding.

    Args:
        model: the model's distributions at N scored rows.
        targets: (N,) the forget tokens.
        example: (N,) index of the example of each row, in [0, B), ascending.
        counts: (B,) tokens of each example.
        skip: number of first tokens of each text that are not counted; the last token always counts. With 1 the
            first token is unlearned as a side effect only.
        weights: (N,) factors on the tokens in the mean; None: all 1.
        reduction: "mean" over the examples, or "none".

    Returns:
        () the mean loss, or (B,) losses, nats per token.

    Raises:
        ArgumentError: a skip that is not a whole number, 0 or more; another reduction.

    Source: Yang 2025, arXiv 2503.01224; the author's code leaves the first token out.

    >>> logits, target = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0])
    >>> ceu(Distributions(logits, None), target, torch.tensor([0]), torch.tensor([1]))
    tensor(2.2395)
    """
    if not Whole(0).accepts(skip):
        raise ArgumentError(f"skip must be a whole number of tokens, 0 or more, got {skip!r}")
    losses = model.kl_from(model.detached(), targets, math.inf) + model.entropy(targets, math.inf)  # (N,)
    skipped = torch.minimum(torch.full_like(counts, skip), counts - 1)  # (B,)
    position = torch.arange(len(example), device=example.device) - (counts.cumsum(0) - counts)[example]  # (N,)
    counted = torch.where(position >= skipped[example], losses, 0)
    return reduced(token_means(counted, example, counts - skipped, weights), reduction)
