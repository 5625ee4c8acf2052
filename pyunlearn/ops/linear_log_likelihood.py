"""Per-token log-likelihoods from hidden states and the output head, without materializing the full (N, V) logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyunlearn.ops import hopper
from pyunlearn.ops._check import check, check_head, check_targets, ignored, in_one_dtype
from pyunlearn.ops._library import define, define_gradient, kernel_bias
from pyunlearn.ops._passes import (
    Gradients,
    Head,
    Statistics,
    differentiate,
    live_rows,
    real_of,
    resolve_ignored,
    score,
    select_rows,
    zero_ignored_rows,
)
from pyunlearn.ops._plan import Plan, allowance, plan
from pyunlearn.ops._portable import write_rows


def linear_log_likelihood(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    workspace: int | None = None,
) -> Tensor:
    """Compute the log-likelihood of each target token, in nats, from hidden states and the output head.

    With u = logit_scale * (hidden @ weight.T + bias) and z = u, or softcap * tanh(u / softcap),

        log_likelihood[n] = z[n, targets[n]] - log(sum over v of exp(z[n, v])).

    Equivalent to ``-F.cross_entropy(z.float(), targets, reduction="none", ignore_index=ignore_index)``, and
    differentiable in hidden, weight and bias. Rows whose target is ignore_index are dropped before the matrix product
    and are 0 in the result. The statistics are float32 sums over products that were never rounded to 16 bits.

    Args:
        hidden: (..., D), float32, bfloat16, float16 or float64.
        weight: (V, D), on the same device; of different dtypes the wider is used for both.
        targets: (...), int64 token ids in [0, V), or ignore_index.
        ignore_index: target value of the rows to ignore. None: no row is ignored, which saves a synchronization on a
            GPU.
        bias: (V,) or None.
        logit_scale: factor on the logits (Cohere's logit_scale, Granite's 1 / logits_scaling).
        softcap: Gemma 2's final_logit_softcapping, or None.
        workspace: bytes for scratch and cached logits together (default: 256 MiB on the CPU; on a GPU 2 GiB, or half
            of the free memory). Logits that do not fit are recomputed in backward: at most a third more work, and the
            same result.

    Returns:
        (...), float32 (float64 for float64 inputs). On a GPU a target outside [0, V) gives NaN.

    Raises:
        ArgumentError: shapes, dtypes or devices that do not fit; on the CPU a target outside [0, V).

    Example:
        >>> import torch
        >>> hidden, weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.eye(2)  # logits [1, 0] and [0, 1]
        >>> linear_log_likelihood(hidden, weight, torch.tensor([0, -100]))
        tensor([-0.3133,  0.0000])
    """
    check(hidden, targets, name="hidden", softcap=softcap, workspace=workspace)
    check_head(hidden, weight, bias)
    hidden, weight = in_one_dtype(hidden, weight)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    flat, t, ignore = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long(), ignored(ignore_index)
    count, (rows, ignore) = len(t), resolve_ignored(flat, t, len(weight), ignore)
    if rows is not None:
        flat, t = flat.index_select(0, rows), t.index_select(0, rows)
    workspace = allowance(workspace, flat, len(t), len(weight))
    log_likelihood: Tensor = _call(
        flat, weight, bias, t, logit_scale, softcap or 0.0, ignore, workspace, keep, not torch.compiler.is_compiling()
    )
    if rows is not None:
        log_likelihood = write_rows(log_likelihood.new_zeros((count,)), rows, log_likelihood)
    return log_likelihood.reshape(targets.shape)


def _plan(hidden: Tensor, weight: Tensor, workspace: int | None, keep: bool) -> Plan:
    fused = hopper.serves(hidden, weight)
    return plan(hidden.shape[0], weight.shape[0], hidden.dtype, hidden.device, workspace, keep, fused)


def _cached_buffers(hidden: Tensor, p: Plan) -> list[Tensor]:
    """Allocate one flat (N, columns) buffer per cached group; ignored rows leave its end unused."""
    return [hidden.new_empty((hidden.shape[0] * p.row_length(first, end),)) for first, end in p.groups()[: p.cached]]


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, logit_scale: float, softcap: float,
    ignore_index: int, workspace: int | None, keep: bool, release: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    check_targets(targets, weight.shape[0], ignore_index)
    real, p = real_of(hidden), _plan(hidden, weight, workspace, keep)
    rows = live_rows(targets, ignore_index)
    h, t = select_rows(rows, zero_ignored_rows(hidden, targets, rows, ignore_index), targets)
    cached = _cached_buffers(hidden, p)
    block_maximum = hidden.new_empty((p.blocks if keep else 0, hidden.shape[0]), dtype=real)
    head = Head(weight, kernel_bias(hidden, bias), logit_scale, softcap)
    statistics = score(h, head, t, p, cached, block_maximum if keep else None)
    if rows is not None:
        per_row = (write_rows(hidden.new_zeros(targets.shape, dtype=real), rows, x) for x in statistics)
        statistics = Statistics(*per_row)
    elif targets.is_cuda:
        log_likelihood = torch.where(targets == ignore_index, 0.0, statistics.log_likelihood)
        statistics = statistics._replace(log_likelihood=log_likelihood)
    return *statistics, block_maximum, cached


def _fake_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, logit_scale: float, softcap: float,
    ignore_index: int, workspace: int | None, keep: bool, release: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    real, p = real_of(hidden), _plan(hidden, weight, workspace, keep)
    block_maximum = hidden.new_empty((p.blocks if keep else 0, hidden.shape[0]), dtype=real)
    per_row = hidden.new_empty(targets.shape, dtype=real)
    return per_row, torch.empty_like(per_row), torch.empty_like(per_row), block_maximum, _cached_buffers(hidden, p)


def _backward(
    d_log_likelihood: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
    log_likelihood: Tensor, maximum: Tensor, total: Tensor, block_maximum: Tensor, cached: list[Tensor],
    logit_scale: float, softcap: float, ignore_index: int, workspace: int | None, release: bool, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    real, p = real_of(hidden), _plan(hidden, weight, workspace, True)
    rows = live_rows(targets, ignore_index)
    hidden = zero_ignored_rows(hidden, targets, rows, ignore_index)
    if rows is None and targets.is_cuda:
        d_log_likelihood = torch.where(targets == ignore_index, 0.0, d_log_likelihood)
    h, t, *per_row, c = select_rows(rows, hidden, targets, log_likelihood, maximum, total, d_log_likelihood.to(real))
    n = h.shape[0]
    # buffers that an earlier backward pass of the graph released are recomputed; .data: they have no version counter
    live = [k.data if k.untyped_storage().size() > 0 or k.numel() == 0 else None for k in cached]
    need_hidden, need_weight, need_bias = needs
    new = torch.empty if n else torch.zeros
    into = Gradients(
        need_hidden,
        new(weight.shape, dtype=weight.dtype, device=weight.device) if need_weight else None,
        new(bias.shape, dtype=real, device=bias.device) if need_bias and bias is not None else None,
    )
    head = Head(weight, kernel_bias(hidden, bias), logit_scale, softcap)
    d_hidden = differentiate(
        h, head, t, p, Statistics(*per_row), c, live, block_maximum, into, in_place=release, release=release
    )  # fmt: skip
    nothing = hidden.new_empty((0,))
    if d_hidden is None:
        d_hidden = nothing
    elif rows is not None:
        d_hidden = write_rows(hidden.new_zeros(hidden.shape), rows, d_hidden)
    d_weight = weight.new_empty((0,)) if into.weight is None else into.weight
    if bias is None:
        return d_hidden, d_weight, nothing.to(real)
    return d_hidden, d_weight, bias.new_empty((0,)) if into.bias is None else into.bias.to(bias.dtype)


def _fake_backward(
    d_log_likelihood: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
    log_likelihood: Tensor, maximum: Tensor, total: Tensor, block_maximum: Tensor, cached: list[Tensor],
    logit_scale: float, softcap: float, ignore_index: int, workspace: int | None, release: bool, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape if needs[1] else (0,)),
        hidden.new_empty((0,), dtype=real_of(hidden))
        if bias is None
        else bias.new_empty(bias.shape if needs[2] else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, *rest = inputs
    *options, _keep, release = rest
    ctx.options = (*options, release)
    *per_row, cached = output
    ctx.save_for_backward(hidden, weight, bias, targets, *per_row, *cached)
    ctx.mark_non_differentiable(*per_row[1:], *cached)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, d_log_likelihood: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    if d_log_likelihood is None or not any(needs):
        return (None,) * 10
    saved = ctx.saved_tensors
    gradients = _call_backward(d_log_likelihood, *saved[:8], list(saved[8:]), *ctx.options, needs)
    return (*(d if need else None for d, need in zip(gradients, needs, strict=True)), *(None,) * 7)


define(
    "linear_log_likelihood(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float logit_scale, "
    "float softcap, int ignore_index, int? workspace, bool keep, bool release) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor[])",
    _forward,
    _fake_forward,
)
_call_backward = define(
    "linear_log_likelihood_backward(Tensor d_log_likelihood, Tensor hidden, Tensor weight, Tensor? bias, "
    "Tensor targets, Tensor log_likelihood, Tensor maximum, Tensor total, Tensor block_maximum, Tensor[] cached, "
    "float logit_scale, float softcap, int ignore_index, int? workspace, bool release, bool[] needs) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
_call = define_gradient("linear_log_likelihood", _forward, _autograd, _setup_context)
