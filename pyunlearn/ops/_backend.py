"""Choice of the implementation of the vocabulary kernels: cuda (C++/CUDA), cpu (C++) or reference (PyTorch).

The choice is made once for the CPU, and once for each GPU. PYUNLEARN_BACKEND overrides it: `reference` runs the
reference everywhere, `cpu` runs the reference for CUDA tensors,
`cuda` raises an error where the CUDA kernels cannot run.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache, partial, wraps
from itertools import product
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from pyunlearn.ops import _kernels, reference

try:
    from pyunlearn import _C  # type: ignore[attr-defined]
except ImportError as error:  # a source tree that was not built, or a platform without a compiler
    _C = None
    _missing = str(error)
    if os.environ.get("PYUNLEARN_BACKEND", "") != "reference":
        warnings.warn(
            f"pyunlearn's compiled kernels are missing ({_missing}); plain PyTorch runs instead, slower. "
            "`pip install .` builds them.",
            stacklevel=2,
        )


Result = TypeVar("Result")


class Choice(NamedTuple):
    """The implementation that runs ("cuda", "cpu" or "reference"), and the reason."""

    kernels: str
    why: str


def build_info() -> dict[str, Any]:
    """Return the compiled extension's build options and the devices that it sees; empty if it is missing."""
    return dict(_C.build_info()) if _C is not None else {}


def extension() -> Any:
    """Return the compiled extension, for kernels that have no counterpart on the other backends."""
    return _C


@cache
def on_cpu() -> Choice:
    """Return the choice for tensors on the CPU. No GPU is touched, except with PYUNLEARN_BACKEND=cuda.

    Raises ValueError for an unknown or impossible PYUNLEARN_BACKEND.
    """
    requested = _requested()
    if requested == "reference":
        return Choice("reference", "PYUNLEARN_BACKEND=reference")
    if _C is None:
        if requested:
            raise ValueError(
                f"PYUNLEARN_BACKEND={requested} needs the compiled extension, which is missing: run `pip install .`"
            )
        return Choice("reference", f"the compiled extension is missing: {_missing}")
    if requested == "cuda":
        on_gpu(torch.cuda.current_device() if torch.cuda.is_available() else 0)
    return Choice("cpu", "compiled kernels found")


@cache
def on_gpu(index: int) -> Choice:
    """Return the choice for tensors on that GPU. The first call tests the kernels. Raises ValueError as `on_cpu`."""
    requested = _requested()
    if requested == "cpu" or (requested != "cuda" and on_cpu().kernels == "reference"):
        return Choice("reference", "PYUNLEARN_BACKEND=cpu" if requested == "cpu" else on_cpu().why)
    problem = _cuda_problem(index)
    if not problem:
        require_no_graph()
        with _disable_current_modes(), torch.cuda.device(index):  # the first use may be inside torch.compile
            problem = _self_test_problem(torch.device("cuda", index))
    if not problem:
        return Choice("cuda", "compiled kernels found")
    if requested == "cuda":
        raise ValueError(f"PYUNLEARN_BACKEND=cuda, but {problem}: fix that, or unset it")
    if torch.cuda.is_available():
        warnings.warn(
            f"pyunlearn's CUDA kernels are not used on cuda:{index}: {problem}. Plain PyTorch runs on the GPU instead.",
            stacklevel=3,
        )
    return Choice("reference", problem)


def require_no_graph() -> None:
    """Raise RuntimeError while a CUDA graph is captured: the self-test at the first use cannot be captured."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "pyunlearn tests its kernels at their first use, which a CUDA graph cannot capture: "
            "call the op once before capturing"
        )


def _requested() -> str:
    requested = os.environ.get("PYUNLEARN_BACKEND", "").strip().lower()
    if requested not in ("", "cuda", "cpu", "reference"):
        raise ValueError(f"PYUNLEARN_BACKEND must be cuda, cpu or reference, got {requested!r}: correct it or unset it")
    return requested


def _cuda_problem(index: int) -> str | None:
    if _C is None:
        return f"the compiled extension is missing: {_missing}"
    info = build_info()
    if not info["cuda_architectures"]:
        return (
            "the extension was built without CUDA, where no GPU or no nvcc was seen "
            "(pip install . -C cmake.define.PYUNLEARN_CUDA=ON builds it)"
        )
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if info["cuda_problem"]:
        return str(info["cuda_problem"])
    oldest = min(int(a.rstrip("af")) for a in info["cuda_architectures"].split())
    major, minor = torch.cuda.get_device_capability(index)
    if major * 10 + minor < oldest:
        return f"the GPU has compute capability {major}.{minor}, and the kernels need {oldest / 10:.1f} or later"
    return None


@torch.no_grad()
def _self_test_problem(device: torch.device) -> str | None:
    """Compare every CUDA kernel with its definition on small blocks; return a sentence on failure.

    Each width selects another kernel: a warp, a small block, a block that holds the row, a block that reads it twice.
    2005, 7003 and 9001 leave rows unaligned.
    """
    generator = torch.Generator().manual_seed(0)
    dtypes = ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3))
    try:
        for (dtype, tolerance), columns in product(dtypes, (1024, 2005, 7003, 9001)):
            x = torch.randn(5, columns, generator=generator).to(device, dtype)
            wide = torch.randn(5, columns + 1, generator=generator).to(device)
            y = wide[:, 1:]  # most of its rows are aligned differently from those of x
            ours, expected = (_self_test(run, x, y) for run in (_C, reference))
            if not torch.allclose(ours, expected, rtol=tolerance, atol=tolerance):
                return "they gave wrong numbers in a self-test on this GPU (please report it, with `pyunlearn info`)"
    except RuntimeError as error:
        return f"they failed on this GPU: {str(error).splitlines()[0]}"
    return None


def _self_test(run: Any, x: Tensor, y: Tensor) -> Tensor:
    """Return the outputs of all kernels of `run` for x and y, in one vector."""
    targets = torch.tensor([0, 1023, 7, 2000, 512], device=x.device)
    coefficients = torch.linspace(-1, 1, 5, device=x.device)

    def on_x(kernel: Callable[..., None]) -> Callable[..., None]:
        return partial(kernel, run, x, 0, None, 0.5, 4.0, targets)

    def on_both(kernel: Callable[..., None]) -> Callable[..., None]:
        return partial(kernel, run, x.float(), y, 0, (None, None), 0.5, 4.0, targets, 1.0)

    maximum, total = torch.full((2, 5), -torch.inf, device=x.device), torch.zeros(2, 5, device=x.device)
    target_logit, block_maximum = torch.zeros(5, device=x.device), torch.empty(5, device=x.device)
    cached, out = torch.empty_like(x), torch.empty_like(x)
    on_x(_kernels.statistics)(maximum[0], total[0], target_logit, cached, block_maximum)
    log_likelihood = (target_logit - maximum[0]) - total[0].log()
    on_x(_kernels.gradient)(False, maximum[0], total[0], log_likelihood, coefficients, block_maximum, out)
    outputs = [maximum[0], total[0], target_logit, cached.flatten().clone(), out.flatten().clone()]
    again, largest, sums = torch.zeros_like(total[0]), torch.full_like(total[0], -torch.inf), torch.zeros_like(total[0])
    on_x(_kernels.statistics)(largest, sums, again)  # without a cache
    on_cached = partial(_kernels.gradient, run, cached, 0, None, 0.5, 4.0, targets)
    on_cached(True, maximum[0], total[0], log_likelihood, coefficients, block_maximum, cached)
    outputs += [largest, sums, again, cached.flatten()]
    moments, rank = torch.zeros(2, 5, device=x.device), torch.zeros(5, dtype=torch.int64, device=x.device)
    on_x(_kernels.token_statistics)(target_logit, maximum[1], total[1], moments, target_logit, rank)
    outputs += [total[1], moments.flatten(), rank, _kernels.target_products(run, x, y.to(x.dtype), targets).flatten()]
    cross = torch.zeros(5, device=x.device)
    tops, totals = torch.full_like(maximum, -torch.inf), torch.zeros_like(total)
    on_both(_kernels.kl_statistics)(tops, totals, cross)
    on_both(_kernels.kl_gradient)(tops, totals, coefficients, out)
    return torch.cat([f.float() for f in (*outputs, totals.flatten(), cross / totals[1], out.flatten())])


def kernels_for(x: Tensor) -> str:
    """Return the implementation for tensors of the device and dtype of x."""
    if x.device.type == "cpu":
        return on_cpu().kernels
    if x.device.type == "cuda" and x.dtype is not torch.float64:
        return on_gpu(x.device.index).kernels
    return "reference"


def bf16_products() -> str | None:
    """Return the instructions of our bfloat16 products on the CPU; unlike build_info(), this touches no GPU."""
    return None if _C is None else _C.bf16_products()


def multiplies_bf16(x: Tensor) -> bool:
    """Return whether our matmul of bfloat16 into float32 supports x's device and dtype: csrc/bf16_products.h."""
    return x.dtype is torch.bfloat16 and kernels_for(x) == "cpu" and bf16_products() is not None


def multiplies_bf16_gradient(out: Tensor, a: Tensor, b: Tensor) -> bool:
    """Return whether our product a @ b, into float32 or bfloat16, serves these operands: csrc/bf16_products.h.

    It repacks b; the whole of b at once if out is bfloat16.
    """
    return (
        a.dtype is b.dtype is torch.bfloat16
        and out.dtype in (torch.bfloat16, torch.float32)
        and kernels_for(a) == "cpu"
        and bf16_products() == "amx_bf16"
        and 1 in a.stride()
        and b.stride(1) == out.stride(1) == 1
        and (out.dtype is torch.float32 or b.numel() <= 1 << 22)
    )


def _chosen(kernel: Callable[..., Result]) -> Callable[..., Result]:
    """Bind a kernel to the implementation that serves its first tensor."""

    @wraps(kernel)
    def call(x: Tensor, *arguments: Any) -> Result:
        return kernel(reference if kernels_for(x) == "reference" else _C, x, *arguments)

    return call


statistics = _chosen(_kernels.statistics)
gradient = _chosen(_kernels.gradient)
token_statistics = _chosen(_kernels.token_statistics)
target_products = _chosen(_kernels.target_products)
kl_statistics = _chosen(_kernels.kl_statistics)
kl_gradient = _chosen(_kernels.kl_gradient)
bf16_product = partial(_kernels.bf16_product, _C)
bf16_gradient = partial(_kernels.bf16_gradient, _C)
