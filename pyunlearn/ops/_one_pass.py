"""Value and gradient in one pass, for objectives whose coefficients are known before the backward pass.

Each chunk of rows is finished before the next: log-likelihoods, their coefficients, then the gradient from the chunk's
cached logits. So three matrix products suffice, two with a frozen head, within any workspace that holds the logits of
one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyunlearn.ops import hopper
from pyunlearn.ops._library import host_may_wait, kernel_bias, no_second_derivative
from pyunlearn.ops._passes import Gradients, Head, differentiate, real_of, score, select_rows
from pyunlearn.ops._plan import allowance, bytes_of_sum, plan, rows_at_a_time
from pyunlearn.ops._portable import write_rows


class Work(NamedTuple):
    """An objective over the live rows, those whose targets are not ignored, with its inputs that get no gradient.

    `step(k, log_likelihood, differentiate)` gets the log-likelihoods (m,) of chunk k. It returns a tuple of tensors,
    the first of which holds the summands of the value, and the derivative (m,) of their sum, which is used only if
    `differentiate`.
    """

    targets: Tensor  # (n,) targets of the live rows
    rows: Tensor | None  # (n,) indices of the live rows; None: all
    chunks: list[tuple[int, int]]  # (first, end) live rows of each; at least one chunk
    at_a_time: int  # rows per chunk that the workspace was planned for; a chunk may be longer
    step: Callable[[int, Tensor, bool], tuple[tuple[Tensor, ...], Tensor]]
    logit_scale: float
    softcap: float
    workspace: int
    negligible: float = 0.0  # see _passes.rows_with_gradient


def rows_per_chunk(rows: int, hidden: Tensor, weight: Tensor, workspace: int | None) -> tuple[int, int]:
    """Return how many of `rows` live rows to process at a time, and the bytes that they may use."""
    workspace = allowance(workspace, hidden, rows, weight.shape[0])
    train = torch.is_grad_enabled() and weight.requires_grad
    vocabulary, width = weight.shape
    fused = hopper.serves(hidden, weight)
    most = rows_at_a_time(rows, vocabulary, width, hidden.dtype, hidden.device, workspace, train, fused)
    return most, workspace - (bytes_of_sum(vocabulary, width, hidden.dtype) if train and most < rows else 0)


def one_pass_serves(hidden: Tensor) -> bool:
    """Return whether the gradient may be computed in the forward pass.

    Not in float16, where it would underflow before the loss scale reaches it, nor under torch.compile or in a CUDA
    graph, where chunks cannot depend on the data.
    """
    return hidden.dtype is not torch.float16 and host_may_wait(hidden)


def one_pass(work: Work, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """Return (value, *outputs).

    The value is differentiable in hidden, weight and bias; the outputs are those of the steps, concatenated over the
    chunks.
    """
    value_and_outputs: tuple[Tensor, ...] = _OnePass.apply(work, torch.is_grad_enabled(), hidden, weight, bias)
    return value_and_outputs


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
    """The backward pass as a function of its own, which raises when it is differentiated itself."""

    @staticmethod
    def forward(
        ctx: Any, forward_ctx: Any, d_value: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        # scaled in place and handed over: a second backward pass of the same graph computes them again
        gradients, forward_ctx.gradients = forward_ctx.gradients, None
        if gradients is None:
            gradients = _run(forward_ctx.work, hidden, weight, bias, forward_ctx.needs)[1]
        if _known_to_be_one(d_value):
            return tuple(gradients)
        return tuple(None if d is None else d.mul_(d_value) for d in gradients)

    backward = staticmethod(no_second_derivative)


def _known_to_be_one(factor: Tensor) -> bool:
    """Return whether the factor is known to be 1, as after loss.backward(), so that scaling can be skipped.

    A GPU is not queried, since that would synchronize.
    """
    return factor.device.type == "cpu" and bool(factor == 1)


def _run(
    work: Work, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]
) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
    """Return the steps' outputs, concatenated, and the gradients of hidden, weight and bias."""
    with torch.cuda.device_of(hidden):
        real, n, keep, several = real_of(hidden), work.targets.shape[0], any(needs), len(work.chunks) > 1
        (h,) = select_rows(work.rows, hidden)
        head = Head(weight, kernel_bias(h, bias), work.logit_scale, work.softcap)
        new = torch.empty if n else torch.zeros
        d_weight = new(weight.shape, dtype=real if several else weight.dtype, device=h.device) if needs[1] else None
        d_bias = h.new_zeros((weight.shape[0],), dtype=real) if needs[2] else None
        cached: list[Tensor] = []
        d_h: list[Tensor] = []  # of each chunk
        planned_for, outputs = None, []
        for k, (first, end) in enumerate(work.chunks):
            rows = max(work.at_a_time, end - first)
            p = plan(rows, weight.shape[0], h.dtype, h.device, work.workspace, keep, hopper.serves(h, weight))
            if planned_for != (rows, p):
                cached.clear()
                cached += [h.new_empty((rows * p.row_length(b, e),)) for b, e in p.groups()[: p.cached]]
                block_maximum = h.new_empty((p.blocks if keep else 0, rows), dtype=real)
                planned_for = (rows, p)
            part, t = h[first:end], work.targets[first:end]
            statistics = score(part, head, t, p, cached, block_maximum if keep else None)
            parts, coefficients = work.step(k, statistics.log_likelihood, keep)
            outputs.append(parts)
            if keep:
                into = Gradients(needs[0], d_weight, d_bias, add=first > 0)
                last = k == len(work.chunks) - 1
                d_part = differentiate(
                    part, head, t, p, statistics, coefficients.to(real).contiguous(), [*cached], block_maximum, into,
                    in_place=True, release=last, negligible=work.negligible,
                )  # fmt: skip
                if d_part is not None:
                    d_h.append(d_part)
        d_hidden = (d_h[0] if len(d_h) == 1 else torch.cat(d_h)) if d_h else None
        if d_hidden is not None and work.rows is not None:
            d_hidden = write_rows(torch.zeros_like(hidden), work.rows, d_hidden)
        gradients = [
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
        ]
        return tuple(torch.cat(part) for part in zip(*outputs, strict=True)), gradients
