"""Per-token KL divergence of a model from a reference model, from hidden states and output heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyunlearn.errors import ArgumentError
from pyunlearn.ops import _backend
from pyunlearn.ops._check import check, check_head, check_reference, check_targets, ignored, in_one_dtype
from pyunlearn.ops._library import define, define_gradient, kernel_bias
from pyunlearn.ops._passes import live_rows, real_of, resolve_ignored, select_rows, zero_ignored_rows
from pyunlearn.ops._plan import Plan, allowance, default_workspace, plan
from pyunlearn.ops._portable import write_rows
from pyunlearn.ops._products import Logits, add_product, column_sums, product, without_idle


def kl_divergence(
    hidden: Tensor,
    weight: Tensor,
    reference_hidden: Tensor,
    reference_weight: Tensor | None = None,
    targets: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    reference_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    target_shift: float = 0.0,
    ignore_index: int | None = -100,
    workspace: int | None = None,
) -> Tensor:
    """Compute KL(reference || model) of each token's distribution, in nats, from hidden states and output heads.

    With p = softmax(z) of the model, z as in linear_log_likelihood, and likewise q = softmax(y) of the reference:

        kl[n] = sum over v of q[n, v] (log q[n, v] - log p[n, v])

    Equivalent to ``F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)``. Differentiable in hidden,
    weight and bias; the reference is a constant. Both products are computed block by block, each pair of logits is read
    once, and no (N, V) tensor is materialized unless it fits the workspace.

    `target_shift` s is first subtracted from y[n, targets[n]], so that the reference has partly forgotten the target:
    the loss of UNDIAL (arXiv 2402.10052) up to the entropy of q, which is constant. With s = inf and the model itself
    as reference the gradient is that of CE-U (arXiv 2503.01224). If the reference is the model's own two tensors
    (detached), one product serves both.

    Args:
        hidden: (..., D), float32, bfloat16, float16 or float64.
        weight: (V, D).
        reference_hidden: (..., D'), the same leading shape.
        reference_weight: (V, D'); default: `weight`, as with an adapter on the trunk alone.
        targets: (...), int64 token ids, or ignore_index for rows to ignore; default: none is ignored. Required with
            target_shift.
        bias, reference_bias: (V,) or None; without reference_weight the reference has the model's bias.
        logit_scale, softcap: as in linear_log_likelihood, for both.
        target_shift: subtracted from the target's logit in the reference, 0 or more.
        ignore_index: target value of the rows to ignore, whose result is 0. None: no row is ignored.
        workspace: bytes for scratch and cached logits (default: 256 MiB on the CPU; on a GPU 2 GiB, or half of the free
            memory). Logits that do not fit are recomputed in backward.

    Returns:
        (...), float32 (float64 for float64 inputs), 0 or more up to rounding.

    Raises:
        ArgumentError: shapes, dtypes or devices that do not fit; target_shift without targets.

    Example:
        >>> import torch
        >>> hidden, uniform, weight = torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2), torch.eye(2)
        >>> kl_divergence(hidden, weight, uniform)
        tensor([0.1201])
    """
    t = hidden.new_zeros(hidden.shape[:-1], dtype=torch.int64) if targets is None else targets
    check(hidden, t, name="hidden", softcap=softcap, workspace=workspace)
    check_head(hidden, weight, bias)
    if reference_weight is None:
        reference_weight, reference_bias = weight, bias if reference_bias is None else reference_bias
    check_reference(hidden, weight, reference_hidden, reference_weight, reference_bias)
    if not target_shift >= 0 or (target_shift and targets is None):
        raise ArgumentError(
            f"target_shift must be 0 or more and goes with targets, got {target_shift} and targets={targets}"
        )
    itself = not torch.compiler.is_compiling() and _same(hidden, reference_hidden) and _same(weight, reference_weight)
    hidden, weight = in_one_dtype(hidden, weight)
    own = (hidden.detach(), weight.detach())
    reference = own if itself else in_one_dtype(reference_hidden.detach(), reference_weight.detach())
    if (reference[0].dtype is torch.float64) != (hidden.dtype is torch.float64):
        reference = (reference[0].to(real_of(hidden)), reference[1].to(real_of(hidden)))
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    shape, flat, t = t.shape, hidden.reshape(-1, hidden.shape[-1]), t.reshape(-1).long()
    count, ignore = len(t), ignored(None if targets is None else ignore_index)
    rows, ignore = resolve_ignored(flat, t, len(weight), ignore)
    if rows is not None:
        flat, t = flat.index_select(0, rows), t.index_select(0, rows)
    if itself:
        reference_flat = flat.detach()  # not read: one product serves both
    else:
        reference_flat = reference[0].reshape(-1, reference[0].shape[-1])
        reference_flat = reference_flat if rows is None else reference_flat.index_select(0, rows)
    workspace = allowance(workspace, flat, (1 if itself else 2) * len(t), len(weight))
    kl: Tensor = _call(
        flat, weight, bias, reference_flat, reference[1], None if reference_bias is None else reference_bias.detach(),
        t, logit_scale, softcap or 0.0, target_shift, itself, ignore, workspace, keep,
    )  # fmt: skip
    if rows is not None:
        kl = write_rows(kl.new_zeros((count,)), rows, kl)
    return kl.reshape(shape)


_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor reference_hidden, Tensor reference_weight, "
    "Tensor? reference_bias, Tensor targets, float logit_scale, float softcap, float target_shift, bool itself, "
    "int ignore_index, int? workspace"
)


def _plan(hidden: Tensor, weight: Tensor, workspace: int | None, keep: bool, itself: bool) -> Plan:
    """Return the plan for the rows of both models.

    The cache serves every backward pass, so a group's gradient has memory of its own and does not overwrite it.
    """
    real, device, sides = real_of(hidden), hidden.device, 1 if itself else 2
    allowed = default_workspace(device.type) if workspace is None else workspace  # None: the op was called directly
    p = plan(sides * hidden.shape[0], weight.shape[0], real, device, allowed, False)
    if not keep:
        return p
    rows, groups = max(1, hidden.shape[0]), len(p.groups())
    column, gradient = sides * rows * real.itemsize, rows * hidden.dtype.itemsize * p.group
    if column * weight.shape[0] + gradient <= allowed:
        return p._replace(cached=groups)
    cached = (allowed - column * p.block - gradient) // (column * p.group)
    return p._replace(cached=max(0, min(cached, groups - 1)))


def _same(a: Tensor, b: Tensor) -> bool:
    """Return whether both are views of the same memory with the same shape, strides and dtype."""
    return a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride() and a.data_ptr() == b.data_ptr()


class _Pair:
    """The live rows of both models and their products, block by block; one product if the reference is the model."""

    def __init__(
        self, rows: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None, reference_hidden: Tensor,
        reference_weight: Tensor, reference_bias: Tensor | None, targets: Tensor, itself: bool, p: Plan,
    ) -> None:  # fmt: skip
        self.itself = itself
        self.h, self.targets = select_rows(rows, hidden, targets)
        other = self.h if self.itself else select_rows(rows, reference_hidden)[0]
        self.n, self.real, self.p = self.h.shape[0], real_of(hidden), p
        self.weights = (weight, reference_weight)
        self.biases = (kernel_bias(hidden, bias), kernel_bias(hidden, reference_bias))
        self.logits = (Logits(self.h, self.real), Logits(other, self.real))
        self.scratch: Tensor | None = None

    def products(self, b: int, e: int, into: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute x and y of columns [b, e) into memory (2, n * columns) or larger, or into scratch.

        The memory is (1, ...) where one product serves both.
        """
        if into is None:
            if self.scratch is None:
                self.scratch = self.h.new_empty((1 if self.itself else 2, self.n * self.p.block), dtype=self.real)
            into = self.scratch
        x, y = self.views(b, e, into)
        self.logits[0].into(x, self.weights[0][b:e])
        if not self.itself:
            self.logits[1].into(y, self.weights[1][b:e])
        return x, y

    def views(self, b: int, e: int, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return the views of x and y of columns [b, e) in that memory."""
        x, *y = (m[: self.n * (e - b)].view(self.n, e - b) for m in memory)
        return x, y[0] if y else x

    def biases_of(self, b: int, e: int) -> tuple[Tensor | None, Tensor | None]:
        """Return the biases of the model and the reference for columns [b, e)."""
        own, reference = (None if bias is None else bias[b:e] for bias in self.biases)
        return own, reference


def _cached_blocks(hidden: Tensor, p: Plan, itself: bool) -> list[Tensor]:
    """Allocate the cached logits of each block of columns: (2, N * columns), or (1, ...) if both models share them."""
    spans = [s for g in p.groups()[: p.cached] for s in p.blocks_of(*g)]
    return [
        hidden.new_empty((1 if itself else 2, hidden.shape[0] * (e - b)), dtype=real_of(hidden)) for _, b, e in spans
    ]


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, reference_hidden: Tensor, reference_weight: Tensor,
    reference_bias: Tensor | None, targets: Tensor, logit_scale: float, softcap: float, target_shift: float,
    itself: bool, ignore_index: int, workspace: int | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    check_targets(targets, weight.shape[0], ignore_index)
    p, rows = _plan(hidden, weight, workspace, keep, itself), live_rows(targets, ignore_index)
    hidden, reference_hidden = (zero_ignored_rows(h, targets, rows, ignore_index) for h in (hidden, reference_hidden))
    pair = _Pair(rows, hidden, weight, bias, reference_hidden, reference_weight, reference_bias, targets, itself, p)
    cached = _cached_blocks(hidden, p, itself)
    maximum = hidden.new_full((2, pair.n), -torch.inf, dtype=pair.real)
    total, cross = torch.zeros_like(maximum), hidden.new_zeros((pair.n,), dtype=pair.real)
    for first, end in p.groups() if pair.n else []:
        for i, b, e in p.blocks_of(first, end):
            x, y = pair.products(b, e, cached[i] if i < len(cached) else None)
            _backend.kl_statistics(
                x, y, b, pair.biases_of(b, e), logit_scale, softcap, pair.targets, target_shift, maximum, total, cross
            )  # fmt: skip
    kl = cross / total[1] - total[1].log() + total[0].log()
    if rows is not None:
        kl = write_rows(hidden.new_zeros(targets.shape, dtype=pair.real), rows, kl)
        maximum, total = (
            write_rows(hidden.new_zeros((2, len(targets)), dtype=pair.real), rows, s, dim=1) for s in (maximum, total)
        )
    elif targets.is_cuda:
        kl = torch.where(targets == ignore_index, 0.0, kl)
    return kl, maximum, total, cached


def _backward(
    d_kl: Tensor, maximum: Tensor, total: Tensor, cached: list[Tensor], hidden: Tensor, weight: Tensor,
    bias: Tensor | None, reference_hidden: Tensor, reference_weight: Tensor, reference_bias: Tensor | None,
    targets: Tensor, logit_scale: float, softcap: float, target_shift: float, itself: bool, ignore_index: int,
    workspace: int | None, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    p, rows = _plan(hidden, weight, workspace, True, itself), live_rows(targets, ignore_index)
    hidden, reference_hidden = (zero_ignored_rows(h, targets, rows, ignore_index) for h in (hidden, reference_hidden))
    pair = _Pair(rows, hidden, weight, bias, reference_hidden, reference_weight, reference_bias, targets, itself, p)
    if rows is None and targets.is_cuda:
        d_kl = torch.where(targets == ignore_index, 0.0, d_kl)
    c, tops, totals = select_rows(rows, d_kl.to(pair.real), maximum.T, total.T)
    tops, totals, n = tops.T.contiguous(), totals.T.contiguous(), pair.n
    new, nothing = torch.empty if n else torch.zeros, hidden.new_empty((0,))
    d_h = hidden.new_zeros((n, hidden.shape[1]), dtype=pair.real)
    d_weight = new(weight.shape, dtype=weight.dtype, device=weight.device) if needs[1] else weight.new_empty((0,))
    if bias is None:
        d_bias = nothing.to(pair.real)
    else:
        d_bias = new(bias.shape if needs[2] else (0,), dtype=pair.real, device=bias.device)
    buffer = pair.h.new_empty((n * p.group,))
    h = without_idle(pair.h, c) if needs[1] else pair.h
    for first, end in p.groups() if n else []:
        d_logits = buffer[: n * (end - first)].view(n, end - first)
        for i, b, e in p.blocks_of(first, end):
            if i < len(cached):
                x, y = pair.views(b, e, cached[i])
            else:
                x, y = pair.products(b, e, None)
            _backend.kl_gradient(
                x, y, b, pair.biases_of(b, e), logit_scale, softcap, pair.targets, target_shift, tops, totals, c,
                d_logits[:, b - first : e - first],
            )  # fmt: skip
        if needs[1]:
            product(d_weight[first:end], d_logits.T, h)
        if needs[2]:
            d_bias[first:end] = column_sums(d_logits, pair.real)
        if needs[0]:
            add_product(d_h, d_logits, weight[first:end])
    d_hidden = nothing
    if needs[0]:
        d_hidden = d_h.to(hidden.dtype)
        d_hidden = d_hidden if rows is None else write_rows(hidden.new_zeros(hidden.shape), rows, d_hidden)
    return d_hidden, d_weight, d_bias if bias is None else d_bias.to(bias.dtype)


def _fake_forward(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    *_, targets, _scale, _softcap, _shift, itself, _ignore, workspace, keep = rest
    kl = hidden.new_empty(targets.shape, dtype=real_of(hidden))
    both = hidden.new_empty((2, *targets.shape), dtype=real_of(hidden))
    cached = _cached_blocks(hidden, _plan(hidden, weight, workspace, keep, itself), itself)
    return kl, both, torch.empty_like(both), cached


def _fake_backward(
    d_kl: Tensor, maximum: Tensor, total: Tensor, cached: list[Tensor], hidden: Tensor, weight: Tensor,
    bias: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    needs = rest[-1]
    if bias is None:
        d_bias = hidden.new_empty((0,), dtype=real_of(hidden))
    else:
        d_bias = bias.new_empty(bias.shape if needs[2] else (0,))
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape if needs[1] else (0,)),
        d_bias,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    *tensors, scale, softcap, shift, itself, ignore, workspace, _keep = inputs
    ctx.options = (scale, softcap, shift, itself, ignore, workspace)
    _kl, maximum, total, cached = output
    ctx.save_for_backward(*tensors, maximum, total, *cached)
    ctx.mark_non_differentiable(maximum, total, *cached)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, d_kl: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    if d_kl is None or not any(needs):
        return (None,) * 14
    *tensors, maximum, total = ctx.saved_tensors[:9]
    cached = list(ctx.saved_tensors[9:])
    gradients = _call_backward(d_kl, maximum, total, cached, *tensors, *ctx.options, needs)
    return (*(d if need else None for d, need in zip(gradients, needs, strict=True)), *(None,) * 11)


define(f"kl_divergence({_INPUTS}, bool keep) -> (Tensor, Tensor, Tensor, Tensor[])", _forward, _fake_forward)
_call_backward = define(
    f"kl_divergence_backward(Tensor d_kl, Tensor maximum, Tensor total, Tensor[] cached, {_INPUTS}, bool[] needs) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
_call = define_gradient("kl_divergence", _forward, _autograd, _setup_context)
