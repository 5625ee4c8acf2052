"""Per-token log-likelihoods from logits, for models whose hidden states are not accessible."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyunlearn.ops import _backend
from pyunlearn.ops._check import check, check_bias, check_targets
from pyunlearn.ops._library import define, define_gradient, kernel_bias
from pyunlearn.ops._passes import real_of


def log_likelihood(
    logits: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Compute the log-likelihood of each target token, in nats, from logits.

    log_likelihood[n] = log_softmax(z[n])[targets[n]] with z as in linear_log_likelihood.

    Equivalent to ``-F.cross_entropy(logits.float(), targets, reduction="none", ignore_index=ignore_index)``, with one
    read of the logits, no float32 copy of them, and one write in backward.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64.
        targets: (...), int64 token ids in [0, V), or ignore_index.
        bias, logit_scale, softcap: as in linear_log_likelihood, for logits to which the model has not applied them.
        ignore_index: target value of the rows to ignore.

    Returns:
        (...), float32 (float64 for float64 logits), 0 where ignored. On a GPU a target outside [0, V) gives NaN.

    Raises:
        ArgumentError: shapes, dtypes or devices that do not fit; on the CPU a target outside [0, V).

    Example:
        >>> import torch
        >>> log_likelihood(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, -100]))
        tensor([-0.3133,  0.0000])
    """
    check(logits, targets, name="logits", softcap=softcap, workspace=None)
    check_bias(bias, logits, logits.shape[-1], name="bias")
    flat = logits.reshape(-1, logits.shape[-1])
    if bias is not None and bias.requires_grad:
        flat, bias = flat + bias, None  # rare, so left to autograd
    out: Tensor = _call(flat, bias, targets.reshape(-1).long(), logit_scale, softcap or 0.0, ignore_index)
    return out.reshape(targets.shape)


def rows_contiguous(x: Tensor) -> Tensor:
    """Return x (n, V) with contiguous columns, as the kernels read it."""
    apart = x.shape[0] == 1 or x.stride(0) >= x.shape[1]  # not so for an expanded row
    return x if apart and (x.stride(1) == 1 or x.shape[1] == 1) else x.contiguous()


def _forward(
    logits: Tensor, bias: Tensor | None, targets: Tensor, logit_scale: float, softcap: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    check_targets(targets, logits.shape[1], ignore_index)
    real, n = real_of(logits), logits.shape[0]
    maximum, total = logits.new_full((n,), -torch.inf, dtype=real), logits.new_zeros((n,), dtype=real)
    target_logit = logits.new_full((n,), torch.nan, dtype=real)
    if n:
        x = rows_contiguous(logits)
        _backend.statistics(
            x, 0, kernel_bias(x, bias), logit_scale, softcap, targets.contiguous(), maximum, total, target_logit
        )
    log_likelihood = (target_logit - maximum) - total.log()
    return torch.where(targets == ignore_index, 0.0, log_likelihood), maximum, total


def _fake_forward(
    logits: Tensor, bias: Tensor | None, targets: Tensor, logit_scale: float, softcap: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    per_row = logits.new_empty(targets.shape, dtype=real_of(logits))
    return per_row, torch.empty_like(per_row), torch.empty_like(per_row)


def _backward(
    d_log_likelihood: Tensor, logits: Tensor, bias: Tensor | None, targets: Tensor, log_likelihood: Tensor,
    maximum: Tensor, total: Tensor, logit_scale: float, softcap: float, ignore_index: int,
) -> Tensor:  # fmt: skip
    coefficients = torch.where(targets == ignore_index, 0.0, d_log_likelihood.to(maximum.dtype))
    d_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if logits.shape[0]:
        x = rows_contiguous(logits)
        head = (kernel_bias(x, bias), logit_scale, softcap, targets.contiguous())
        _backend.gradient(x, 0, *head, False, maximum, total, log_likelihood, coefficients, None, d_logits)
    return d_logits


def _fake_backward(
    d_log_likelihood: Tensor, logits: Tensor, bias: Tensor | None, targets: Tensor, log_likelihood: Tensor,
    maximum: Tensor, total: Tensor, logit_scale: float, softcap: float, ignore_index: int,
) -> Tensor:  # fmt: skip
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, bias, targets, *ctx.options = inputs
    ctx.save_for_backward(logits, bias, targets, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, d_log_likelihood: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if d_log_likelihood is None or not ctx.needs_input_grad[0]:
        return (None,) * 6
    return _call_backward(d_log_likelihood, *ctx.saved_tensors, *ctx.options), *(None,) * 5


define(
    "log_likelihood(Tensor logits, Tensor? bias, Tensor targets, float logit_scale, float softcap, int ignore_index) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
_call_backward = define(
    "log_likelihood_backward(Tensor d_log_likelihood, Tensor logits, Tensor? bias, Tensor targets, "
    "Tensor log_likelihood, Tensor maximum, Tensor total, float logit_scale, float softcap, int ignore_index) "
    "-> Tensor",
    _backward,
    _fake_backward,
)
_call = define_gradient("log_likelihood", _forward, _autograd, _setup_context)
