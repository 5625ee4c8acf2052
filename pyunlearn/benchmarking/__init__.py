"""Published benchmarks of unlearning, computed for any model from the benchmark's own files; one benchmark a file."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # loaded at first use: the command line reads the settings without torch
    from pyunlearn.benchmarking.api import bench
    from pyunlearn.benchmarking.config import NAMES, BenchConfig
    from pyunlearn.benchmarking.result import BenchResult, Column

__all__ = ["NAMES", "BenchConfig", "BenchResult", "Column", "bench"]

_HOMES = {
    "api": ("bench",),
    "config": ("NAMES", "BenchConfig"),
    "result": ("BenchResult", "Column"),
}


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
