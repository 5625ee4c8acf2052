"""Recitation: whether a model continues the beginning of a text, greedily, with the rest of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pyunlearn.data import Example, Tokens
from pyunlearn.metrics import verbatim_match
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.probes.decoding import greedy_continuations

LONGEST = 64
"""Tokens of the longest continuation."""
_OPENING = 50  # tokens of the longest opening of a text without a prompt, as in arXiv 2202.07646
_RECITED = 10  # tokens in a row that count as recited
_SHORTEST = 4  # a rest of fewer tokens is guessed too often to show anything


def opening(t: Tokens, prompted: bool) -> Tokens:
    """Return the text with its continuation as scored tokens: after the prompt, or after the first half.

    Where other tokens stand between or after the scored ones, it is the longest run of these, after all before it.

    >>> opening(Tokens((5, 6, 7, 8, 9), first=1), prompted=False).scored
    (8, 9)
    >>> opening(Tokens.at((5, 6, 7, 8, 9), [2, 3]), prompted=False)
    Tokens(ids=(5, 6, 7, 8), first=2, decoder=None)
    """
    if t.chosen is not None:
        run = max(t.runs, key=len)
        prompted = run.start > int(t.decoder is None)
        cut = t.written[: run.stop]
        t = Tokens(cut, run.start) if t.decoder is None else Tokens(t.ids, run.start, cut)
    if prompted:
        return t
    return Tokens(t.ids, t.first + min(len(t.scored) // 2, _OPENING), t.decoder)


def is_guessed(t: Tokens, first_choices: NDArray[np.generic]) -> bool:
    """Return True where the tokens after a text's opening are first choices: ten of them, or all of a shorter rest.

    Then the model recites the text, which is read here and not written: so unseen text can be tried in numbers.

    Args:
        t: a text; only the scored tokens after its prompt, or after its first half, count.
        first_choices: (scored tokens,) True where a token is the model's first choice.

    >>> is_guessed(Tokens((5, 6, 7, 8, 9, 10, 11, 12, 13), first=1), np.array([False] * 4 + [True] * 4))
    True
    """
    prompted = t.first > int(t.decoder is None)
    rest = first_choices[0 if prompted else min(len(first_choices) // 2, _OPENING) :]
    return len(rest) >= _SHORTEST and bool(rest[:_RECITED].all())


def recited(written: Sequence[int], rest: Sequence[int]) -> bool:
    """Return True where a continuation holds ten tokens in a row of the text's rest, or all of a shorter rest.

    A rest of fewer than four tokens is never recited: too many texts end alike.

    Args:
        written: token ids that the model wrote after the opening.
        rest: token ids of the text after the opening.

    >>> recited((1, 2, 3, 4, 9), (1, 2, 3, 4)), recited((1, 2, 3), (1, 2, 3))
    (True, False)
    """
    rest = rest[:LONGEST]
    if len(rest) < _SHORTEST:
        return False
    return verbatim_match(written, rest).longest >= min(_RECITED, len(rest))


def recitations(
    lm: LanguageModel, examples: Sequence[Example], tokens: Sequence[Tokens], indices: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return (B,) True for the texts at `indices` whose beginning the model continues with their rest.

    Args:
        lm: the model.
        examples: B texts.
        tokens: the same as tokens.
        indices: of those that are tried; the others are False.
    """
    out = np.zeros(len(examples), dtype=bool)
    openings = [opening(tokens[i], examples[i].prompted) for i in indices]
    if openings:
        written = greedy_continuations(lm, openings, longest=LONGEST)
        out[indices] = [recited(ids, t.scored) for ids, t in zip(written, openings, strict=True)]
    return out
