"""The experiment of arXiv 2411.04388 on any corpus: unlearning in and out of distribution, memorization, difficulty."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # loaded at first use: the command line reads StudyConfig without torch
    from pyunlearn.study.config import PRESETS, StudyConfig
    from pyunlearn.study.evaluation import MetricEvaluation, evaluate_metrics
    from pyunlearn.study.result import Study
    from pyunlearn.study.study import run_study

__all__ = ["PRESETS", "MetricEvaluation", "Study", "StudyConfig", "evaluate_metrics", "run_study"]

_HOMES = {
    "config": ("PRESETS", "StudyConfig"),
    "evaluation": ("MetricEvaluation", "evaluate_metrics"),
    "result": ("Study",),
    "study": ("run_study",),
}


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
