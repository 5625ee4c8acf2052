"""Attacks: try to bring back what a model was made to forget, without changing it; one attack a file."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # loaded at first use: the command line reads the settings without torch
    from pyunlearn.attacks.api import attack
    from pyunlearn.attacks.config import NAMES, AttackConfig
    from pyunlearn.attacks.registry import ATTACKS
    from pyunlearn.attacks.result import AttackedExample, AttackResult

__all__ = ["ATTACKS", "NAMES", "AttackConfig", "AttackResult", "AttackedExample", "attack"]

_HOMES = {
    "api": ("attack",),
    "config": ("NAMES", "AttackConfig"),
    "registry": ("ATTACKS",),
    "result": ("AttackResult", "AttackedExample"),
}


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
