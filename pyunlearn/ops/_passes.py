"""The two passes over the vocabulary that every op on (hidden, head) is made of: statistics of the rows, then the gradient from them.

Rows here are live ones: masked rows have been dropped. Buffers come from the caller, who knows how long they live.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyunlearn.ops import _backend, hopper
from pyunlearn.ops._check import NOTHING, check_targets
from pyunlearn.ops._library import host_may_wait
from pyunlearn.ops._plan import MIB, Plan, balance
from pyunlearn.ops._products import Logits, add_product, product
from pyunlearn.ops._types import Gradients as Gradients
from pyunlearn.ops._types import Head as Head
from pyunlearn.ops._types import Statistics as Statistics


def real_of(x: Tensor) -> torch.dtype:
    """The type of everything that is one number a row."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def live_rows(targets: Tensor, ignore_index: int) -> Tensor | None:
    """Indices of the rows that count, or None for all.

    On a GPU the host waits once for the answer, also for the answer that nothing is ignored. Not asked: with NOTHING as ignore_index, and while a
    CUDA graph is captured, where all rows are taken and the caller sees to what the ignored ones make.
    """
    if ignore_index == NOTHING:
        return None
    if targets.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    rows = (targets != ignore_index).nonzero().squeeze(1)
    return None if rows.numel() == targets.numel() else rows


def settle_rows(hidden: Tensor, targets: Tensor, vocabulary: int, ignore_index: int) -> tuple[Tensor | None, int]:
    """live_rows before an op is called, and what it is to ignore then: the rows that count share the workspace, and backward need not ask again.

    Where the host may not wait, the op sees to it. Raises ArgumentError on the CPU for a target outside [0, vocabulary).
    """
    if not host_may_wait(hidden):
        return None, ignore_index
    check_targets(targets, vocabulary, ignore_index)
    return live_rows(targets, ignore_index), NOTHING


def take(rows: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """Those rows of each tensor, contiguous."""
    return [(t if rows is None else t.index_select(0, rows)).contiguous() for t in tensors]


def quieted(h: Tensor, targets: Tensor, rows: Tensor | None, ignore_index: int) -> Tensor:
    """h (n, D) with zeros in ignored rows that could not be dropped, as in a CUDA graph: times their coefficient 0, a NaN there would still be one."""
    if rows is not None or ignore_index == NOTHING or not h.is_cuda:
        return h
    return h.masked_fill((targets == ignore_index)[:, None], 0)


def score(
    h: Tensor, head: Head, targets: Tensor, p: Plan, kept: list[Tensor], block_maximum: Tensor | None
) -> Statistics:
    """The statistics of rows h (n, D).

    kept: flat buffers of n * columns elements or more for the first len(kept) groups, which receive exp(logit - block maximum).
    block_maximum: (blocks, n) or more columns, filled; None if there will be no gradient.
    """
    if p.fused:
        return Statistics(*hopper.score(h, head, targets, kept, block_maximum))
    n, real = h.shape[0], real_of(h)
    maximum, total = h.new_full((n,), -torch.inf, dtype=real), h.new_zeros((n,), dtype=real)
    target_logit = h.new_full((n,), torch.nan, dtype=real)
    logits, narrow = Logits(h, real), h.dtype != real
    scratch = h.new_empty((n * p.block,), dtype=real) if n and (narrow or len(kept) < len(p.groups())) else None
    for g, (first, end) in enumerate(p.groups() if n else []):
        group = kept[g][: n * (end - first)].view(n, end - first) if g < len(kept) else None
        for i, b, e in p.blocks_of(first, end):
            store = None if group is None else group[:, b - first : e - first]
            x = store if store is not None and not narrow else scratch[: n * (e - b)].view(n, e - b)  # type: ignore[index]
            logits.into(x, head.weight[b:e])
            _backend.statistics(
                x, b, None if head.bias is None else head.bias[b:e], head.logit_scale, head.softcap, targets, maximum, total, target_logit,
                store, None if block_maximum is None else block_maximum[i, :n],
            )  # fmt: skip
    return Statistics((target_logit - maximum) - total.log(), maximum, total)


def differentiate(
    h: Tensor, head: Head, targets: Tensor, p: Plan, statistics: Statistics, coefficients: Tensor, kept: list[Tensor | None],
    block_maximum: Tensor, into: Gradients, *, in_place: bool, release: bool, negligible: float = 0.0,
) -> None:  # fmt: skip
    """Adds or writes the gradient of sum(coefficients * log-likelihood) of rows h (n, D).

    kept: what `score` kept of each group, None or missing for what has to be computed again. in_place: it becomes the gradient with respect to
    the logits where it lies; release: and its memory is given back, group by group. negligible: see `rows_that_pull`.
    """
    if p.fused:
        hopper.differentiate(h, head, targets, p, statistics, coefficients, kept, block_maximum, into, release=release)
        return
    count, real = h.shape[0], real_of(h)
    kept = kept + [None] * (len(p.groups()) - len(kept))
    again = any(k is None for k in kept)
    block_maximum = block_maximum[:, :count]
    pulling = rows_that_pull(statistics.log_likelihood, coefficients, negligible, h, kept=not again)
    into_hidden = into.hidden
    if pulling is not None:
        h, targets, coefficients, *few = take(pulling, h, targets, coefficients, *statistics)
        statistics, block_maximum = Statistics(*few), block_maximum.index_select(1, pulling)
        into_hidden = None if into.hidden is None else h.new_zeros(h.shape, dtype=real)
    n = h.shape[0]
    logits = Logits(h if again else h[:0], real)
    scratch = h.new_empty((n * p.block,), dtype=real) if again else None
    d_buffer = h.new_empty((n * p.group,)) if again or not in_place else None
    for g, (first, end) in enumerate(p.groups() if count else []):
        buffer, width = kept[g], end - first
        group = None if buffer is None else buffer[: count * width].view(count, width)
        d_logits = None if d_buffer is None else d_buffer[: n * width].view(n, width)
        if group is not None and pulling is not None:
            group = squeeze(group, pulling) if in_place else torch.index_select(group, 0, pulling, out=d_logits)
        if d_logits is None or (in_place and group is not None):
            assert group is not None
            d_logits = group
        for i, b, e in p.blocks_of(first, end):
            if group is not None:
                x = group[:, b - first : e - first]
            else:
                assert scratch is not None
                x = scratch[: n * (e - b)].view(n, e - b)
                logits.into(x, head.weight[b:e])
            _backend.gradient(
                x, b, None if head.bias is None else head.bias[b:e], head.logit_scale, head.softcap, targets, group is not None,
                statistics.maximum, statistics.total, statistics.log_likelihood, coefficients, block_maximum[i],
                d_logits[:, b - first : e - first],
            )  # fmt: skip
        if into.weight is not None:
            (add_product if into.add else product)(into.weight[first:end], d_logits.T, h)
        if into.bias is not None:
            found = torch.sum(d_logits, dim=0, dtype=real)
            into.bias[first:end] = into.bias[first:end] + found if into.add else found
        if into_hidden is not None:
            add_product(into_hidden, d_logits, head.weight[first:end])
        if release and buffer is not None:
            del group, d_logits
            buffer.untyped_storage().resize_(0)
    if pulling is not None and into.hidden is not None and into_hidden is not None:
        into.hidden.index_copy_(0, pulling, into_hidden)


def rows_that_pull(
    log_likelihood: Tensor, coefficients: Tensor, negligible: float, h: Tensor, *, kept: bool
) -> Tensor | None:
    """Indices of the rows (n,) that need the products of the backward pass, or None for all.

    A row's gradient with respect to its logits sums to at most 2 |coefficient * logit_scale| (1 - p) in magnitude. So a coefficient of 0 means none at
    all, and a target with 1 - p < negligible next to none. Leaving rows out of what is kept costs moving the others together; it is done where that is less
    than the products saved. On a GPU the count would stop the queue, so there it is asked only for a `negligible` of the caller's.
    """
    if h.is_cuda and (not negligible or torch.cuda.is_current_stream_capturing()):
        return None
    idle = coefficients == 0
    if negligible:
        idle |= -torch.expm1(log_likelihood) < negligible  # NaN is not below anything
    rows = idle.logical_not().nonzero().squeeze(1)
    dropped = len(h) - len(rows)
    moved = 4 * h.element_size() * balance(h.device.type, h.dtype) * len(rows) if kept else 0
    return rows if dropped and dropped * 2 * h.shape[1] >= moved else None


def squeeze(matrix: Tensor, rows: Tensor) -> Tensor:
    """Those rows of a contiguous matrix (n, v), in ascending order, moved together where it lies: its first len(rows) rows.

    They go by the chunk, which is copied out in whole before it is copied in. Every row moves up or stays, so a chunk overwrites none that comes
    after it. Each takes two calls, and memory beside the workspace, so they are of a few MiB.
    """
    packed = matrix.view(-1)[: len(rows) * matrix.shape[1]].view(len(rows), matrix.shape[1])
    most = max(1, (32 * MIB if matrix.is_cuda else 4 * MIB) // max(1, matrix.shape[1] * matrix.element_size()))
    for first in range(0, len(rows), most):
        some = rows[first : first + most]
        packed[first : first + len(some)] = matrix.index_select(0, some)
    return packed
