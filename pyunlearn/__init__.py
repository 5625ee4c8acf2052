"""pyunlearn: remove chosen training examples from a language model, and measure that they are gone."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # loaded at first use: the command line prints its help without torch
    from pyunlearn.attacks import AttackedExample, AttackResult, attack
    from pyunlearn.auditing import Audit, AuditedExample, audit
    from pyunlearn.benchmarking import BenchResult, bench
    from pyunlearn.comparing import Comparison, compare
    from pyunlearn.data import CorpusCopies, CorpusCopy, find_copies
    from pyunlearn.errors import (
        ArgumentError,
        DataError,
        DependencyError,
        ModelError,
        OutputError,
        PyunlearnError,
        TrainingError,
    )
    from pyunlearn.unlearning import ExampleResult, Plan, Result, Utility, plan, unlearn

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "AttackResult",
    "AttackedExample",
    "Audit",
    "AuditedExample",
    "BenchResult",
    "Comparison",
    "CorpusCopies",
    "CorpusCopy",
    "DataError",
    "DependencyError",
    "ExampleResult",
    "ModelError",
    "OutputError",
    "Plan",
    "PyunlearnError",
    "Result",
    "TrainingError",
    "Utility",
    "attack",
    "audit",
    "bench",
    "compare",
    "find_copies",
    "plan",
    "unlearn",
]

_HOMES = {
    "attacks": ("AttackResult", "AttackedExample", "attack"),
    "auditing": ("Audit", "AuditedExample", "audit"),
    "benchmarking": ("BenchResult", "bench"),
    "comparing": ("Comparison", "compare"),
    "data": ("CorpusCopies", "CorpusCopy", "find_copies"),
    "unlearning": ("ExampleResult", "Plan", "Result", "Utility", "plan", "unlearn"),
}


def __getattr__(name: str) -> Any:
    home = next((package for package, names in _HOMES.items() if name in names), "errors")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
