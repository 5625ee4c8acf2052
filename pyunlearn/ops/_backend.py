"""Which implementation of the row kernels runs: cuda (C++/CUDA), cpu (C++) or reference (PyTorch). Chosen once.

PYUNLEARN_BACKEND=cuda | cpu | reference overrides the choice: `reference` everywhere, `cpu` keeps CUDA tensors on the reference,
`cuda` insists on the CUDA kernels and is an error where they cannot run.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyunlearn.ops import reference

try:
    from pyunlearn import _C  # type: ignore[attr-defined]
except ImportError as error:  # a source tree that was not built, or a platform without a compiler
    _C = None
    _missing = str(error)
    if os.environ.get("PYUNLEARN_BACKEND", "") != "reference":
        warnings.warn(
            f"pyunlearn's compiled kernels are not here ({_missing}); plain PyTorch runs instead, slower. `pip install .` builds them.",
            stacklevel=2,
        )

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


class Backend(NamedTuple):
    """What runs for CPU tensors and for CUDA tensors ("cpu", "cuda" or "reference"), and why."""

    cpu: str
    cuda: str
    why: str


def build_info() -> dict[str, Any]:
    """What the compiled extension was built with, and what it sees; empty if it is missing."""
    return dict(_C.build_info()) if _C is not None else {}


@cache
def chosen() -> Backend:
    """The backend of this process. Raises ValueError for an unknown or impossible PYUNLEARN_BACKEND."""
    wanted = os.environ.get("PYUNLEARN_BACKEND", "").strip().lower()
    if wanted not in ("", "cuda", "cpu", "reference"):
        raise ValueError(f"PYUNLEARN_BACKEND must be cuda, cpu or reference, got {wanted!r}: correct it or unset it")
    if wanted == "reference":
        return Backend("reference", "reference", "PYUNLEARN_BACKEND=reference")
    if _C is None:
        if wanted:
            raise ValueError(
                f"PYUNLEARN_BACKEND={wanted} needs the compiled extension, which is not here: run `pip install .`"
            )
        return Backend("reference", "reference", f"the compiled extension is missing: {_missing}")
    if wanted == "cpu":
        return Backend("cpu", "reference", "PYUNLEARN_BACKEND=cpu")
    problem = _cuda_problem() or _wrong_on_this_card()
    if wanted == "cuda" and problem:
        raise ValueError(f"PYUNLEARN_BACKEND=cuda, but {problem}: mend that, or unset it")
    if problem:
        if torch.cuda.is_available():
            warnings.warn(
                f"pyunlearn's CUDA kernels are not used: {problem}. Plain PyTorch runs on the card instead.",
                stacklevel=3,
            )
        return Backend("cpu", "reference", problem)
    return Backend("cpu", "cuda", "compiled kernels found for both")


def _cuda_problem() -> str | None:
    info = build_info()
    if not info.get("cuda_architectures"):
        return "the extension was built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if info["cuda_problem"]:
        return str(info["cuda_problem"])
    oldest = min(int(a) for a in info["cuda_architectures"].split())
    major, minor = torch.cuda.get_device_capability()
    if major * 10 + minor < oldest:
        return f"the card has compute capability {major}.{minor}, and the kernels need {oldest / 10:.1f} or later"
    return None


@torch.no_grad()
def _wrong_on_this_card() -> str | None:
    """Runs both CUDA kernels once on a small block and compares them with the definition: a wrong number must not pass silently."""
    generator = torch.Generator().manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        x = torch.randn(5, 1024, generator=generator).to("cuda", dtype)
        targets = torch.tensor([0, 1023, 7, 2000, 512], device="cuda")
        coefficients = torch.linspace(-1, 1, 5, device="cuda")
        found = []
        for run in (_C, reference):
            maximum, total = torch.full((5,), -torch.inf, device="cuda"), torch.zeros(5, device="cuda")
            target_logit, block_maximum = torch.zeros(5, device="cuda"), torch.empty(5, device="cuda")
            kept, out = torch.empty_like(x), torch.empty_like(x)
            try:
                begin = (x, 0, None, 0.5, 4.0, targets)
                _call(run, "statistics", *begin, maximum, total, target_logit, kept, block_maximum)
                found_ll = (target_logit - maximum) - total.log()
                _call(run, "gradient", *begin, False, maximum, total, found_ll, coefficients, block_maximum, out)
            except RuntimeError as error:
                return f"they failed on this card: {str(error).splitlines()[0]}"
            found.append(torch.cat([maximum, total, target_logit, kept.float().flatten(), out.float().flatten()]))
        if not torch.allclose(found[0], found[1], rtol=tolerance, atol=tolerance):
            return "they gave wrong numbers in a self-test on this card (please report it, with `pyunlearn info`)"
    return None


def kernels_for(x: Tensor) -> str:
    """The backend that serves tensors on this device and of this dtype."""
    if x.device.type == "cpu":
        return chosen().cpu
    if x.device.type == "cuda" and x.dtype is not torch.float64:
        return chosen().cuda
    return "reference"


def statistics(
    x: Tensor, first: int, bias: Tensor | None, logit_scale: float, softcap: float, targets: Tensor,
    maximum: Tensor, total: Tensor, target_logit: Tensor, kept: Tensor | None = None, block_maximum: Tensor | None = None,
) -> None:  # fmt: skip
    """Adds the logit block x (n, v) to the running statistics of its rows; formulas in csrc/log_likelihood.h."""
    run = reference if kernels_for(x) == "reference" else _C
    _call(
        run,
        "statistics",
        x,
        first,
        bias,
        logit_scale,
        softcap,
        targets,
        maximum,
        total,
        target_logit,
        kept,
        block_maximum,
    )


def gradient(
    x: Tensor, first: int, bias: Tensor | None, logit_scale: float, softcap: float, targets: Tensor, is_kept: bool,
    maximum: Tensor, total: Tensor, log_likelihood: Tensor, coefficients: Tensor, block_maximum: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    """Writes into out (n, v) the gradient with respect to a block's raw products; formulas in csrc/log_likelihood.h."""
    run = reference if kernels_for(x) == "reference" else _C
    _call(
        run,
        "gradient",
        x,
        first,
        bias,
        logit_scale,
        softcap,
        targets,
        is_kept,
        maximum,
        total,
        log_likelihood,
        coefficients,
        block_maximum,
        out,
    )


def _call(
    run: Any,
    kernel: str,
    x: Tensor,
    first: int,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    targets: Tensor,
    *rest: Any,
) -> None:
    """The kernel of `run` (the extension or the reference); the extension gets addresses, sizes and where to run."""
    if run is reference:
        getattr(reference, kernel)(x, first, bias, scale, softcap, targets, *rest)
        return
    bias_at = (0, 0) if bias is None else (bias.data_ptr(), DTYPES[bias.dtype])
    block = (x.data_ptr(), DTYPES[x.dtype], x.stride(0), *x.shape, first, *bias_at, scale, softcap, targets.data_ptr())
    if x.is_cuda:
        with torch.cuda.device(x.device):  # the autograd thread may stand on another device
            stream = torch.cuda.current_stream().cuda_stream
            _launch(kernel, True, block, rest, stream)
        return
    _launch(kernel, False, block, rest, torch.get_num_threads())


def _launch(kernel: str, cuda: bool, block: tuple[Any, ...], rest: tuple[Any, ...], where: int) -> None:
    if kernel == "statistics":
        maximum, total, target_logit, kept, block_maximum = rest
        per_row = (maximum.data_ptr(), total.data_ptr(), target_logit.data_ptr())
        _C.statistics(cuda, *block, *per_row, *_matrix(kept), _address(block_maximum), where)
    else:
        is_kept, maximum, total, log_likelihood, coefficients, block_maximum, out = rest
        given = (maximum.data_ptr(), total.data_ptr(), log_likelihood.data_ptr(), coefficients.data_ptr())
        _C.gradient(cuda, *block, is_kept, *given, _address(block_maximum), *_matrix(out), where)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _matrix(x: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if x is None else (x.data_ptr(), DTYPES[x.dtype], x.stride(0))
