"""Value and gradient in one pass, for objectives whose coefficients do not have to wait for the backward pass.

Rows are finished chunk by chunk: log-likelihoods, then their coefficients, then the gradient out of the logits that still lie there. So three
matrix products are enough, two with a frozen head, within any workspace that holds the logits of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyunlearn.ops import hopper
from pyunlearn.ops._library import NO_GRADIENT_OF_GRADIENT, bias_beside, host_may_wait
from pyunlearn.ops._passes import Gradients, Head, differentiate, real_of, score, take
from pyunlearn.ops._plan import allowance, bytes_of_sum, plan, rows_at_a_time


class Work(NamedTuple):
    """What to do with a head: everything that wants no gradient.

    `step(k, log_likelihood, differentiate)` takes the log-likelihoods (m,) of chunk k and returns what it makes of them, first the summands of
    the value, and the derivative (m,) of their sum, which is not looked at unless `differentiate`.
    """

    targets: Tensor  # (n,) of the live rows
    rows: Tensor | None  # (n,) which of the given rows are live; None: all
    chunks: list[tuple[int, int]]  # (first, end) live rows, one chunk at least
    at_a_time: int  # rows of a chunk for which the workspace was divided; a chunk may be longer
    step: Callable[[int, Tensor, bool], tuple[tuple[Tensor, ...], Tensor]]
    logit_scale: float
    softcap: float
    workspace: int
    negligible: float = 0.0  # see _passes.rows_that_pull


def rows_a_chunk(rows: int, hidden: Tensor, weight: Tensor, workspace: int | None) -> tuple[int, int]:
    """How many of `rows` live rows to take at a time, and the bytes they may use."""
    workspace = allowance(workspace, hidden, rows, weight.shape[0])
    train = torch.is_grad_enabled() and weight.requires_grad
    vocabulary, width = weight.shape
    most = rows_at_a_time(
        rows, vocabulary, width, hidden.dtype, hidden.device.type, workspace, train, hopper.serves(hidden, weight)
    )
    return most, workspace - (bytes_of_sum(vocabulary, width, hidden.dtype) if train and most < rows else 0)


def one_pass_serves(hidden: Tensor) -> bool:
    """Whether the gradient may be made in the forward pass."""
    return hidden.dtype is not torch.float16 and host_may_wait(hidden)


def one_pass(work: Work, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """(value, differentiable in hidden, weight and bias; what the steps returned, each joined over the chunks)."""
    found: tuple[Tensor, ...] = _OnePass.apply(work, torch.is_grad_enabled(), hidden, weight, bias)
    return found


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, work: Work, enabled: bool, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.work, ctx.needs = work, tuple(enabled and need for need in ctx.needs_input_grad[2:])
        parts, ctx.gradients = _run(work, hidden, weight, bias, ctx.needs)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*parts)
        return parts[0].sum(), *parts

    @staticmethod
    def backward(ctx: Any, d_value: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        if d_value is None:
            return (None,) * 5
        return None, None, *_Gradients.apply(ctx, d_value, hidden, weight, bias)


class _Gradients(torch.autograd.Function):
    """The backward pass as a function of its own, so that whoever differentiates it is told that it cannot be."""

    @staticmethod
    def forward(
        ctx: Any, made: Any, d_value: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        # scaled in place and given away: a second backward pass of the same graph makes them again
        gradients, made.gradients = made.gradients, None
        if gradients is None:
            gradients = _run(made.work, hidden, weight, bias, made.needs)[1]
        if _known_to_be_one(d_value):
            return tuple(gradients)
        return tuple(None if d is None else d.mul_(d_value) for d in gradients)

    backward = staticmethod(NO_GRADIENT_OF_GRADIENT)


def _known_to_be_one(factor: Tensor) -> bool:
    """Whether to multiply with it would read and write the weight's gradient for nothing, as after loss.backward(). A GPU is not asked."""
    return factor.device.type == "cpu" and bool(factor == 1)


def _run(
    work: Work, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]
) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
    """What the steps returned, and the gradients of hidden, weight and bias."""
    with torch.cuda.device_of(hidden):
        real, n, keep, several = real_of(hidden), work.targets.shape[0], any(needs), len(work.chunks) > 1
        (h,) = take(work.rows, hidden)
        head = Head(weight, bias_beside(h, bias), work.logit_scale, work.softcap)
        new = torch.empty if n else torch.zeros
        d_h = h.new_zeros(h.shape, dtype=real) if needs[0] else None
        d_weight = new(weight.shape, dtype=real if several else weight.dtype, device=h.device) if needs[1] else None
        d_bias = h.new_zeros((weight.shape[0],), dtype=real) if needs[2] else None
        kept: list[Tensor] = []
        made_for, found = None, []
        for k, (first, end) in enumerate(work.chunks):
            rows = max(work.at_a_time, end - first)
            p = plan(rows, weight.shape[0], h.dtype, h.device.type, work.workspace, keep, hopper.serves(h, weight))
            if made_for != (rows, p):
                kept.clear()
                kept += [h.new_empty((rows * p.room(b, e),)) for b, e in p.groups()[: p.kept]]
                block_maximum, made_for = h.new_empty((p.blocks if keep else 0, rows), dtype=real), (rows, p)
            part, t = h[first:end], work.targets[first:end]
            statistics = score(part, head, t, p, kept, block_maximum if keep else None)
            parts, coefficients = work.step(k, statistics.log_likelihood, keep)
            found.append(parts)
            if keep:
                into = Gradients(None if d_h is None else d_h[first:end], d_weight, d_bias, add=first > 0)
                last = k == len(work.chunks) - 1
                differentiate(
                    part, head, t, p, statistics, coefficients.to(real).contiguous(), [*kept], block_maximum, into,
                    in_place=True, release=last, negligible=work.negligible,
                )  # fmt: skip
        d_hidden = None if d_h is None else d_h.to(hidden.dtype)
        if d_hidden is not None and work.rows is not None:
            d_hidden = torch.zeros_like(hidden).index_copy_(0, work.rows, d_hidden)
        gradients = [
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
        ]
        return tuple(torch.cat(part) for part in zip(*found, strict=True)), gradients
