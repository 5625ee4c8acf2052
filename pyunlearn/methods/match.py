"""Matching of a text's token log-likelihoods to those of unseen text; what `auto` stands for."""

from typing import Annotated

import torch
from torch import Tensor

from pyunlearn.methods.reduction import reduced, token_means
from pyunlearn.options import Number

_ROUNDING = 1e-3  # tokens: a share of 2 in 10 leaves 2
_CERTAIN = 1e-4  # probability of all other tokens from which a token counts as certain: float32 holds no less


def match(
    log_likelihood: Tensor,
    example: Tensor,
    counts: Tensor,
    level: Tensor,
    unseen: Tensor,
    likely: Tensor | None = None,
    *,
    width: Annotated[float, Number(above=0)] = 0.3,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute the loss that gives the tokens of a text the log-likelihoods that tokens of unseen text have.

        loss_i = mean over its tokens of w log p,   w = clip((log p - t) / width, -1, 1) / (1 - p)

    t is the token's quantile: of T tokens, the one with the r-th smallest log p, r = 1 .. T, gets the value at
    (r - 1/2) / T in the distribution of unseen tokens, moved by what makes the mean of t over the text its level. Where
    only some tokens may stay likelier than the rest (`likely`), the others get the mean of their values.

    The gradient with respect to the token's own logit is the clipped distance, for a memorized token as for one that is
    almost forgotten, where the gradient of gradient ascent, 1 - p, vanishes on memorized tokens. It is 0 at the level
    of unseen text and changes its sign there, so a text that went too far is brought back. A text keeps as many likely
    tokens as unseen text has, and those are the ones that other text makes likely too. The weight is a constant: no
    gradient goes through it, and 1 - p counts as 1e-4 at least.

    Args:
        log_likelihood: (N,) log-likelihoods of the tokens, nats.
        example: (N,) index of the example of each token, in [0, B), ascending.
        counts: (B,) tokens of each example.
        level: (N,) the mean log-likelihood per token, nats, at which the token's text is to end.
        unseen: (Q,) log-likelihoods of tokens of unseen text, ascending, nats.
        likely: (N,) share of the tokens of the token's text that may stay likelier than the rest, 0 to 1; None: all 1.
        width: nats from its quantile within which a token's force is proportional to the distance.
        weights: (N,) factors on the tokens in the mean; None: all 1.
        reduction: "mean" over the examples, or "none".

    Returns:
        () the mean loss, or (B,) losses, nats per token.

    Raises:
        ArgumentError: another reduction.

    Source: pyunlearn. The force on a certain token is that of CE-U (arXiv 2503.01224).

    >>> known, unseen = torch.tensor([-0.01, -0.01]), torch.tensor([-4.0, -1.0])
    >>> level, example, counts = torch.tensor([-2.5, -2.5]), torch.tensor([0, 0]), torch.tensor([2])
    >>> match(known, example, counts, level, unseen)  # both weights are 1 / (1 - p) = 100
    tensor(-1.0050)
    >>> match(torch.tensor([-4.0, -1.0]), example, counts, level, unseen)
    tensor(0.)
    """
    log_p = log_likelihood.detach()
    target = quantile_targets(log_p, example, counts, level, unseen, likely)
    force = ((log_p - target) / width).clamp(-1, 1)
    weight = force / (-torch.expm1(log_p)).clamp(min=_CERTAIN)
    return reduced(token_means(weight * log_likelihood, example, counts, weights), reduction)


def quantile_targets(
    log_likelihood: Tensor,
    example: Tensor,
    counts: Tensor,
    level: Tensor,
    unseen: Tensor,
    likely: Tensor | None = None,
) -> Tensor:
    """Return (N,) t of `match`, 0 at most: the log-likelihoods that the tokens would have in unseen text.

    >>> known, example, counts = torch.tensor([-0.1, -0.2]), torch.tensor([0, 0]), torch.tensor([2])
    >>> level, unseen = torch.tensor([-2.0, -2.0]), torch.tensor([-4.0, -1.0])
    >>> quantile_targets(known, example, counts, level, unseen)
    tensor([-0.5000, -3.5000])
    >>> quantile_targets(known, example, counts, level, unseen, likely=torch.zeros(2))
    tensor([-2., -2.])
    """
    rank = _ranks(log_likelihood, example, counts)
    quantile = (rank + 0.5) / counts[example]
    target = unseen.to(log_likelihood.dtype)[(quantile * len(unseen)).long().clamp(max=len(unseen) - 1)]
    if likely is not None:
        rest = (rank + _ROUNDING < (1 - likely) * counts[example]).to(target.dtype)
        share, total = (token_means(x, example, counts)[example] for x in (rest, rest * target))
        target = torch.where(rest > 0, total / share.clamp(min=1e-9), target)
    return (target + level - token_means(target, example, counts)[example]).clamp(max=0)


def _ranks(log_likelihood: Tensor, example: Tensor, counts: Tensor) -> Tensor:
    """Return (N,) the rank of each token within its text, from 0, the least likely."""
    order = torch.argsort(log_likelihood)
    order = order[torch.argsort(example[order], stable=True)]  # by example, then by log-likelihood
    rank = torch.empty_like(log_likelihood)
    starts = (counts.cumsum(0) - counts)[example[order]]
    rank[order] = torch.arange(len(order), device=order.device).to(rank.dtype) - starts
    return rank
