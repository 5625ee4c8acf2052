"""The peak memory of a stretch of work."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from types import TracebackType

import torch


class PeakMemory:
    """Context manager that measures peak memory: `with PeakMemory(device) as peak: ...`, then `peak.bytes`.

    On GPUs these are the bytes of their tensors; on the CPU, under Linux, those of the whole process; else None.

    Args:
        devices: of the model.
    """

    def __init__(self, devices: Collection[torch.device]) -> None:
        self.gpus = sorted({d for d in devices if d.type == "cuda"}, key=str)
        self.known = all(d.type == "cpu" for d in devices)
        self.bytes: int | None = None
        self.status, self.reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __enter__(self) -> PeakMemory:
        for gpu in self.gpus:
            torch.cuda.reset_peak_memory_stats(gpu)
        if self.known:
            try:
                self.reset.write_text("5")  # resets the high-water mark, which else is that of the process's whole life
            except OSError:
                self.known = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.gpus:
            self.bytes = sum(map(torch.cuda.max_memory_allocated, self.gpus))
        elif self.known:
            mark = re.search(r"VmHWM:\s+(\d+) kB", self.status.read_text())
            self.bytes = int(mark[1]) * 1024 if mark else None
