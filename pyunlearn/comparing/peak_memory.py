"""The peak memory of a stretch of work."""

from __future__ import annotations

import re
from pathlib import Path
from types import TracebackType

import torch


class PeakMemory:
    """Context manager that measures peak memory: `with PeakMemory(device) as peak: ...`, then `peak.bytes`.

    On a GPU these are the bytes of its tensors; on the CPU, under Linux, those of the whole process; else None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None
        self.status, self.reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def __enter__(self) -> PeakMemory:
        self.known = True
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return self
        try:
            self.reset.write_text("5")  # resets the high-water mark, which else is that of the process's whole life
        except OSError:
            self.known = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif self.known:
            mark = re.search(r"VmHWM:\s+(\d+) kB", self.status.read_text())
            self.bytes = int(mark[1]) * 1024 if mark else None
