"""pyunlearn info: versions, the backend that runs and why, what was compiled in, the devices."""

from __future__ import annotations

import json
import platform
from typing import Any

from pyunlearn.cli.options import AsJson
from pyunlearn.cli.quiet import terminal


def info(as_json: AsJson = False) -> None:
    """Show which backend runs here, and why: versions, compiled architectures, devices, driver.

    Examples:

    `pyunlearn info`

    `pyunlearn info --json`
    """
    facts = collect()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, ", ".join(value) if isinstance(value, list) else str(value))
    terminal().print(table)


def collect() -> dict[str, Any]:
    """Return what a bug report should hold, name -> value."""
    from importlib.metadata import version

    import torch

    import pyunlearn
    from pyunlearn.ops import _backend, hopper

    cpu, built = _backend.on_cpu(), _backend.build_info()
    gpu = _backend.on_gpu(torch.cuda.current_device() if torch.cuda.is_available() else 0)
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    driver = built.get("cuda_driver")
    return {
        "pyunlearn": pyunlearn.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "backend on the CPU": f"{cpu.kernels} ({built['cpu_variant']} kernels)"
        if cpu.kernels == "cpu"
        else cpu.kernels,
        "bfloat16 products on the CPU": (cpu.kernels == "cpu" and built["bf16_products"]) or "PyTorch's",
        "backend on CUDA": gpu.kernels,
        "why": cpu.why if cpu.why == gpu.why else f"CPU: {cpu.why}; CUDA: {gpu.why}",
        "Hopper kernels": hopper.status(),
        "CPU threads": torch.get_num_threads(),
        "compiled CUDA architectures": built.get("cuda_architectures") or "none",
        "CUDA driver": f"{driver // 1000}.{driver % 1000 // 10}" if driver else "none",
        "CUDA devices": [
            f"{d.name}, compute capability {d.major}.{d.minor}, {d.total_memory >> 20} MiB" for d in devices
        ]
        or "none",
    }
