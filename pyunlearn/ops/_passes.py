"""The two passes over the vocabulary shared by every op on (hidden, head): row statistics, then the gradient.

Rows here are live ones: ignored rows have been dropped. Buffers are allocated by the caller, who knows their lifetime.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyunlearn.ops import _backend, hopper
from pyunlearn.ops._check import NOTHING, check_targets
from pyunlearn.ops._library import host_may_wait
from pyunlearn.ops._plan import MIB, Plan, balance
from pyunlearn.ops._portable import release as free
from pyunlearn.ops._portable import write_rows
from pyunlearn.ops._products import Logits, add_product, column_sums, product, without_idle
from pyunlearn.ops._types import Gradients as Gradients
from pyunlearn.ops._types import Head as Head
from pyunlearn.ops._types import Statistics as Statistics


def real_of(x: Tensor) -> torch.dtype:
    """Return the dtype of per-row numbers: float64 for float64 inputs, else float32."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def live_rows(targets: Tensor, ignore_index: int) -> Tensor | None:
    """Return the indices of the rows that are not ignored, or None for all rows.

    On a GPU this synchronizes once, even if nothing is ignored; not with NOTHING as ignore_index, nor while a CUDA
    graph is captured. Then all rows are computed, and the caller masks the ignored ones.
    """
    if ignore_index == NOTHING:
        return None
    if targets.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    rows = (targets != ignore_index).nonzero().squeeze(1)
    return None if rows.numel() == targets.numel() else rows


def resolve_ignored(hidden: Tensor, targets: Tensor, vocabulary: int, ignore_index: int) -> tuple[Tensor | None, int]:
    """Return (live rows, ignore_index for the op), called before an op.

    Rows are dropped up front, so that only live rows share the workspace and backward need not find them again. Where
    the host may not synchronize, the op itself handles ignored rows. Raises ArgumentError on the CPU for a target
    outside [0, vocabulary).
    """
    if not host_may_wait(hidden):
        return None, ignore_index
    if not check_targets(targets, vocabulary, ignore_index):
        return None, NOTHING
    return live_rows(targets, ignore_index), NOTHING


def select_rows(rows: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """Return the given rows of each tensor (None: all rows), contiguous."""
    return [(t if rows is None else t.index_select(0, rows)).contiguous() for t in tensors]


def zero_ignored_rows(h: Tensor, targets: Tensor, rows: Tensor | None, ignore_index: int) -> Tensor:
    """Zero the rows of h (n, D) that are ignored and could not be dropped, as in a CUDA graph (0 * NaN is NaN)."""
    if rows is not None or ignore_index == NOTHING or not h.is_cuda:
        return h
    return h.masked_fill((targets == ignore_index)[:, None], 0)


def score(
    h: Tensor, head: Head, targets: Tensor, p: Plan, cached: list[Tensor], block_maximum: Tensor | None
) -> Statistics:
    """Compute the statistics of rows h (n, D).

    cached: flat buffers of at least n * columns elements for the first len(cached) groups; they receive
    exp(logit - block maximum). block_maximum: (blocks, n) or wider, filled; None if no gradient will follow.
    """
    if p.fused:
        return Statistics(*hopper.score(h, head, targets, cached, block_maximum))
    n, real = h.shape[0], real_of(h)
    maximum, total = h.new_full((n,), -torch.inf, dtype=real), h.new_zeros((n,), dtype=real)  # (n,) each
    target_logit = h.new_full((n,), torch.nan, dtype=real)  # (n,)
    logits, narrow = Logits(h, real), h.dtype != real
    scratch = h.new_empty((n * p.block,), dtype=real) if n and (narrow or len(cached) < len(p.groups())) else None
    for g, (first, end) in enumerate(p.groups() if n else []):
        group = cached[g][: n * (end - first)].view(n, end - first) if g < len(cached) else None  # (n, group columns)
        for i, b, e in p.blocks_of(first, end):
            store = None if group is None else group[:, b - first : e - first]  # (n, v), v = e - b
            if store is not None and not narrow:
                x = store  # float32 logits are written where their exponentials will be cached
            else:
                assert scratch is not None
                x = scratch[: n * (e - b)].view(n, e - b)  # (n, v)
            logits.into(x, head.weight[b:e])
            bias = None if head.bias is None else head.bias[b:e]  # (v,)
            top = None if block_maximum is None else block_maximum[i, :n]  # (n,)
            _backend.statistics(
                x, b, bias, head.logit_scale, head.softcap, targets, maximum, total, target_logit, store, top
            )  # fmt: skip
    return Statistics((target_logit - maximum) - total.log(), maximum, total)


def differentiate(
    h: Tensor, head: Head, targets: Tensor, p: Plan, statistics: Statistics, coefficients: Tensor,
    cached: list[Tensor | None], block_maximum: Tensor, into: Gradients, *, in_place: bool, release: bool,
    negligible: float = 0.0,
) -> Tensor | None:  # fmt: skip
    """Compute the gradient of sum(coefficients * log-likelihood) of rows h (n, D); return that of h, in its dtype.

    cached: the buffers that `score` filled, one per group; None or missing where logits have to be recomputed.
    in_place: each buffer is overwritten by the gradient with respect to its logits. release: its memory is freed after
    use, group by group. negligible: see `rows_with_gradient`.
    """
    if p.fused:
        return hopper.differentiate(
            h, head, targets, p, statistics, coefficients, cached, block_maximum, into, release=release
        )
    count, real = h.shape[0], real_of(h)
    cached = cached + [None] * (len(p.groups()) - len(cached))
    again = any(k is None for k in cached)
    block_maximum = block_maximum[:, :count]  # (blocks, rows)
    active, idle = rows_with_gradient(statistics.log_likelihood, coefficients, negligible, h, cached=not again)
    if active is not None:  # from here on, n counts the active rows
        h, targets, coefficients, *per_row = select_rows(active, h, targets, coefficients, *statistics)
        statistics, block_maximum = Statistics(*per_row), block_maximum.index_select(1, active)
    h, n = without_idle(h, coefficients) if idle else h, h.shape[0]
    d_hidden = h.new_zeros(h.shape, dtype=real) if into.hidden else None  # (n, D)
    logits = Logits(h if again else h[:0], real)
    scratch = h.new_empty((n * p.block,), dtype=real) if again else None
    d_buffer = h.new_empty((n * p.group,)) if again or not in_place else None
    for g, (first, end) in enumerate(p.groups() if count else []):
        buffer, width = cached[g], end - first
        group = None if buffer is None else buffer[: count * width].view(count, width)  # (rows, group columns)
        d_logits = None if d_buffer is None else d_buffer[: n * width].view(n, width)  # (n, group columns)
        if group is not None and active is not None:
            group = squeeze(group, active) if in_place else torch.index_select(group, 0, active, out=d_logits)
        if d_logits is None or (in_place and group is not None):
            assert group is not None
            d_logits = group
        for i, b, e in p.blocks_of(first, end):
            if group is not None:
                x = group[:, b - first : e - first]  # (n, v) exponentials
            else:
                assert scratch is not None
                x = scratch[: n * (e - b)].view(n, e - b)  # (n, v) logits
                logits.into(x, head.weight[b:e])
            bias = None if head.bias is None else head.bias[b:e]  # (v,)
            _backend.gradient(
                x, b, bias, head.logit_scale, head.softcap, targets, group is not None, statistics.maximum,
                statistics.total, statistics.log_likelihood, coefficients, block_maximum[i],
                d_logits[:, b - first : e - first],
            )  # fmt: skip
        if into.weight is not None:
            (add_product if into.add else product)(into.weight[first:end], d_logits.T, h)  # (v, n) @ (n, D)
        if into.bias is not None:
            d_bias = column_sums(d_logits, real)  # (v,)
            into.bias[first:end] = into.bias[first:end] + d_bias if into.add else d_bias
        if d_hidden is not None:
            add_product(d_hidden, d_logits, head.weight[first:end])  # (n, v) @ (v, D)
        if release and buffer is not None:
            del group, d_logits
            free(buffer)
    d_hidden = None if d_hidden is None else d_hidden.to(h.dtype)
    if d_hidden is None or active is None:
        return d_hidden
    return write_rows(d_hidden.new_zeros((count, h.shape[1])), active, d_hidden)


def rows_with_gradient(
    log_likelihood: Tensor, coefficients: Tensor, negligible: float, h: Tensor, *, cached: bool
) -> tuple[Tensor | None, bool]:
    """Return the indices of the rows (n,) that need the backward pass's products, or None for all; and if some are 0.

    A row's gradient with respect to its logits sums to at most 2 |coefficient * logit_scale| (1 - p) in magnitude: none
    for a coefficient of 0, next to none for a target with 1 - p < negligible. Dropping rows from cached logits costs
    compacting the others; it is done where that costs less than the products saved. On a GPU counting the rows
    synchronizes, so there it is done only for a `negligible` above 0.
    """
    if h.is_cuda and (not negligible or torch.cuda.is_current_stream_capturing()):
        return None, True
    if not negligible and bool(coefficients.all()):
        return None, False
    idle = coefficients == 0
    if negligible:
        idle |= -torch.expm1(log_likelihood) < negligible  # NaN is not below anything
    rows = idle.logical_not().nonzero().squeeze(1)
    dropped = len(h) - len(rows)
    moved = 4 * h.element_size() * balance(h.device.type, h.dtype) * len(rows) if cached else 0
    return (rows, False) if dropped and dropped * 2 * h.shape[1] >= moved else (None, True)


def squeeze(matrix: Tensor, rows: Tensor) -> Tensor:
    """Compact the given rows of a contiguous matrix (n, v) in place, and return them: its first len(rows) rows.

    Rows are ascending, and move in chunks, each copied out before it is copied in. Every row moves up or stays, so a
    chunk overwrites none of the later rows. A chunk takes two calls, and a few MiB in addition to the workspace.
    """
    packed = matrix.view(-1)[: len(rows) * matrix.shape[1]].view(len(rows), matrix.shape[1])
    most = max(1, (32 * MIB if matrix.is_cuda else 4 * MIB) // max(1, matrix.shape[1] * matrix.element_size()))
    for first in range(0, len(rows), most):
        chunk = rows[first : first + most]
        packed[first : first + len(chunk)] = matrix.index_select(0, chunk)
    return packed
