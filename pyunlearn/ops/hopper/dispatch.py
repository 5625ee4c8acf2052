"""Whether the kernels of kernels.py are used.

They have not run on a GPU of ours yet, and a fault in them could hang instead of failing. So a GPU that could run them tries them out first, in a
process of its own (selftest.py), and the portable kernels go on where they do not pass.
"""

from __future__ import annotations

import os
import warnings
from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from pyunlearn.ops import _backend
from pyunlearn.ops.hopper import selftest


def serves(hidden: Tensor, weight: Tensor) -> bool:
    """Whether these kernels take hidden (N, D) and weight (V, D): bfloat16 or float16, D a multiple of 8, rows that begin at 16 bytes."""
    return (
        hidden.dtype in (torch.bfloat16, torch.float16)
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
    """Whether these kernels run on that device. They are tried out when it is asked for the first time."""
    if device.type != "cuda" or wanted() == "0" or not _backend.build_info().get("hopper"):
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    return _backend.on_gpu(index).kernels == "cuda" and _usable(index)


def wanted() -> str:
    """PYUNLEARN_HOPPER: 0, never; 1, after a short self-test in this process; nothing, after their trial. Raises ValueError for anything else."""
    given = os.environ.get("PYUNLEARN_HOPPER", "").strip()
    if given not in ("", "0", "1"):
        raise ValueError(f"PYUNLEARN_HOPPER must be 1 or 0, got {given!r}: correct it or unset it")
    return given


def status() -> str:
    """What `pyunlearn info` says of these kernels."""
    given = wanted()
    if not _backend.build_info().get("hopper"):
        return "not built"
    if given == "0":
        return "built, left out (PYUNLEARN_HOPPER=0)"
    return "used" if torch.cuda.is_available() and run_on(torch.device("cuda")) else "built, cannot run here"


@cache
def _usable(index: int) -> bool:
    with _disable_current_modes(), torch.cuda.device(index):
        named, problem = wanted() == "1", _backend.extension().hopper_unavailable()
        if problem and not named:
            return False  # another GPU, or a build without them: nobody asked
        if not problem and named:
            _backend.require_no_graph()
            problem = selftest.wrong(torch.device("cuda", index))
        elif not problem:
            problem = selftest.failed(index)
    if problem:
        warnings.warn(
            f"pyunlearn's Hopper kernels are not used on cuda:{index}: {problem}. The portable CUDA kernels run instead.",
            stacklevel=2,
        )
    return not problem
