"""Methods at equal utility: each starts from the same weights and is mixed with the original before it is measured."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # loaded at first use: the command line reads CompareConfig without torch
    from pyunlearn.comparing.api import compare
    from pyunlearn.comparing.config import UTILITY_METRICS, CompareConfig
    from pyunlearn.comparing.plots import comparison_plot, comparison_table, require_plot_package
    from pyunlearn.comparing.result import Comparison, Measurement, Row

__all__ = [
    "UTILITY_METRICS",
    "CompareConfig",
    "Comparison",
    "Measurement",
    "Row",
    "compare",
    "comparison_plot",
    "comparison_table",
    "require_plot_package",
]

_HOMES = {
    "api": ("compare",),
    "config": ("UTILITY_METRICS", "CompareConfig"),
    "plots": ("comparison_plot", "comparison_table", "require_plot_package"),
    "result": ("Comparison", "Measurement", "Row"),
}


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
