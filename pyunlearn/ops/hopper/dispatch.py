"""Decide whether the Hopper kernels run.

They have been tested on an emulator, not on hardware, and a fault in them could hang instead of failing. So on a GPU
that can run them they are first tested in a subprocess (trial.py); where they fail, the portable kernels run.
"""

from __future__ import annotations

import os
import warnings
from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from pyunlearn.ops import _backend
from pyunlearn.ops._products import HAS_OUT_DTYPE
from pyunlearn.ops.hopper import selftest, trial


def serves(hidden: Tensor, weight: Tensor) -> bool:
    """Return whether these kernels accept hidden (N, D) and weight (V, D).

    They need bfloat16 or float16, D a multiple of 8, and rows aligned to 16 bytes. And torch 2.8 or later: before it, a
    product of 16-bit matrices with a float32 result takes float32 copies of both, here of the whole cache.
    """
    return (
        hidden.dtype in (torch.bfloat16, torch.float16)
        and (HAS_OUT_DTYPE or not hidden.is_cuda)
        and weight.dtype is hidden.dtype
        and hidden.shape[1] % 8 == 0
        and hidden.shape[1] <= 1 << 25
        and max(*hidden.shape, *weight.shape) <= 1 << 30
        and weight.stride(1) == 1
        and weight.stride(0) >= weight.shape[1]
        and weight.stride(0) % 8 == 0
        and weight.storage_offset() % 8 == 0
        and run_on(hidden.device)
    )


def run_on(device: torch.device) -> bool:
    """Return whether these kernels run on that device. The first call tests them."""
    if device.type != "cuda" or requested() == "0":
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    return _backend.on_gpu(index).kernels == "cuda" and _usable(index)


def requested() -> str:
    """Return PYUNLEARN_HOPPER: "0" never, "1" after a short self-test in this process, "" after one in a subprocess.

    Raises ValueError for anything else.
    """
    value = os.environ.get("PYUNLEARN_HOPPER", "").strip()
    if value not in ("", "0", "1"):
        raise ValueError(f"PYUNLEARN_HOPPER must be 1 or 0, got {value!r}: correct it or unset it")
    return value


def status() -> str:
    """Return the line of `pyunlearn info` on these kernels."""
    request = requested()
    if not _backend.build_info().get("hopper"):
        return "not built"
    if request == "0":
        return "built, left out (PYUNLEARN_HOPPER=0)"
    return "used" if torch.cuda.is_available() and run_on(torch.device("cuda")) else "built, cannot run here"


@cache
def _usable(index: int) -> bool:
    """Return whether they run on that GPU; no error of the test leaves this function, but one warning."""
    if not _backend.build_info().get("hopper"):
        if torch.cuda.get_device_capability(index) == (9, 0):
            _warn(index, "this build lacks them (CUDA 12.5 or later builds them)")
        return False
    with _disable_current_modes(), torch.cuda.device(index):
        forced, problem = requested() == "1", _backend.extension().hopper_unavailable()
        if problem and not forced:
            return False  # another GPU: no warning
        if not problem:
            _backend.require_no_graph()
            try:
                problem = selftest.compare(torch.device("cuda", index)) if forced else trial.run_trial(index)
            except (RuntimeError, OSError) as error:
                problem = f"they could not be tested: {(str(error).splitlines() or [type(error).__name__])[0]}"
    if problem:
        _warn(index, problem)
    return not problem


def _warn(index: int, problem: str) -> None:
    warnings.warn(
        f"pyunlearn's Hopper kernels are not used on cuda:{index}: {problem}. The portable CUDA kernels run instead. "
        "PYUNLEARN_HOPPER=0 chooses these without a warning, PYUNLEARN_HOPPER=1 tries the others again, for seconds.",
        stacklevel=3,
    )
