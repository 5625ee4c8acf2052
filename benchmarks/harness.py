"""Timing of contenders in turn, once a round each, so that noise affects all alike."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
import platform
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Contender = Callable[[], Any]


def medians(contenders: dict[str, Contender], rounds: int, device: str) -> dict[str, float]:
    """Return the median milliseconds of each contender, round robin, after two rounds of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for r in range(rounds + 2):
        for name, run in contenders.items():
            if device == "cuda":
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                run()
                end.record()
                torch.cuda.synchronize()
                took = start.elapsed_time(end)
            else:
                began = time.perf_counter()
                run()
                took = (time.perf_counter() - began) * 1e3
            if r >= 2:
                times[name].append(took)
    return {name: statistics.median(t) for name, t in times.items()}


def extra_mib(run: Contender, device: str) -> float:
    """Return the additional peak memory of one call in MiB: allocator statistics on a GPU, resident set on the CPU."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    _give_back_freed_memory()
    before = peak = _resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, _resident())

    thread = threading.Thread(target=watch)
    thread.start()
    run()
    done.set()
    thread.join()
    return (max(peak, _resident()) - before) / 2**20


def _resident() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096


def _give_back_freed_memory() -> None:
    import ctypes

    with contextlib.suppress(OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def environment(device: str) -> dict[str, Any]:
    """Return the device, threads, backend and versions."""
    import pyunlearn
    from pyunlearn.ops import _backend, hopper

    built, on_hopper = _backend.build_info(), device == "cuda" and hopper.run_on(torch.device("cuda"))
    variants = filter(None, (built.get("cpu_variant"), built.get("bf16_products")))
    cpu = f"{_backend.on_cpu().kernels} ({', '.join(variants)})"
    about: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "backend": _gpu_backend(on_hopper) if device == "cuda" else cpu,
        "torch": torch.__version__,
        "pyunlearn": pyunlearn.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    return about | versions("liger-kernel", "cut-cross-entropy", "quack-kernels")


def _gpu_backend(on_hopper: bool) -> str:
    from pyunlearn.ops import _backend

    kernels = _backend.on_gpu(torch.cuda.current_device()).kernels
    return f"{kernels}{' with Hopper kernels' if on_hopper else ''}"


def ceilings(device: str, dtype: torch.dtype) -> dict[str, str]:
    """Measure the device's peak rates: bytes copied (read and written) and operations of a large product, a second."""
    side = 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    c, source = torch.empty_like(a), torch.empty(256 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = medians({"copy": lambda: target.copy_(source), "product": lambda: torch.mm(a, b, out=c)}, 5, device)
    return {
        "copy": f"{2 * source.nbytes / times['copy'] / 1e6:.0f} GB/s",
        f"product, {str(dtype).removeprefix('torch.')}": f"{2 * side**3 / times['product'] / 1e9:.2f} TFLOP/s",
    }


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of the installed ones of these packages."""
    installed = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        flags = next(line for line in lines if line.startswith("flags"))
        return f"{name} ({', '.join(f for f in ('avx2', 'avx512f', 'avx512_bf16', 'amx_bf16') if f in flags)})"
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def save(name: str, result: dict[str, Any]) -> Path:
    """Write one result under benchmarks/results."""
    path = result_path(name, result["environment"])
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def result_path(name: str, about: dict[str, Any], ending: str = "json") -> Path:
    """Return the path of a result, named after device, kernels and date."""
    where = Path(__file__).parent / "results"
    where.mkdir(exist_ok=True)
    device = "".join(c if c.isalnum() else "-" for c in about["device"].split("(")[0].strip().lower())
    kernels = "_hopper" if "Hopper" in about["backend"] else ""
    return where / f"{name}_{device}{kernels}_{about['date']}.{ending}"
