"""Calls of the kernels for compute capability 9.0 (H100, H200), which fuse the product with its row statistics.

Logits stay in registers. Contracts in csrc/hopper.h and csrc/kept_backward.h; dispatch.py decides when they run.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pyunlearn.ops import _backend
from pyunlearn.ops._kernels import DTYPES
from pyunlearn.ops._plan import Plan
from pyunlearn.ops._products import add_product, column_sums, product, without_idle
from pyunlearn.ops._types import Gradients, Head, Statistics

# ---------------------------------------------------------------- the passes of _passes.py and token_statistics.py


def score(h: Tensor, head: Head, targets: Tensor, cached: list[Tensor], factor: Tensor | None) -> tuple[Tensor, ...]:
    """Compute log-likelihood, maximum and total (n,) of rows h (n, D).

    cached: empty, or one flat buffer that receives the exponentials; their factors go into the first row of `factor`.
    """
    log_likelihood, maximum, total = h.new_empty((3, h.shape[0]), dtype=torch.float32)
    inputs, statistics = _input(h, head, targets), (log_likelihood, maximum, total)
    if cached:
        assert factor is not None
        exponentials = _rows_of(cached[0], h, head)
        cache = (exponentials, exponentials.stride(0), factor[0])
        _run("hopper_statistics_kept", *inputs, *statistics, *cache, _workspace(h))
    else:
        _run("hopper_statistics", *inputs, *statistics, None, None, None, None, _workspace(h))
    return statistics


def token_statistics(
    h: Tensor, head: Head, targets: Tensor, threshold: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute log-likelihood, rank, entropy and variance (n,) of rows h (n, D).

    The rank is the number of logits above the threshold (n,), by default the target's logit.
    """
    log_likelihood, maximum, total, entropy, variance = h.new_empty((5, h.shape[0]), dtype=torch.float32)
    rank = torch.empty_like(targets)
    statistics = (log_likelihood, maximum, total, entropy, variance, rank)
    _run("hopper_statistics", *_input(h, head, targets), *statistics, threshold, _workspace(h))
    return log_likelihood, rank, entropy, variance


def differentiate(
    h: Tensor, head: Head, targets: Tensor, p: Plan, statistics: Statistics, coefficients: Tensor,
    cached: list[Tensor | None], factor: Tensor, into: Gradients, *, release: bool,
) -> Tensor | None:  # fmt: skip
    """Compute _passes.differentiate from the cached exponentials, or from logits recomputed in vocabulary slices."""
    if h.shape[0] == 0:
        return torch.empty_like(h) if into.hidden else None
    exponentials = cached[0] if cached else None
    if exponentials is None:
        return _from_logits(h, head, targets, p, statistics, coefficients, into)
    d_hidden = _from_cached(h, head, _rows_of(exponentials, h, head), coefficients, factor[0], into)
    if release:
        exponentials.untyped_storage().resize_(0)
    return d_hidden


def _from_cached(
    h: Tensor, head: Head, exponentials: Tensor, coefficients: Tensor, factor: Tensor, into: Gradients
) -> Tensor | None:
    def scale(x: Tensor, out: Tensor) -> Tensor:
        """Write the rows (n, ...) of x, each times its factor of the exponentials' gradient, to out."""
        _run("kept_scale_rows", *x.shape, head.logit_scale, coefficients, factor, *_matrix(x), *_matrix(out))
        return out

    multiply = add_product if into.add else product
    if into.weight is not None:
        multiply(into.weight, exponentials.T, scale(h, torch.empty_like(h)))
    if into.bias is not None:
        ones = h.new_ones((h.shape[0], 1))
        multiply(into.bias[:, None], exponentials.T, scale(ones, ones))
    if not into.hidden:
        return None
    d_hidden = h.new_empty(h.shape, dtype=torch.float32)
    product(d_hidden, exponentials, head.weight)
    return scale(d_hidden, torch.empty_like(h))


def _from_logits(
    h: Tensor, head: Head, targets: Tensor, p: Plan, statistics: Statistics, coefficients: Tensor, into: Gradients
) -> Tensor | None:
    n, live = h.shape[0], without_idle(h, coefficients)
    buffer = h.new_empty((n * p.row_length(0, p.group),))
    per_row = (coefficients, *statistics)
    d_hidden = h.new_zeros(h.shape, dtype=torch.float32) if into.hidden else None
    for first, end in p.groups():
        length = p.row_length(first, end)
        d_logits = buffer[: n * length].view(n, length)[:, : end - first]  # (n, slice columns)
        bias = None if head.bias is None else head.bias[first:end]
        part = head._replace(weight=head.weight[first:end], bias=bias)
        _run("hopper_gradient", *_input(h, part, targets), first, *per_row, d_logits, length)
        if into.weight is not None:
            (add_product if into.add else product)(into.weight[first:end], d_logits.T, live)
        if into.bias is not None:
            d_bias = column_sums(d_logits, into.bias.dtype)
            into.bias[first:end] = into.bias[first:end] + d_bias if into.add else d_bias
        if d_hidden is not None:
            add_product(d_hidden, d_logits, part.weight)
    return None if d_hidden is None else d_hidden.to(h.dtype)


# ---------------------------------------------------------------- calls


def _run(kernel: str, *arguments: Any) -> None:
    """Call a kernel on the current stream of the first tensor's GPU; tensors become addresses."""
    x = next(a for a in arguments if isinstance(a, Tensor))
    plain = [a.data_ptr() if isinstance(a, Tensor) else 0 if a is None else a for a in arguments]
    with _device_of(x):
        stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else 0
        getattr(_backend.extension(), kernel)(*plain, stream)


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    """Make the device of x the current one: the autograd thread may have another, and GPUs differ in size."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _input(h: Tensor, head: Head, targets: Tensor) -> tuple[Any, ...]:
    """Return the fields of HopperInput in csrc/hopper.h."""
    h, weight, bias = _aligned(h), _aligned(head.weight), head.bias
    if bias is not None and bias.dtype not in (torch.float32, weight.dtype):
        bias = bias.float()
    sizes = (*h.shape, weight.shape[0], h.stride(0), weight.stride(0))
    bias_type = 0 if bias is None else DTYPES[bias.dtype]
    return (h, weight, DTYPES[h.dtype], *sizes, bias, bias_type, head.logit_scale, head.softcap, targets)


def _aligned(x: Tensor) -> Tensor:
    """Return x, or a copy where its memory is not aligned to 16 bytes, or one row is expanded to several."""
    apart = x.stride(0) % 8 == 0 and x.stride(0) >= x.shape[1]
    return x if x.data_ptr() % 16 == 0 and apart else x.clone(memory_format=torch.contiguous_format)


def _rows_of(cached: Tensor, h: Tensor, head: Head) -> Tensor:
    """View a flat buffer as (n, V) with rows aligned to 16 bytes."""
    n, vocabulary = h.shape[0], head.weight.shape[0]
    length = -(-vocabulary // 8) * 8
    return cached[: n * length].view(n, length)[:, :vocabulary]


def _matrix(x: Tensor) -> tuple[Any, ...]:
    return x, DTYPES[x.dtype], x.stride(0)


def _workspace(h: Tensor) -> Tensor:
    with _device_of(h):
        size = _backend.extension().hopper_workspace_bytes(h.shape[0])
    return h.new_empty((size,), dtype=torch.uint8)
