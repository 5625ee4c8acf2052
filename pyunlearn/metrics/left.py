"""Tests of what is left of memorized texts in a model: whether each stands out, and whether they do all together."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyunlearn.metrics._check import Floats
from pyunlearn.metrics.discoveries import discoveries
from pyunlearn.metrics.exposure import generalized_exposure
from pyunlearn.metrics.exposure_tests import exposure_top_test

_UNMOVED = 0.25
"""Share of the way from a text's score before to the mean of unseen text, below which it has hardly moved."""


class Left(NamedTuple):
    """Outcome of left."""

    standing_out: NDArray[np.bool_]
    """(n,) True for each memorized text that stands out."""
    pvalue: float | None
    """Chance that as many unseen texts lie as high, all together; None where nothing was memorized."""


class Scores(NamedTuple):
    """Scores of the texts (n,) and of the non-members (m,) under one model, low where a text is likely or extracted."""

    texts: Floats
    non_members: Floats


def left(before: Scores, now: Scores, extracted: Scores, *, rate: float = 0.05, seed: int = 0) -> Left:
    """Find the memorized texts that stand out in a model, as they would not if it had never seen them.

    A text that the original model had memorized (`discoveries` among its exposures there) stands out where

    - `discoveries` selects it among the memorized texts, by its exposure in the model or by that of what is extracted;
    - or it has hardly moved: it is likelier than every non-member, and less than a quarter of the way from its score
      under the original model to the mean of the non-members there.

    All exposures are among the non-members under the same model. In a model that never saw the texts they are
    exchangeable with these, whatever the law of the scores, so that in such a model each of the two selections names a
    text in at most 5 % of sets (at the default rate), and the last rule at most n / (m + 1) of n texts: hardly any
    where the texts were far below the non-members, for then a quarter of the way is farther than unseen text lies.

    `pvalue` is that of the memorized texts all together: twice the smaller one of `exposure_top_test` on their
    likelihoods and on their extracted shares.

    Args:
        before: of the likelihoods, under the original model.
        now: of the likelihoods, under the model in question.
        extracted: of the share of a text that the model in question still gives, negative.
        rate: the false discovery rate.
        seed: of the simulation of the p-value.

    Returns:
        Left(standing_out, pvalue).

    Raises:
        ArgumentError: as generalized_exposure; a rate outside (0, 1).

    Example:
        >>> unseen = np.arange(99.0)
        >>> before, now = Scores(np.full(3, -9.0), unseen), Scores(np.array([-9.0, 3.0, 50.0]), unseen)
        >>> left(before, now, Scores(np.zeros(3), np.zeros(99))).standing_out.tolist()
        [True, False, False]

    See Also:
        verdict: the verdicts. exposure_top_test: the test of a set.

    Source: ours.
    """
    memorized = discoveries(generalized_exposure(*before).lower, rate=rate).significant
    standing = np.zeros(len(memorized), dtype=bool)
    if not memorized.any():
        return Left(standing, None)
    pvalues = []
    for scores in (now, extracted):
        exposures = generalized_exposure(*scores).lower[memorized]
        standing[memorized] |= discoveries(exposures, rate=rate).significant
        pvalues.append(exposure_top_test(exposures, len(scores.non_members), seed=seed).pvalue)
    way = before.non_members.mean() - before.texts
    unmoved = now.texts - before.texts < _UNMOVED * way
    standing |= memorized & unmoved & (now.texts < now.non_members.min())
    return Left(standing, min(1.0, 2 * min(pvalues)))
