"""Adapters to transformers: loading, inspection, likelihoods, hidden states and sampling of language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported at first use: the command line prints its help without torch
    from pyunlearn.models.devices import default_device
    from pyunlearn.models.inspection import require_language_model
    from pyunlearn.models.language_model import LanguageModel
    from pyunlearn.models.likelihood import Likelihood, head_problem, inputs_of
    from pyunlearn.models.loading import load, load_tokenizer, load_weights
    from pyunlearn.models.scoring import Scorer

_HOMES = {
    "devices": ("default_device",),
    "inspection": ("require_language_model",),
    "language_model": ("LanguageModel",),
    "likelihood": ("Likelihood", "head_problem", "inputs_of"),
    "loading": ("load", "load_tokenizer", "load_weights"),
    "scoring": ("Scorer",),
}

__all__ = [
    "LanguageModel",
    "Likelihood",
    "Scorer",
    "default_device",
    "head_problem",
    "inputs_of",
    "load",
    "load_tokenizer",
    "load_weights",
    "require_language_model",
]


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
