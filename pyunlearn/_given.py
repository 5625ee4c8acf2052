"""What the caller gave: texts made ready for a model, and how a result speaks of model, settings and versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pyunlearn import models
from pyunlearn.data import Example, Tokens, encode


def encoded(
    model: Any, tokenizer: Any, examples: Mapping[str, Sequence[Example]], truncate: bool
) -> dict[str, list[Tokens]]:
    """The examples of each role as tokens of this model. Raises DataError as `data.encode` does."""
    both, length = models.is_encoder_decoder(model), models.context_length(model)
    return {
        role: encode(found, tokenizer, role=role, max_length=length, encoder_decoder=both, truncate=truncate)
        for role, found in examples.items()
    }


def model_name(model: Any) -> str | None:
    """How a report calls a model: not where it lies on this machine, for reports are passed on."""
    if model is None:
        return None
    inner = None if isinstance(model, (str, Path)) else models.unwrapped(model)
    where = str(model) if inner is None else str(getattr(inner, "name_or_path", "") or type(inner).__name__)
    return Path(where).name if Path(where).is_absolute() else where


def shown(value: Any) -> Any:
    """An argument as JSON shows it: its value, the beginning of a long text, or the name of its type."""
    if isinstance(value, (str, Path)):
        text = str(value)
        return text if len(text) <= 200 else text[:200] + "..."
    return value if isinstance(value, (int, float, bool, dict, type(None))) else type(value).__name__


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    import pyunlearn

    return {"pyunlearn": pyunlearn.__version__, "torch": torch.__version__}
