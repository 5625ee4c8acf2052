"""Turn texts, files and datasets into examples, examples into tokens, and tokens into batches; find copies of texts."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported at first use: a search for copies needs no torch
    from pyunlearn.data.batching import TokenBatch, batches, collate
    from pyunlearn.data.comparison import check_texts, score_note
    from pyunlearn.data.examples import Example, Message, read_examples
    from pyunlearn.data.find import CorpusCopies, CorpusCopy, find_copies
    from pyunlearn.data.roles import read_roles
    from pyunlearn.data.tokens import Tokens, encode, padding_id

__all__ = [
    "CorpusCopies",
    "CorpusCopy",
    "Example",
    "Message",
    "TokenBatch",
    "Tokens",
    "batches",
    "check_texts",
    "collate",
    "encode",
    "find_copies",
    "padding_id",
    "read_examples",
    "read_roles",
    "score_note",
]

_HOMES = {
    "batching": ("TokenBatch", "batches", "collate"),
    "comparison": ("check_texts", "score_note"),
    "examples": ("Example", "Message", "read_examples"),
    "find": ("CorpusCopies", "CorpusCopy", "find_copies"),
    "roles": ("read_roles",),
    "tokens": ("Tokens", "encode", "padding_id"),
}


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
