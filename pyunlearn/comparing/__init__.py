"""Methods side by side: each from the same weights, brought to equal utility by mixing, then measured."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported at first use: the command line prints its help without torch
    from pyunlearn.comparing.api import compare
    from pyunlearn.comparing.measurement import UTILITY_METRICS
    from pyunlearn.comparing.plots import comparison_plot, comparison_table, require_plot_package
    from pyunlearn.comparing.result import Comparison, Row, Standing

__all__ = [
    "UTILITY_METRICS",
    "Comparison",
    "Row",
    "Standing",
    "compare",
    "comparison_plot",
    "comparison_table",
    "require_plot_package",
]

_HOMES = {
    "api": ("compare",),
    "measurement": ("UTILITY_METRICS",),
    "plots": ("comparison_plot", "comparison_table", "require_plot_package"),
    "result": ("Comparison", "Row", "Standing"),
}


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
