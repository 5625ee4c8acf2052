"""Timing of contenders in turn, once a round each, so that noise affects all alike."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
import math
import platform
import statistics
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

Contender = Callable[[], Any]
RESULTS = Path(__file__).parent / "results"
QUEUE_MS = 2.0
"""The GPU is busy for so long, at least, before a queued sample, and a sample takes at least as long."""
MOST_CALLS = 20
LONGEST_SLEEP_MS = 40.0


class Timing(NamedTuple):
    """Median milliseconds of one call: on a GPU queued behind other work, and from an idle GPU (None on the CPU)."""

    ms: float
    from_idle: float | None = None


def medians(contenders: dict[str, Contender], rounds: int, device: str) -> dict[str, Timing]:
    """Return the median times of each contender, round robin, after two rounds of warm-up.

    On a GPU each round takes two samples of a contender. *From idle*: one call, which finds the GPU idle, so that the
    host's time until its first kernel counts. *Queued*: the GPU is busy until the host has issued the calls, so that
    the kernels' own time is left; several calls where one takes less than 2 ms. A call that waits for the GPU itself
    cannot be queued, and its host time counts in both.
    """
    times: dict[str, list[Timing]] = {name: [] for name in contenders}
    for r in range(rounds + 2):
        for name, run in contenders.items():
            took = _on_gpu(run) if device == "cuda" else _on_cpu(run)
            if r >= 2:
                times[name].append(took)
    return {name: _median(samples) for name, samples in times.items()}


def _median(samples: list[Timing]) -> Timing:
    idle = [s.from_idle for s in samples if s.from_idle is not None]
    return Timing(statistics.median(s.ms for s in samples), statistics.median(idle) if idle else None)


def _on_cpu(run: Contender) -> Timing:
    began = time.perf_counter()
    run()
    return Timing((time.perf_counter() - began) * 1e3)


def _on_gpu(run: Contender) -> Timing:
    torch.cuda.synchronize()
    idle, host = _between_events(run, 1)
    calls = min(MOST_CALLS, max(1, math.ceil(QUEUE_MS / max(idle, 1e-3))))
    sleep = min(LONGEST_SLEEP_MS, max(QUEUE_MS, 2 * calls * host))
    torch.cuda._sleep(int(sleep * _cycles_per_ms()))
    return Timing(_between_events(run, calls)[0] / calls, idle)


def _between_events(run: Contender, calls: int) -> tuple[float, float]:
    """Return the milliseconds that the calls take on the GPU, and those that the host takes to issue them."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    began = time.perf_counter()
    for _ in range(calls):
        run()
    issued = (time.perf_counter() - began) * 1e3
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end), issued


@cache
def _cycles_per_ms() -> float:
    """Return how many cycles torch.cuda._sleep waits in a millisecond, by measurement."""
    cycles = 2_000_000
    torch.cuda._sleep(cycles)
    return cycles / _between_events(lambda: torch.cuda._sleep(cycles), 1)[0]


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
        "copy": f"{2 * source.nbytes / times['copy'].ms / 1e6:.0f} GB/s",
        f"product, {str(dtype).removeprefix('torch.')}": f"{2 * side**3 / times['product'].ms / 1e9:.2f} TFLOP/s",
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


def save(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write one result into a folder, benchmarks/results by default."""
    path = result_path(name, result["environment"], folder=folder)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def result_path(name: str, about: dict[str, Any], ending: str = "json", folder: Path = RESULTS) -> Path:
    """Return the path of a result, named after device, kernels and date."""
    folder.mkdir(exist_ok=True)
    device = "".join(c if c.isalnum() else "-" for c in about["device"].split("(")[0].strip().lower())
    kernels = "_hopper" if "Hopper" in about["backend"] else ""
    return folder / f"{name}_{device}{kernels}_{about['date']}.{ending}"
