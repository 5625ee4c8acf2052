"""Matrix products of 16-bit operands with a float32 result.

A log-likelihood is a small difference of large logits: rounding the logits to bfloat16 costs up to 3e-2 nats a token,
and NPO, SimNPO and DPO exponentiate sums of those. So the statistics are computed from products that were never
rounded, by the fastest method of the installed torch; every method below is exact in the operands and accumulates in
float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pyunlearn.ops import _backend

HAS_OUT_DTYPE = hasattr(torch.ops.aten.mm, "dtype") and hasattr(torch.ops.aten.addmm, "dtype")
"""Whether torch (2.8 or later) multiplies 16-bit matrices on a GPU into a float32 result."""


class Logits:
    """The products hidden (n, D) @ weight (V, D).T, block by block, written into the caller's float32 or wider memory.

    Where the operands have to be widened first, hidden is widened once and each slice of the weight into one buffer.
    """

    def __init__(self, hidden: Tensor, real: torch.dtype) -> None:
        self.hidden, self.real = hidden, real
        self.ours = _backend.multiplies_bf16(hidden)
        self.widens = hidden.dtype != real and not self.ours and not (hidden.is_cuda and HAS_OUT_DTYPE)
        self.wide = hidden.to(real) if self.widens else hidden
        self.buffer = hidden.new_empty((0,), dtype=real)

    def into(self, out: Tensor, weight: Tensor) -> None:
        """Write out (n, v) = hidden @ weight.T for v rows of the weight."""
        if self.ours and weight.dtype is self.hidden.dtype:
            _backend.bf16_product(out, self.hidden, weight)
        elif self.widens:
            if self.buffer.numel() < weight.numel():
                self.buffer = self.hidden.new_empty((weight.numel(),), dtype=self.real)
            wide = self.buffer[: weight.numel()].view(weight.shape).copy_(weight)
            with _operands_already_narrow(self.hidden):
                torch.mm(self.wide, wide.T, out=out)
        elif out.dtype == self.hidden.dtype:
            torch.mm(self.hidden, weight.T, out=out)
        else:
            torch.mm(self.hidden, weight.T, out_dtype=out.dtype, out=out)


def without_idle(h: Tensor, coefficients: Tensor) -> Tensor:
    """Zero the rows of h (n, D) whose coefficient is 0: in the weight's gradient 0 * NaN would be NaN for all."""
    return h.masked_fill((coefficients == 0)[:, None], 0)


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute out += a @ b for a gradient; out is float32 for 16-bit operands.

    On a CPU without AMX each bfloat16 product is rounded before it is added. A sum has few products, so its error is
    at most that of the final rounding; float32 copies of both operands are saved.
    """
    if out.dtype is torch.float32 and _backend.multiplies_bf16_gradient(out, a, b):
        _backend.bf16_gradient(out, a, b, True)
    elif a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out)
    elif a.is_cuda and HAS_OUT_DTYPE:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    elif a.device.type == "cpu" and a.dtype is torch.bfloat16:
        out += torch.mm(a, b)
    else:
        with _operands_already_narrow(a):
            torch.addmm(out, a.to(out.dtype), b.to(out.dtype), out=out)


def product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute out = a @ b for a gradient, in the operands' dtype or wider."""
    if _backend.multiplies_bf16_gradient(out, a, b):
        _backend.bf16_gradient(out, a, b, False)
    elif a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda and HAS_OUT_DTYPE:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        add_product(out.zero_(), a, b)


def column_sums(a: Tensor, real: torch.dtype) -> Tensor:
    """Return the sums (v,) over the rows of a (n, v), in `real`.

    On a CPU torch.sum first copies all of a 16-bit matrix to float32. Here a few rows are copied at a time, and stay in
    cache.
    """
    if a.device.type != "cpu" or a.dtype is real:
        return torch.sum(a, dim=0, dtype=real)
    total = a.new_zeros((a.shape[1],), dtype=real)
    for rows in a.split(32):
        total += rows.to(real).sum(0)
    return total


@contextmanager
def _operands_already_narrow(a: Tensor) -> Iterator[None]:
    """Allow float32 products to round operands: lossless where they were bfloat16 (or float16, for TF32) before."""
    if a.is_cuda:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
    elif a.device.type == "cpu" and a.dtype is torch.bfloat16 and _has_fp32_precision():
        matmul: Any = getattr(torch.backends.mkldnn, "matmul")  # noqa: B009, not in the annotations
        before = matmul.fp32_precision
        matmul.fp32_precision = "bf16"
        try:
            yield
        finally:
            matmul.fp32_precision = before
    else:
        yield


def _has_fp32_precision() -> bool:  # torch 2.9 and later; before that the exact float32 product runs
    return hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision")
