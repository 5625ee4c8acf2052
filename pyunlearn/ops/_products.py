"""Matrix products of 16-bit operands with a float32 result.

A log-likelihood is a small difference of large logits: rounding the logits to bfloat16 costs up to 3e-2 nats a token, and NPO, SimNPO
and DPO exponentiate sums of those. So the statistics are taken from products that were never rounded, by the fastest way the
torch at hand has; every way below is exact in the operands and accumulates in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_HAS_OUT_DTYPE = hasattr(torch.ops.aten.mm, "dtype") and hasattr(torch.ops.aten.addmm, "dtype")


def mm_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, where out (n, v) is float32 for 16-bit operands and of the operands' dtype otherwise."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda and _HAS_OUT_DTYPE:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        with _operands_already_narrow(a):
            torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def addmm_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, dtypes as in mm_into."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out)
    elif a.is_cuda and _HAS_OUT_DTYPE:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        with _operands_already_narrow(a):
            torch.addmm(out, a.to(out.dtype), b.to(out.dtype), out=out)


@contextmanager
def _operands_already_narrow(a: Tensor) -> Iterator[None]:
    """Lets float32 products round their operands, which loses nothing where these were bfloat16 (or float16, for TF32) before."""
    if a.is_cuda:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
    elif a.device.type == "cpu" and a.dtype is torch.bfloat16 and _has_fp32_precision():
        matmul = torch.backends.mkldnn.matmul
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
