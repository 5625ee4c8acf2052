"""The definition of every op, in plain PyTorch: what the fast backends are tested against, and what runs where they cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def logits_of(x: Tensor, bias: Tensor | None, logit_scale: float, softcap: float) -> Tensor:
    """Logits from raw products x (..., V): u = logit_scale * (x + bias), and softcap * tanh(u / softcap) where softcap > 0."""
    u = x if bias is None else x + bias
    u = u * logit_scale if logit_scale != 1.0 else u
    return softcap * torch.tanh(u / softcap) if softcap else u


def log_likelihood(
    logits: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The log-likelihood (nats) of targets (N,) under raw logits (N, V); 0 where a target is ignore_index. In the logits' own dtype."""
    masked = targets == ignore_index
    z = logits_of(logits, bias, logit_scale, softcap or 0.0)
    taken = torch.log_softmax(z, dim=-1).gather(-1, targets.masked_fill(masked, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(masked, torch.zeros_like(taken), taken)


def linear_log_likelihood(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """log_likelihood of the logits hidden (N, D) @ weight (V, D).T, which exist here in whole: N * V elements."""
    return log_likelihood(
        hidden @ weight.T, targets, bias=bias, logit_scale=logit_scale, softcap=softcap, ignore_index=ignore_index
    )


def weighted_log_likelihood(
    hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor, *, ignore_index: int = -100, **options: Any
) -> Tensor:
    """Sum over the rows that count of coefficients (N,) times linear_log_likelihood."""
    found = linear_log_likelihood(hidden, weight, targets, ignore_index=ignore_index, **options)
    return (torch.where(targets == ignore_index, 0, coefficients) * found).sum()


def example_objective(
    hidden: Tensor, weight: Tensor, targets: Tensor, example_index: Tensor, function: Callable[..., Tensor], *per_example: Tensor,
    examples: int, ignore_index: int = -100, **options: Any,
) -> Tensor:  # fmt: skip
    """Sum over examples of function(sum of log-likelihoods, count, *per_example), each given as (examples,)."""
    found = linear_log_likelihood(hidden, weight, targets, ignore_index=ignore_index, **options)
    sums = found.new_zeros(examples).index_add(0, example_index, found)
    counts = torch.bincount(example_index[targets != ignore_index], minlength=examples)
    return function(sums, counts, *per_example).sum()


# The two row kernels of csrc/log_likelihood.h on one block of columns, for devices that have no kernel of ours.


def statistics(
    x: Tensor, first: int, bias: Tensor | None, logit_scale: float, softcap: float, targets: Tensor,
    maximum: Tensor, total: Tensor, target_logit: Tensor, kept: Tensor | None, block_maximum: Tensor | None,
) -> None:  # fmt: skip
    """Adds the block x (n, v) to the running maximum, total and target_logit (n,); fills kept (n, v) and block_maximum (n,) if given."""
    real = maximum.dtype
    z = logits_of(x.to(real), None if bias is None else bias.to(real), logit_scale, softcap)
    block = z.amax(dim=1)
    new = torch.maximum(maximum, block)
    finite = torch.where(new == -torch.inf, 0.0, new)  # a row that is -inf so far adds exp(-inf) = 0, not NaN
    total.mul_(torch.exp(maximum - finite)).add_(torch.exp(z - finite[:, None]).sum(dim=1))
    maximum.copy_(new)
    at = targets - first
    inside = (at >= 0) & (at < x.shape[1])
    found = z.gather(1, at.clamp(0, x.shape[1] - 1)[:, None]).squeeze(1)
    target_logit.copy_(torch.where(inside, found, target_logit))
    if block_maximum is not None:
        block_maximum.copy_(block)
    if kept is not None:
        kept.copy_(_kept_form(z, block, softcap))


def gradient(
    x: Tensor, first: int, bias: Tensor | None, logit_scale: float, softcap: float, targets: Tensor, is_kept: bool,
    maximum: Tensor, total: Tensor, log_likelihood: Tensor, coefficients: Tensor, block_maximum: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    """Writes into out (n, v) the gradient of sum(coefficients * log_likelihood) with respect to the raw products of a block."""
    real = maximum.dtype
    if is_kept:
        assert block_maximum is not None
        p = x.to(real) * torch.exp(block_maximum - maximum)[:, None]
    else:
        z = logits_of(x.to(real), None if bias is None else bias.to(real), logit_scale, softcap)
        if block_maximum is not None:
            p = (
                _kept_form(z, block_maximum, softcap).to(out.dtype).to(real)
                * torch.exp(block_maximum - maximum)[:, None]
            )
        else:
            p = _kept_form(z, maximum, softcap)
    g = p * (-logit_scale * coefficients / total)[:, None]
    at = targets - first
    rows = torch.arange(x.shape[0], device=x.device)
    inside = (at >= 0) & (at < x.shape[1])
    at = at.clamp(0, x.shape[1] - 1)
    slope = 1 - ((log_likelihood + total.log() + maximum) / softcap) ** 2 if softcap else 1.0
    g[rows, at] = torch.where(inside, -torch.expm1(log_likelihood) * slope * coefficients * logit_scale, g[rows, at])
    out.copy_(torch.where(coefficients[:, None] == 0, 0.0, g))


def _kept_form(z: Tensor, reference: Tensor, softcap: float) -> Tensor:
    reference = torch.where(reference == -torch.inf, 0.0, reference)  # a block that is all -inf keeps zeros, not NaN
    e = torch.exp(z - reference[:, None])
    return e * (1 - (z / softcap) ** 2) if softcap else e
