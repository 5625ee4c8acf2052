"""The unlearning loop: configuration, gradient ascent with per-example stopping, checkpoints, result."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported at first use: the command line prints its help without torch
    from pyunlearn.unlearning.api import unlearn
    from pyunlearn.unlearning.planning import Plan, plan
    from pyunlearn.unlearning.result import ExampleResult, Result, Utility

__all__ = ["ExampleResult", "Plan", "Result", "Utility", "plan", "unlearn"]

_HOMES = {
    "api": ("unlearn",),
    "planning": ("Plan", "plan"),
    "result": ("ExampleResult", "Result", "Utility"),
}


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
