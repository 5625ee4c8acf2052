"""Margin of each row's largest logit over its mean logit, from hidden states and the output head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyunlearn.ops import reference
from pyunlearn.ops._check import check, check_head, in_one_dtype
from pyunlearn.ops._passes import real_of
from pyunlearn.ops._plan import Plan, allowance, plan
from pyunlearn.ops._portable import write_rows
from pyunlearn.ops._products import Logits, add_product, product, without_idle
from pyunlearn.ops._types import Head


def logit_margin(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    workspace: int | None = None,
) -> Tensor:
    """Compute the largest logit minus the mean logit of each row: 0 for the uniform distribution, and only there.

        margin[n] = max over v of z[n, v] - mean over v of z[n, v],    z as in linear_log_likelihood

    Equivalent to ``z.amax(-1) - z.mean(-1)``, and differentiable in hidden, weight and bias. The logits are computed
    block by block, once. Of equal largest logits the first gets the gradient, which without a softcap needs no product
    with the head: each row's gradient is that of its argmax minus the mean of all.

    Args:
        hidden: (..., D), float32, bfloat16, float16 or float64.
        weight: (V, D), on the same device; of different dtypes the wider is used for both.
        bias, logit_scale, softcap: as in linear_log_likelihood.
        workspace: bytes for scratch (default: 256 MiB on the CPU; on a GPU 2 GiB, or half of the free memory).

    Returns:
        (...), float32 (float64 for float64 inputs), 0 or more up to rounding.

    Raises:
        ArgumentError: shapes, dtypes or devices that do not fit.

    Source: the flattening loss of arXiv 2506.05314 is its square.

    Example:
        >>> import torch
        >>> logit_margin(torch.tensor([[3.0, 1.0], [2.0, 2.0]]), torch.eye(2))  # logits [3, 1] and [2, 2]
        tensor([1., 0.])
    """
    targets = hidden.new_zeros(hidden.shape[:-1], dtype=torch.int64)  # any valid ones
    check(hidden, targets, name="hidden", softcap=softcap, workspace=workspace)
    check_head(hidden, weight, bias)
    hidden, weight = in_one_dtype(hidden, weight)
    flat = hidden.reshape(-1, hidden.shape[-1])
    workspace = allowance(workspace, flat, len(flat), len(weight))
    margin: Tensor = _LogitMargin.apply(flat, weight, bias, logit_scale, softcap or 0.0, workspace)
    return margin.reshape(hidden.shape[:-1])


class _LogitMargin(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        logit_scale: float,
        softcap: float,
        workspace: int,
    ) -> Tensor:
        head, real = Head(weight, bias, logit_scale, softcap), real_of(hidden)
        allowed = workspace // 2 if softcap else workspace  # a block's tanh and slopes are copies of it
        p = plan(len(hidden), len(weight), hidden.dtype, hidden.device, allowed, False)
        largest = hidden.new_full((len(hidden),), -torch.inf, dtype=real)
        total = hidden.new_zeros((len(hidden),), dtype=real)
        first = torch.zeros_like(total, dtype=torch.int64)
        for b, _, z in _blocks(hidden, head, p):
            value, at = z.max(dim=1)
            above = value > largest
            first.copy_(torch.where(above, at + b, first))
            largest.copy_(torch.where(above, value, largest))
            total += z.sum(dim=1)
        ctx.save_for_backward(hidden, weight, bias, first)
        ctx.options = (logit_scale, softcap, p)
        return largest - total / len(weight)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, d_margin: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, first = ctx.saved_tensors
        logit_scale, softcap, p = ctx.options
        c = d_margin.to(real_of(hidden)) * logit_scale
        hidden = without_idle(hidden, c)
        needs = ctx.needs_input_grad[:3]
        head = Head(weight, bias, logit_scale, softcap)
        gradients = _capped(hidden, head, first, c, p, needs) if softcap else _plain(hidden, weight, first, c, needs)
        inputs = (hidden, weight, bias)
        return (*(d if d is None else d.to(x.dtype) for d, x in zip(gradients, inputs, strict=True)), None, None, None)


def _blocks(hidden: Tensor, head: Head, p: Plan) -> Any:
    """Yield (first, end, logits (N, end - first)) of each block of the vocabulary."""
    logits, real = Logits(hidden, real_of(hidden)), real_of(hidden)
    scratch = hidden.new_empty((len(hidden) * p.block,), dtype=real)
    for first, end in p.groups() if len(hidden) else []:
        for _, b, e in p.blocks_of(first, end):
            x = scratch[: len(hidden) * (e - b)].view(len(hidden), e - b)
            logits.into(x, head.weight[b:e])
            bias = None if head.bias is None else head.bias[b:e].to(real)
            yield b, e, reference.logits_of(x, bias, head.logit_scale, head.softcap)


Three = tuple[Tensor | None, Tensor | None, Tensor | None]


def _plain(hidden: Tensor, weight: Tensor, first: Tensor, c: Tensor, needs: tuple[bool, ...]) -> Three:
    """Compute the gradients for c (onehot(argmax) - 1 / V) at the raw products, in closed form."""
    real, size = c.dtype, len(weight)
    d_hidden = (weight[first].to(real) - weight.mean(dim=0, dtype=real)) * c[:, None] if needs[0] else None
    if not (needs[1] or needs[2]):
        return d_hidden, None, None
    rest = -c.sum() / size
    d_bias = _add_rows(rest.repeat(size), first, c) if needs[2] else None
    if not needs[1]:
        return d_hidden, None, d_bias
    weighted = c[:, None] * hidden.to(real)  # (N, D)
    everywhere = -weighted.sum(dim=0) / size  # (D,)
    # rows of one argmax are summed before anything is rounded to 16 bits, at its first index among the sorted argmaxes;
    # so the number of distinct ones, whose count would synchronize on a GPU, is not needed
    meeting = torch.searchsorted(first.sort().values, first)
    sums = _add_rows(torch.zeros_like(weighted), meeting, weighted)
    d_weight = everywhere.to(weight.dtype).repeat(size, 1)
    write_rows(d_weight, first, (sums[meeting] + everywhere).to(weight.dtype))  # rows of one argmax write the same
    return d_hidden, d_weight, d_bias


def _add_rows(out: Tensor, at: Tensor, rows: Tensor) -> Tensor:
    """Compute out[at[n]] += rows[n], in a fixed order for each index.

    On a GPU index_add is not deterministic, and accumulating index_put_ sorts first, without synchronizing; on the CPU
    index_add is sequential, and the threads of index_put_ add in any order.
    """
    return out.index_put_((at,), rows, accumulate=True) if out.is_cuda else out.index_add_(0, at, rows)


def _capped(hidden: Tensor, head: Head, first: Tensor, c: Tensor, p: Plan, needs: tuple[bool, ...]) -> Three:
    """Compute the gradients with tanh's slope on every logit, which needs the products again."""
    real, size = c.dtype, len(head.weight)
    d_hidden = hidden.new_zeros(hidden.shape, dtype=real) if needs[0] else None
    d_weight = torch.zeros_like(head.weight) if needs[1] else None
    d_bias = hidden.new_zeros((size,), dtype=real) if needs[2] else None
    for b, e, z in _blocks(hidden, head, p):
        columns = torch.arange(b, e, device=z.device)
        g = c[:, None] * (1 - (z / head.softcap) ** 2) * ((columns == first[:, None]).to(real) - 1 / size)
        if d_bias is not None:
            d_bias[b:e] = g.sum(dim=0)
        narrow = g.to(hidden.dtype)
        if d_weight is not None:
            product(d_weight[b:e], narrow.T, hidden)
        if d_hidden is not None:
            add_product(d_hidden, narrow, head.weight[b:e])
    return d_hidden, d_weight, d_bias
