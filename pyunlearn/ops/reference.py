"""Definitions of every op in plain PyTorch: the oracle of the tests, and the fallback where no compiled kernel runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyunlearn.ops._portable import float64_device, to_float64


def logits_of(x: Tensor, bias: Tensor | None, logit_scale: float, softcap: float) -> Tensor:
    """Compute logits u = logit_scale * (x + bias) from raw products x (..., V), or softcap * tanh(u / softcap)."""
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
    """Compute the log-likelihood (nats) of targets (N,) from logits (N, V), in their dtype; 0 where ignored."""
    masked = targets == ignore_index
    z = logits_of(logits, bias, logit_scale, softcap or 0.0)
    values = torch.log_softmax(z, dim=-1).gather(-1, targets.masked_fill(masked, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(masked, torch.zeros_like(values), values)


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
    """Compute log_likelihood of the logits hidden (N, D) @ weight (V, D).T, materialized here: N * V elements."""
    return log_likelihood(
        hidden @ weight.T, targets, bias=bias, logit_scale=logit_scale, softcap=softcap, ignore_index=ignore_index
    )


def weighted_log_likelihood(
    hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor, *, ignore_index: int = -100, **options: Any
) -> Tensor:
    """Compute the sum over rows that are not ignored of coefficients (N,) times linear_log_likelihood."""
    values = linear_log_likelihood(hidden, weight, targets, ignore_index=ignore_index, **options)
    return (torch.where(targets == ignore_index, 0, coefficients) * values).sum()


def token_statistics_of(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute log-likelihood, rank, entropy, variance of valid targets (...) from logits (..., V), in their dtype."""
    log_p, at = torch.log_softmax(logits, dim=-1), targets.unsqueeze(-1)
    rank = (logits > logits.gather(-1, at)).sum(dim=-1)
    p, finite = log_p.exp(), torch.where(log_p == -torch.inf, 0.0, log_p)  # 0 times -inf would be NaN
    entropy = -(p * finite).sum(dim=-1)
    variance = (p * (finite + entropy.unsqueeze(-1)) ** 2).sum(dim=-1)
    return log_p.gather(-1, at).squeeze(-1), rank, entropy, variance


def kl_divergence_of(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """Compute KL(softmax(reference_logits) || softmax(logits)) of each row of (..., V), with 0 log 0 = 0."""
    log_p, log_q = torch.log_softmax(logits, dim=-1), torch.log_softmax(reference_logits, dim=-1)
    return torch.where(log_q == -torch.inf, 0.0, log_q.exp() * (log_q - log_p)).sum(dim=-1)


def logit_margin_of(logits: Tensor) -> Tensor:
    """Compute the largest minus the mean logit of each row of (..., V)."""
    return logits.amax(dim=-1) - logits.mean(dim=-1)


def example_objective(
    hidden: Tensor, weight: Tensor, targets: Tensor, example_index: Tensor, function: Callable[..., Tensor],
    *per_example: Tensor, examples: int, ignore_index: int = -100, **options: Any,
) -> Tensor:  # fmt: skip
    """Compute the sum over examples of function(sums of log-likelihoods, counts, *per_example), (examples,) each."""
    values = linear_log_likelihood(hidden, weight, targets, ignore_index=ignore_index, **options)
    sums = values.new_zeros(examples).index_add(0, example_index, values)
    counts = torch.bincount(example_index[targets != ignore_index], minlength=examples)
    return function(sums, counts, *per_example).sum()


def token_objective(
    hidden: Tensor, weight: Tensor, targets: Tensor, example_index: Tensor, function: Callable[..., Tensor],
    *per_token: Tensor, examples: int, group_size: int = 1, ignore_index: int = -100, **options: Any,
) -> Tensor:  # fmt: skip
    """Compute the sum over groups of function(tokens' log-likelihoods, example, counts, *per_token), group by group."""
    values = linear_log_likelihood(hidden, weight, targets, ignore_index=ignore_index, **options)
    total = values.new_zeros(())
    for first in range(0, examples, group_size):
        members = (example_index >= first) & (example_index < first + group_size) & (targets != ignore_index)
        rows = members.nonzero().squeeze(1)
        rows = rows[example_index[rows].argsort(stable=True)]
        example = example_index[rows] - first
        counts = torch.bincount(example, minlength=group_size)
        total = total + function(values[rows], example, counts, *(x[rows] for x in per_token)).sum()
    return total


# The row kernels of csrc/*.h on one block of columns, for devices without a compiled kernel.


def statistics(
    x: Tensor, first: int, bias: Tensor | None, logit_scale: float, softcap: float, targets: Tensor,
    maximum: Tensor, total: Tensor, target_logit: Tensor, cached: Tensor | None, block_maximum: Tensor | None,
) -> None:  # fmt: skip
    """Add the block x (n, v) to the running maximum, total and target_logit (n,).

    Fills cached (n, v) and block_maximum (n,) unless None.
    """
    real = maximum.dtype
    z = logits_of(x.to(real), None if bias is None else bias.to(real), logit_scale, softcap)
    block = z.amax(dim=1)
    new = torch.maximum(maximum, block)
    finite = torch.where(new == -torch.inf, 0.0, new)  # a row that is -inf so far adds exp(-inf) = 0, not NaN
    total.mul_(torch.exp(maximum - finite)).add_(torch.exp(z - finite[:, None]).sum(dim=1))
    maximum.copy_(new)
    at = targets - first
    inside = (at >= 0) & (at < x.shape[1])
    z_target = z.gather(1, at.clamp(0, x.shape[1] - 1)[:, None]).squeeze(1)
    target_logit.copy_(torch.where(inside, z_target, target_logit))
    if block_maximum is not None:
        block_maximum.copy_(block)
    if cached is not None:
        cached.copy_(_cached_form(z, block, softcap))


def gradient(
    x: Tensor, first: int, bias: Tensor | None, logit_scale: float, softcap: float, targets: Tensor, is_cached: bool,
    maximum: Tensor, total: Tensor, log_likelihood: Tensor, coefficients: Tensor, block_maximum: Tensor | None,
    out: Tensor,
) -> None:  # fmt: skip
    """Write into out (n, v) the gradient of sum(coefficients * log_likelihood) at the raw products of a block."""
    real = maximum.dtype
    if is_cached:
        assert block_maximum is not None
        p = x.to(real) * torch.exp(block_maximum - maximum)[:, None]
    else:
        z = logits_of(x.to(real), None if bias is None else bias.to(real), logit_scale, softcap)
        if block_maximum is not None:
            # as if it had been cached; without a name of its own, so that it is freed before p is used
            p = _cached_form(z, block_maximum, softcap).to(out.dtype).to(real)
            p = p * torch.exp(block_maximum - maximum)[:, None]
        else:
            p = _cached_form(z, maximum, softcap)
    g = p * (-logit_scale * coefficients / total)[:, None]
    at = targets - first
    rows = torch.arange(x.shape[0], device=x.device)
    inside = (at >= 0) & (at < x.shape[1])
    at = at.clamp(0, x.shape[1] - 1)
    slope = 1 - ((log_likelihood + total.log() + maximum) / softcap) ** 2 if softcap else 1.0
    g[rows, at] = torch.where(inside, -torch.expm1(log_likelihood) * slope * coefficients * logit_scale, g[rows, at])
    out.copy_(torch.where(coefficients[:, None] == 0, 0.0, g))


def target_products(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute (2, n) float64: sum_k h[r, k] weight[target_r, k], and the sum of the summands' magnitudes.

    On the CPU where the device of h has no float64. The products are computed 2 MiB at a time.
    """
    sums = torch.empty((2, len(h)), dtype=torch.float64, device=float64_device(h.device))
    at, step = targets.clamp(0, len(weight) - 1), max(1, (1 << 18) // max(1, h.shape[1]))
    for r in range(0, len(h), step):
        rows = slice(r, r + step)
        products = to_float64(h[rows]) * weight[at[rows]].to(sums.device)  # the wider of the two
        torch.sum(products, dim=1, out=sums[0, rows])
        torch.sum(products.abs_(), dim=1, out=sums[1, rows])
    return sums


def token_statistics(
    x: Tensor, first: int, bias: Tensor | None, logit_scale: float, softcap: float, targets: Tensor, threshold: Tensor,
    maximum: Tensor, total: Tensor, moments: Tensor, target_logit: Tensor, rank: Tensor,
) -> None:  # fmt: skip
    """Add the block x (n, v) to the running maximum, total, moments (2, n), target_logit and rank of its rows."""
    z = logits_of(x.to(maximum.dtype), None if bias is None else bias.to(maximum.dtype), logit_scale, softcap)
    inside, at = _targets_in(z, targets, first)
    above = (z > threshold[:, None]).sum(dim=1) - (inside & (_gather(z, at) > threshold)).long()
    rank.add_(above)
    target_logit.copy_(torch.where(inside, _gather(z, at), target_logit))
    new = torch.maximum(maximum, z.amax(dim=1))
    finite = torch.where(new == -torch.inf, 0.0, new)
    t = z - finite[:, None]
    e, t = torch.exp(t), torch.where(t == -torch.inf, 0.0, t)  # 0 times -inf would be NaN
    d = torch.where(maximum == -torch.inf, 0.0, maximum - finite)
    scale = torch.exp(maximum - finite)
    moments[1] = scale * (moments[1] + d * (2 * moments[0] + d * total)) + (e * t * t).sum(dim=1)
    moments[0] = scale * (moments[0] + d * total) + (e * t).sum(dim=1)
    total.mul_(scale).add_(e.sum(dim=1))
    maximum.copy_(new)


def kl_statistics(
    x: Tensor, y: Tensor, first: int, biases: tuple[Tensor | None, Tensor | None], logit_scale: float, softcap: float,
    targets: Tensor, target_shift: float, maximum: Tensor, total: Tensor, cross: Tensor,
) -> None:  # fmt: skip
    """Add the blocks x of the model and y of the reference (n, v) to maximum (2, n), total (2, n) and cross (n,)."""
    z = torch.stack(_logit_pair(x, y, first, biases, logit_scale, softcap, targets, target_shift))
    new = torch.maximum(maximum, z.amax(dim=2))
    finite = torch.where(new == -torch.inf, 0.0, new)
    t = z - finite[:, :, None]
    e = torch.exp(t)
    d, scale = maximum - finite, torch.exp(maximum - finite)
    before = torch.where((total[1] == 0) | (scale[1] == 0), 0.0, scale[1] * (cross + (d[1] - d[0]) * total[1]))
    cross.copy_(before + torch.where(e[1] == 0, 0.0, e[1] * (t[1] - t[0])).sum(dim=1))
    total.mul_(scale).add_(e.sum(dim=2))
    maximum.copy_(new)


def kl_gradient(
    x: Tensor, y: Tensor, first: int, biases: tuple[Tensor | None, Tensor | None], logit_scale: float, softcap: float,
    targets: Tensor, target_shift: float, maximum: Tensor, total: Tensor, coefficients: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """Write into out (n, v) the gradient of sum(coefficients * KL) at the model's raw products of a block."""
    z, reference = _logit_pair(x, y, first, biases, logit_scale, softcap, targets, target_shift)
    finite = torch.where(maximum == -torch.inf, 0.0, maximum)
    p, q = (torch.exp(u - m[:, None]) / s[:, None] for u, m, s in zip((z, reference), finite, total, strict=True))
    g = (p - q) * (coefficients * logit_scale)[:, None]
    g = g * (1 - (z / softcap) ** 2) if softcap else g
    out.copy_(torch.where(coefficients[:, None] == 0, 0.0, g))


def _logit_pair(
    x: Tensor, y: Tensor, first: int, biases: tuple[Tensor | None, Tensor | None], logit_scale: float, softcap: float,
    targets: Tensor, target_shift: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    z, reference = (
        logits_of(u, None if b is None else b.to(x.dtype), logit_scale, softcap)
        for u, b in zip((x, y), biases, strict=True)
    )
    if target_shift:
        inside, at = _targets_in(x, targets, first)
        shift = torch.where(inside, target_shift, 0.0).to(x.dtype)
        reference = reference.clone().scatter_add_(1, at[:, None], -shift[:, None])
    return z, reference


def _targets_in(x: Tensor, targets: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Return which rows have their target in the block, and the target's column (any valid column elsewhere)."""
    at = targets - first
    return (at >= 0) & (at < x.shape[1]), at.clamp(0, x.shape[1] - 1)


def _gather(z: Tensor, at: Tensor) -> Tensor:
    return z.gather(1, at[:, None]).squeeze(1)


def _cached_form(z: Tensor, reference: Tensor, softcap: float) -> Tensor:
    reference = torch.where(reference == -torch.inf, 0.0, reference)  # a block that is all -inf gives zeros, not NaN
    e = torch.exp(z - reference[:, None])
    return e * (1 - (z / softcap) ** 2) if softcap else e
