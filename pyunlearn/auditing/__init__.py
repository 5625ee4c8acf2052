"""The audit: measure what a model remembers of given texts, without changing it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # loaded at first use: the command line reads the settings without torch
    from pyunlearn.auditing.api import audit
    from pyunlearn.auditing.config import METRICS, AuditConfig
    from pyunlearn.auditing.result import Audit, AuditedExample

__all__ = ["METRICS", "Audit", "AuditConfig", "AuditedExample", "audit"]

_HOMES = {
    "api": ("audit",),
    "config": ("METRICS", "AuditConfig"),
    "result": ("Audit", "AuditedExample"),
}


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
