"""The two passes over the vocabulary that every op on (hidden, head) is made of: statistics of the rows, then the gradient from them.

Rows here are live ones: masked rows have been dropped. Buffers come from the caller, who knows how long they live.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyunlearn.ops import _backend, _hopper
from pyunlearn.ops._plan import Plan
from pyunlearn.ops._products import Logits, add_product, product
from pyunlearn.ops._types import Gradients as Gradients
from pyunlearn.ops._types import Head as Head
from pyunlearn.ops._types import Statistics as Statistics


def real_of(x: Tensor) -> torch.dtype:
    """The type of everything that is one number a row."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def live_rows(targets: Tensor, ignore_index: int) -> Tensor | None:
    """Indices of the rows that count, or None for all. One host sync on a card, none inside a CUDA graph, where all rows are computed."""
    if targets.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    rows = (targets != ignore_index).nonzero().squeeze(1)
    return None if rows.numel() == targets.numel() else rows


def take(rows: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """Those rows of each tensor, contiguous."""
    return [(t if rows is None else t.index_select(0, rows)).contiguous() for t in tensors]


def score(
    h: Tensor, head: Head, targets: Tensor, p: Plan, kept: list[Tensor], block_maximum: Tensor | None
) -> Statistics:
    """The statistics of rows h (n, D).

    kept: flat buffers of n * columns elements or more for the first len(kept) groups, which receive exp(logit - block maximum).
    block_maximum: (blocks, n) or more columns, filled; None if there will be no gradient.
    """
    if p.fused:
        return Statistics(*_hopper.score(h, head, targets, kept, block_maximum))
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
    block_maximum: Tensor, into: Gradients, *, in_place: bool, release: bool,
) -> None:  # fmt: skip
    """Adds or writes the gradient of sum(coefficients * log-likelihood) of rows h (n, D).

    kept: what `score` kept of each group, None or missing for what has to be computed again. in_place: it becomes the gradient with respect to
    the logits where it lies; release: and its memory is given back, group by group.
    """
    if p.fused:
        _hopper.differentiate(h, head, targets, p, statistics, coefficients, kept, block_maximum, into, release=release)
        return
    n, real = h.shape[0], real_of(h)
    kept = kept + [None] * (len(p.groups()) - len(kept))
    again = any(k is None for k in kept)
    logits = Logits(h if again else h[:0], real)
    scratch = h.new_empty((n * p.block,), dtype=real) if again else None
    d_buffer = h.new_empty((n * p.group,)) if again or not in_place else None
    for g, (first, end) in enumerate(p.groups() if n else []):
        buffer = kept[g]
        group = None if buffer is None else buffer[: n * (end - first)].view(n, end - first)
        if in_place and group is not None:
            d_logits = group
        else:
            assert d_buffer is not None
            d_logits = d_buffer[: n * (end - first)].view(n, end - first)
        for i, b, e in p.blocks_of(first, end):
            if group is not None:
                x = group[:, b - first : e - first]
            else:
                assert scratch is not None
                x = scratch[: n * (e - b)].view(n, e - b)
                logits.into(x, head.weight[b:e])
            _backend.gradient(
                x, b, None if head.bias is None else head.bias[b:e], head.logit_scale, head.softcap, targets, group is not None,
                statistics.maximum, statistics.total, statistics.log_likelihood, coefficients, block_maximum[i, :n],
                d_logits[:, b - first : e - first],
            )  # fmt: skip
        if into.weight is not None:
            (add_product if into.add else product)(into.weight[first:end], d_logits.T, h)
        if into.bias is not None:
            found = torch.sum(d_logits, dim=0, dtype=real)
            into.bias[first:end] = into.bias[first:end] + found if into.add else found
        if into.hidden is not None:
            add_product(into.hidden, d_logits, head.weight[first:end])
        if release and buffer is not None:
            del group, d_logits
            buffer.untyped_storage().resize_(0)
