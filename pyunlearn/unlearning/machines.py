"""Machines on which a run can be planned: this one, a GPU that is known by name, or a number of GB."""

from __future__ import annotations

import math
import os
import re
import time
from pathlib import Path
from typing import NamedTuple

import torch

from pyunlearn.errors import ArgumentError
from pyunlearn.models.devices import default_device

GB = 10**9
_MIB = 1 << 20
CONTEXT = 700 * 10**6
"""Bytes of GPU memory that the driver, cuBLAS and gaps between tensors take: an assumption."""
LIBRARIES = 500 * 10**6
"""Bytes of main memory that Python and its libraries take: about what they took in docs/large-models.md."""
UTILIZATION = 0.35
"""Share of a GPU's peak that a run is assumed to reach."""
CPU_UTILIZATION = 0.5
"""Share of the speed of one large matrix product that a run reaches on a CPU, see docs/large-models.md."""

_SECONDS = 0.3  # to measure a matrix product


class Gpu(NamedTuple):
    """GPU by name."""

    mib: int
    """Memory that its driver reports."""
    teraflops: float
    """Dense 16-bit products with a float32 sum, of the data sheet."""
    bfloat16: bool = True
    """Whether it multiplies bfloat16 at that speed."""


GPUS = {
    "A100-40": Gpu(40960, 312),
    "A100-80": Gpu(81920, 312),
    "H100-80": Gpu(81559, 989),
    "H200-141": Gpu(143771, 989),
    "L4-24": Gpu(23034, 121),
    "L40S-48": Gpu(46068, 362),
    "A10-24": Gpu(23028, 125),
    "RTX4090-24": Gpu(24564, 165),
    "RTX3090-24": Gpu(24576, 71),
    "T4-16": Gpu(15360, 65, bfloat16=False),
}


class Machine(NamedTuple):
    """Memory and speed of the machine that a run is planned for."""

    name: str
    device: str
    """Type of the device that trains: cpu or cuda."""
    memory: int | None
    """Bytes of the device's memory that are free; None where that is unknown."""
    main: int | None = None
    """Bytes of main memory that are free, for what a GPU does not hold; None where that is unknown."""
    bfloat16: bool = True
    """Whether it computes in bfloat16."""
    rate: float | None = None
    """Floating-point operations a second of a named GPU; None: measured here, or unknown."""
    here: bool = False
    """True for this machine."""


def machine_of(gpu: str | float | None) -> Machine:
    """Return the machine of that name, or this one.

    Args:
        gpu: a name in `GPUS` (H100 where there is one H100), GB of GPU memory, or None for this machine.

    Raises:
        ArgumentError: an unknown name, or a number that is not above 0.

    >>> machine_of("h100").name, machine_of(24).memory
    ('H100-80', 24000000000)
    """
    if gpu is None:
        return _this_machine()
    size = _number(gpu)
    if size is not None:
        return Machine(f"a GPU with {size:g} GB", "cuda", int(size * GB))
    wanted = _plain(str(gpu))
    matches = [name for name in GPUS if wanted in (_plain(name), _plain(name.partition("-")[0]))]
    if len(matches) != 1:
        raise ArgumentError(f"gpu must be one of {', '.join(matches or GPUS)}, or a number of GB, got {gpu!r}")
    facts = GPUS[matches[0]]
    rate = facts.teraflops * 1e12 * UTILIZATION
    return Machine(matches[0], "cuda", facts.mib * _MIB, bfloat16=facts.bfloat16, rate=rate)


def _number(gpu: str | float) -> float | None:
    """Return a number of GB, or None for a name. Raises ArgumentError where it is not above 0."""
    try:
        size = float(str(gpu).lower().removesuffix("gb"))
    except ValueError:
        return None
    if isinstance(gpu, bool) or not (size > 0 and math.isfinite(size * GB)):
        raise ArgumentError(f"gpu must be the name of a GPU or a number of GB above 0, got {gpu!r}")
    return size


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|rtx|tesla|gb$|[\s_-]", "", name.lower())


def _this_machine() -> Machine:
    device = default_device()
    if device.type == "cuda":
        free, bfloat16 = torch.cuda.mem_get_info(device)[0], torch.cuda.is_bf16_supported(including_emulation=False)
        return Machine(torch.cuda.get_device_name(device), "cuda", free, main_memory(), bfloat16, here=True)
    return Machine("this machine", "cpu", main_memory(), here=True)


def main_memory() -> int | None:
    """Return the bytes of main memory that a new process can take, or None where the system does not say."""
    sizes = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        pass
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            sizes.append(int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    if not sizes and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(sizes)) if sizes else None


def measured_rate(rows: int, width: int, dtype: torch.dtype) -> float:
    """Return the floating-point operations a second of a matrix product on this machine, in about 0.3 s.

    Args:
        rows: token ids of a pass.
        width: of the model's hidden states.
        dtype: of the weights.
    """
    device = default_device()
    x = torch.randn(min(rows, 1024), width, device=device).to(dtype)
    weight = torch.randn(4 * width, width, device=device).to(dtype)
    best, began = math.inf, time.perf_counter()
    while time.perf_counter() - began < _SECONDS:
        start = time.perf_counter()
        float((x @ weight.T)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2.0 * x.shape[0] * width * 4 * width / best
