"""Texts in place of the forget texts: refusals and preferred answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyunlearn.data import Example
from pyunlearn.data.examples import with_completion
from pyunlearn.errors import ArgumentError, DataError, brief
from pyunlearn.methods import REFUSALS, Method


def substitutes_for(
    forget: Sequence[Example], method: Method, options: Mapping[str, Any], seed: int
) -> dict[str, list[Example]]:
    """Return role ("refusal" or "winner") -> a text for each forget example, where the method needs one.

    Raises ArgumentError for a wrong option `refusals` or `winners`; DataError where there is no prompt.
    """
    if "refusals" in method.needs:
        texts = options.get("refusals")
        texts = REFUSALS if texts is None else texts
        return {"refusal": with_refusals(forget, texts, seed, alone="forget" not in method.roles)}
    if "winners" in method.needs:
        return {"winner": with_winners(forget, options.get("winners"))}
    return {}


def with_refusals(forget: Sequence[Example], texts: Sequence[str], seed: int, *, alone: bool) -> list[Example]:
    """Return each forget example with one of the texts, drawn at random, in place of its completion.

    Args:
        forget: the examples.
        texts: refusals to draw from.
        seed: seed of the draw.
        alone: True where nothing else is trained on.

    Raises ArgumentError unless the texts are a list of one text or more; DataError where, alone, an example has no
    prompt.
    """
    if not texts or not _are_texts(texts):
        raise ArgumentError(f"refusals must be a list of one text or more, got {brief(texts)}")
    for number, example in enumerate(forget, 1):
        if alone and not example.prompt:
            raise DataError(
                f"forget example {number} has no prompt that could be refused: give prompt and completion, or use "
                "idkdpo"
            )
    indices = np.random.default_rng((seed, 2)).integers(len(texts), size=len(forget))
    return [with_completion(example, texts[i]) for example, i in zip(forget, indices, strict=True)]


def with_winners(forget: Sequence[Example], winners: Sequence[str] | None) -> list[Example]:
    """Return each forget example with its winner in place of its completion.

    The winners are those of the list, or the examples' own. Raises ArgumentError unless there is one for each.
    """
    if winners is not None and (not _are_texts(winners) or len(winners) != len(forget)):
        got = f"{len(winners)} entries" if _are_texts(winners) else _kind(winners)
        raise ArgumentError(f"winners must be a list of {len(forget)} texts, one for each forget example, got {got}")
    texts = [example.winner for example in forget] if winners is None else winners
    for number, text in enumerate(texts, 1):
        if text is None:
            raise ArgumentError(
                f"dpo prefers another answer to each forget text, and forget example {number} has none: give each a "
                '"winner", pass method_options={"winners": [...]}, or let the model write some with altpo'
            )
    return [with_completion(example, str(text)) for example, text in zip(forget, texts, strict=True)]


def _kind(values: Any) -> str:
    """Return what came in place of texts, without quoting any."""
    if isinstance(values, (list, tuple)):
        return f"{len(values)} entries, not all of them texts" if values else "an empty list"
    return f"a value of type {type(values).__name__}"


def _are_texts(values: Any) -> bool:
    """Return True for a list of texts that are not blank."""
    return isinstance(values, (list, tuple)) and all(isinstance(x, str) and bool(x.strip()) for x in values)
