"""Python signatures of the row kernels: the contracts of csrc/*.h with tensors in place of addresses.

`run` is the implementation, either the compiled extension or the module `reference`. Tensors are not checked here: the
caller has checked and allocated them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyunlearn.ops import reference

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def statistics(
    run: Any, x: Tensor, first: int, bias: Tensor | None, logit_scale: float, softcap: float, targets: Tensor,
    maximum: Tensor, total: Tensor, target_logit: Tensor, cached: Tensor | None = None,
    block_maximum: Tensor | None = None,
) -> None:  # fmt: skip
    """Add the logit block x (n, v) to the running statistics of its rows; formulas in csrc/log_likelihood.h."""
    head = (first, bias, logit_scale, softcap, targets)
    if run is reference:
        reference.statistics(x, *head, maximum, total, target_logit, cached, block_maximum)
    else:
        _call(run.statistics, x, *_block(x, *head), maximum, total, target_logit, *_matrix(cached), block_maximum)


def gradient(
    run: Any, x: Tensor, first: int, bias: Tensor | None, logit_scale: float, softcap: float, targets: Tensor,
    is_cached: bool, maximum: Tensor, total: Tensor, log_likelihood: Tensor, coefficients: Tensor,
    block_maximum: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    """Write into out (n, v) the gradient with respect to a block's raw products; formulas in csrc/log_likelihood.h."""
    head, per_row = (first, bias, logit_scale, softcap, targets), (maximum, total, log_likelihood, coefficients)
    if run is reference:
        reference.gradient(x, *head, is_cached, *per_row, block_maximum, out)
    else:
        _call(run.gradient, x, *_block(x, *head), is_cached, *per_row, block_maximum, *_matrix(out))


def token_statistics(
    run: Any, x: Tensor, first: int, bias: Tensor | None, logit_scale: float, softcap: float, targets: Tensor,
    threshold: Tensor, maximum: Tensor, total: Tensor, moments: Tensor, target_logit: Tensor, rank: Tensor,
) -> None:  # fmt: skip
    """Add the logit block x (n, v) to the running statistics, moments (2, n); formulas in csrc/token_statistics.h."""
    head = (first, bias, logit_scale, softcap, targets)
    if run is reference:
        reference.token_statistics(x, *head, threshold, maximum, total, moments, target_logit, rank)
    else:
        per_row = (threshold, maximum, total, moments[0], moments[1], target_logit, rank)
        _call(run.token_statistics, x, *_block(x, *head), *per_row)


def target_products(run: Any, h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return (2, n) float64: the dot product of each row of h (n, d) with its target's row, and the sum of |terms|.

    Contract in csrc/token_statistics.h.
    """
    if run is reference or weight.stride(1) != 1 or weight.dtype is not h.dtype:
        return reference.target_products(h, weight, targets)
    products = h.new_empty((2, len(h)), dtype=torch.float64)
    sizes = (*h.shape, len(weight), h.stride(0), weight.stride(0))
    _call(run.target_products, h, h, weight, DTYPES[h.dtype], *sizes, targets, *products)
    return products


def kl_statistics(
    run: Any, x: Tensor, y: Tensor, first: int, biases: tuple[Tensor | None, Tensor | None], logit_scale: float,
    softcap: float, targets: Tensor, target_shift: float, maximum: Tensor, total: Tensor, cross: Tensor,
) -> None:  # fmt: skip
    """Add the blocks x of the model and y of the reference, (n, v), to maximum (2, n), total (2, n) and cross (n,).

    Contract in csrc/kl_divergence.h.
    """
    head = (first, biases, logit_scale, softcap, targets, target_shift)
    if run is reference:
        reference.kl_statistics(x, y, *head, maximum, total, cross)
    else:
        _call(run.kl_statistics, x, *_pair(x, y, *head), maximum[0], total[0], maximum[1], total[1], cross)


def kl_gradient(
    run: Any, x: Tensor, y: Tensor, first: int, biases: tuple[Tensor | None, Tensor | None], logit_scale: float,
    softcap: float, targets: Tensor, target_shift: float, maximum: Tensor, total: Tensor, coefficients: Tensor,
    out: Tensor,
) -> None:  # fmt: skip
    """Write into out (n, v) the gradient of sum(coefficients * KL) with respect to the model's raw products.

    Contract in csrc/kl_divergence.h.
    """
    head = (first, biases, logit_scale, softcap, targets, target_shift)
    if run is reference:
        reference.kl_gradient(x, y, *head, maximum, total, coefficients, out)
    else:
        per_row = (maximum[0], total[0], maximum[1], total[1], coefficients)
        _call(run.kl_gradient, x, *_pair(x, y, *head), *per_row, *_matrix(out))


def bf16_product(run: Any, out: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute out (n, v) float32 = a (n, d) @ b (v, d).T of bfloat16 numbers on the CPU; csrc/bf16_products.h."""
    a, b = (x if x.stride(1) == 1 else x.contiguous() for x in (a, b))
    addresses = (a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0), out.data_ptr(), out.stride(0))
    run.bf16_product(*addresses, *out.shape, a.shape[1], torch.get_num_threads())


def bf16_gradient(run: Any, out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """Compute out (v, d) = or += a (v, n) @ b (n, d) of bfloat16 numbers on a CPU with AMX; csrc/bf16_products.h.

    a may be transposed.
    """
    transposed = a.stride(1) != 1
    of_a = (a.data_ptr(), a.stride(1 if transposed else 0), transposed)
    of_out = (out.data_ptr(), out.stride(0), out.dtype is torch.bfloat16, add)
    run.bf16_gradient(*of_a, b.data_ptr(), b.stride(0), *of_out, *out.shape, a.shape[1], torch.get_num_threads())


def _call(kernel: Any, x: Tensor, *arguments: Any) -> None:
    """Call into the extension on the device of x: tensors as addresses, then a stream or a number of threads."""
    plain = [a.data_ptr() if isinstance(a, Tensor) else 0 if a is None else a for a in arguments]
    if x.is_cuda:
        with torch.cuda.device(x.device):  # the autograd thread may have another device current
            kernel(True, *plain, torch.cuda.current_stream().cuda_stream)
    else:
        kernel(False, *plain, torch.get_num_threads())


def _block(
    x: Tensor, first: int, bias: Tensor | None, logit_scale: float, softcap: float, targets: Tensor
) -> tuple[Any, ...]:
    return (
        *_matrix(x),
        *x.shape,
        first,
        bias,
        0 if bias is None else DTYPES[bias.dtype],
        logit_scale,
        softcap,
        targets,
    )


def _pair(
    x: Tensor, y: Tensor, first: int, biases: tuple[Tensor | None, Tensor | None], logit_scale: float, softcap: float,
    targets: Tensor, target_shift: float,
) -> tuple[Any, ...]:  # fmt: skip
    bias = biases[1]
    reference_block = (y, y.stride(0), bias, 0 if bias is None else DTYPES[bias.dtype])
    return (*_block(x, first, biases[0], logit_scale, softcap, targets), *reference_block, target_shift)


def _matrix(x: Tensor | None) -> tuple[Any, ...]:
    return (0, 0, 0) if x is None else (x, DTYPES[x.dtype], x.stride(0))
