"""Prefixes: does the rest of a text come back once its beginning is given?"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from pyunlearn.attacks.target import Target, Trial
from pyunlearn.data import Tokens

SHARES = (Fraction(1, 8), Fraction(1, 4), Fraction(1, 2))
"""How much of a text's scored tokens is given."""


def prefix(target: Target) -> Iterator[Trial]:
    """Score the tokens after the first eighth, quarter and half of each text, from one pass over the whole.

    Source: Carlini et al. 2022, arXiv 2202.07646; Barbulescu and Triantafillou 2024, arXiv 2405.03097.
    """
    values, n = target.as_it_is, len(target.texts.forget)
    for share in SHARES:
        nll = target.finite(np.array([-x[given(len(x), share) :].mean() for x in values]))
        yield Trial(f"prefix, {share} given", nll[:n], nll[n:], details={"given": float(share)})


def given(length: int, share: Fraction) -> int:
    """Return how many of a text's scored tokens are given: at least one is left to be scored.

    >>> given(16, Fraction(1, 8)), given(1, Fraction(1, 2))
    (2, 0)
    """
    return int(length * share)


def after(t: Tokens, share: Fraction) -> Tokens:
    """Return the text with the scored tokens after that share of them.

    >>> after(Tokens((5, 6, 7, 8, 9), first=1), Fraction(1, 2)).scored
    (8, 9)
    """
    return Tokens.at(t.ids, t.indices[given(len(t.indices), share) :], t.decoder)
