"""Texts that may be seen: words become dots, so that a report can be passed on."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

MASK = "•••"
_SHORTEST = 2  # words in a row that count as recited: one alone is in any two texts


def masked(text: str) -> str:
    """The text with every word as three dots, whatever its length: a code of four digits does not show that it has four."""
    return re.sub(r"\S+", MASK, text)


def recited(said: str, truth: str) -> list[tuple[str, bool]]:
    """The words of `said` in order, each with whether it stands in a run of two or more words that `truth` has in the same order."""
    words, true = said.split(), truth.split()
    found = [False] * len(words)
    for block in SequenceMatcher(None, words, true, autojunk=False).get_matching_blocks():
        if block.size >= _SHORTEST:
            found[block.a : block.a + block.size] = [True] * block.size
    return list(zip(words, found, strict=True))
