"""Redaction of texts: words become dots, so that a report can be passed on."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

MASK = "•••"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")  # white space to Python, and codes to a terminal
_SHORTEST = 2  # words in a row that count as recited: a single common word proves nothing


def masked(text: str) -> str:
    """Replace every word by three dots, which do not show its length.

    >>> masked("pin 4711")
    '••• •••'
    """
    return _CONTROL.sub(" ", re.sub(r"\S+", MASK, text))


def recited(continuation: str, truth: str) -> list[tuple[str, bool]]:
    """Mark the words of a continuation that are recited: in a run of two words or more in the order of `truth`.

    >>> recited("so the cat sat", "look the cat runs")
    [('so', False), ('the', True), ('cat', True), ('sat', False)]
    """
    words, true_words = continuation.split(), truth.split()
    marks = [False] * len(words)
    for block in SequenceMatcher(None, words, true_words, autojunk=False).get_matching_blocks():
        if block.size >= _SHORTEST:
            marks[block.a : block.a + block.size] = [True] * block.size
    return list(zip(words, marks, strict=True))
