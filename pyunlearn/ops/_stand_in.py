"""Stand-in for the objectives on the meta device: it allocates what they allocate, and computes nothing.

It follows `_one_pass._run` and the two passes of `_passes`, buffer by buffer, so that the memory of a step can be
traced without weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyunlearn.ops import _backend
from pyunlearn.ops._passes import real_of
from pyunlearn.ops._plan import Plan, bytes_of_sum, default_workspace, plan, rows_at_a_time


class Place(NamedTuple):
    """Device and workspace with which the op would run, and a counter of its work."""

    device: str
    """Type of the device: cpu or cuda."""
    workspace: int | None
    """Bytes for cached logits; None for the default."""
    add_operations: Callable[[float], None]
    """Called with the number of floating-point operations of each call."""


def objective(hidden: Tensor, weight: Tensor, bias: Tensor | None, counts: list[int], place: Place) -> Tensor:
    """Return a differentiable () in place of an objective's loss.

    Args:
        hidden: (N, D) on the meta device.
        weight: (V, D) on the meta device.
        bias: (V,) or None.
        counts: scored tokens of each example, N in all.
        place: where the op would run.
    """
    wide = torch.promote_types(hidden.dtype, weight.dtype)
    value: Tensor = _StandIn.apply(hidden.to(wide), weight.to(wide), bias, counts, place, torch.is_grad_enabled())
    return value


def log_likelihood(hidden: Tensor, weight: Tensor, place: Place) -> None:
    """Allocate and free what log-likelihoods take that nothing is differentiated from."""
    wide = torch.promote_types(hidden.dtype, weight.dtype)
    hidden, weight = hidden.to(wide), weight.to(wide)
    (n, width), vocabulary = hidden.shape, weight.shape[0]
    p = plan(n, vocabulary, wide, place.device, place.workspace, False)
    _scores(hidden, p, [], place)
    place.add_operations(2.0 * n * width * vocabulary)


class _StandIn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, counts: list[int], place: Place, enabled: bool
    ) -> Tensor:
        needs = [enabled and need for need in ctx.needs_input_grad[:3]]
        ctx.save_for_backward(hidden, weight)
        ctx.gradients = _run(hidden, weight, bias, counts, place, needs)
        return hidden.new_zeros((), dtype=real_of(hidden))

    @staticmethod
    def backward(ctx: Any, d_value: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradients, ctx.gradients = ctx.gradients, None
        return (*gradients, None, None, None)


def _run(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, counts: list[int], place: Place, needs: list[bool]
) -> list[Tensor | None]:
    """Allocate the gradients and, in passing, the buffers of the largest chunk of rows; return the gradients."""
    (n, width), vocabulary, dtype, real = hidden.shape, weight.shape[0], hidden.dtype, real_of(hidden)
    workspace = default_workspace(place.device) if place.workspace is None else place.workspace
    most = rows_at_a_time(n, vocabulary, width, dtype, place.device, workspace, needs[1])
    several = most < n and len(counts) > 1
    if needs[1] and most < n:
        workspace -= bytes_of_sum(vocabulary, width, dtype)
    rows = min(n, max(most, *counts))
    p = plan(max(rows, most), vocabulary, dtype, place.device, workspace, any(needs))
    again = 1 - p.cached / len(p.groups())
    place.add_operations(2.0 * n * width * vocabulary * (1 + any(needs) * again + needs[0] + needs[1]))
    d_hidden = hidden.new_empty(hidden.shape, dtype=real) if needs[0] else None
    d_weight = weight.new_empty(weight.shape, dtype=real if several else weight.dtype) if needs[1] else None
    d_bias = None if bias is None or not needs[2] else bias.new_empty(bias.shape, dtype=real)
    if any(needs):
        _differentiates(hidden, p, rows, d_weight, place)
    else:
        _scores(hidden[:rows], p, [], place)
    return [
        None if d_hidden is None else d_hidden.to(dtype),
        None if d_weight is None else d_weight.to(weight.dtype),
        None if d_bias is None or bias is None else d_bias.to(bias.dtype),
    ]


def _differentiates(hidden: Tensor, p: Plan, rows: int, d_weight: Tensor | None, place: Place) -> None:
    """Allocate the cache of a chunk, what its scores take, then what its gradient takes."""
    real, narrow = real_of(hidden), real_of(hidden) != hidden.dtype
    cached = [hidden.new_empty((max(rows, 1) * (end - first),)) for first, end in p.groups()[: p.cached]]
    maxima = hidden.new_empty((p.blocks, rows), dtype=real)
    _scores(hidden[:rows], p, cached, place)
    recomputed = len(cached) < len(p.groups())
    scratch = hidden.new_empty((rows * p.block,), dtype=real) if recomputed else None
    d_logits = hidden.new_empty((rows * p.group,)) if recomputed else None
    if narrow and place.device == "cpu":  # each product is rounded, then added
        product = hidden.new_empty((rows, hidden.shape[1]))
        if d_weight is not None and d_weight.dtype != hidden.dtype:
            product = hidden.new_empty((p.group, hidden.shape[1]))
        del product
    del cached, maxima, scratch, d_logits


def _scores(hidden: Tensor, p: Plan, cached: list[Tensor], place: Place) -> None:
    """Allocate and free what `_passes.score` takes in addition to the cache."""
    (n, width), real = hidden.shape, real_of(hidden)
    narrow = hidden.dtype != real
    scratch = hidden.new_empty((n * p.block,), dtype=real) if narrow or len(cached) < len(p.groups()) else None
    ours = hidden.dtype is torch.bfloat16 and _backend.on_cpu().kernels == "cpu" and _backend.bf16_products()
    if narrow and place.device == "cpu" and not ours:
        wide = hidden.new_empty((n + p.block, width), dtype=real)  # the rows, and a block of the weight
        del wide
    del scratch
