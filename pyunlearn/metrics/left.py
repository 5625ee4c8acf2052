"""Tests of what is left of memorized texts in a model: whether each stands out, and whether they do all together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyunlearn.metrics._check import Floats
from pyunlearn.metrics.discoveries import discoveries
from pyunlearn.metrics.exposure import generalized_exposure
from pyunlearn.metrics.families import families_of
from pyunlearn.metrics.joint_tests import Comparison, joint_top_tests
from pyunlearn.metrics.verdict import discoveries_within

_LEVEL = 0.05
"""Of the three comparisons together."""
_UNMOVED = 0.25
"""Share of the way from a text's score before to the mean of unseen text, below which it has hardly moved."""
_FAR = 2.0
"""Spreads of unseen text that this way is long at least: a shorter one is too easily not gone by chance."""
_FAR_OF_FORMS = 4.0
"""The same of a text in another form, where the set in this form is not too likely."""
_STILL = 0.05
"""Share of a way of any length, below which a text has not moved."""

_BEYOND = 2.0
"""Ranges of the non-members by which a text stands out, or is too unlikely, for any number of texts."""


class Left(NamedTuple):
    """Outcome of left."""

    standing_out: NDArray[np.bool_]
    """(n,) True for each memorized text that stands out."""
    too_low: NDArray[np.bool_]
    """(n,) True for each text that may be called over-unlearned: all, or those far above all non-members."""
    pvalue: float | None
    """Chance that as many unseen texts lie as high, all together; None where nothing was memorized."""
    unlikely_pvalue: float
    """Chance that as many unseen texts lie as low: the likelihoods of all texts, memorized or not."""
    forms_pvalue: float | None = None
    """`pvalue` of other forms of the texts, the smallest of any form times their number; None where there are none, and
    where none was memorized."""


class Scores(NamedTuple):
    """Scores of the texts (n,) and of the non-members (m,) under one model, low where a text is likely or extracted."""

    texts: Floats
    non_members: Floats


def left(
    before: Scores,
    now: Scores,
    extracted: Scores,
    *,
    rate: float = 0.05,
    seed: int = 0,
    memorized: NDArray[np.bool_] | None = None,
    level: float = _LEVEL,
) -> Left:
    """Find the memorized texts that stand out in a model, as they would not if it had never seen them.

    A text that the original model had memorized (`discoveries` among its exposures there) stands out where

    - `discoveries` selects it among the memorized texts, by its exposure in the model or by that of what is extracted,
      and `pvalue` is at most 5 %;
    - or it has hardly moved: it is likelier than every non-member, and less than a quarter of the way from its score
      under the original model to the mean of the non-members there, where this way is two of their spreads below that
      mean or more; or less than a twentieth of a way of any length, to either side;
    - or it is likelier than every non-member by more than twice what they differ among each other.

    The first rule has two selections at `rate` each: of the texts that it names at most twice that share are like
    unseen ones, on average (7 and 9 % at 5 %, simulated, with 4 and 1 of 20 texts left).

    All exposures are among the non-members under the same model. In a model that never saw the texts these are
    exchangeable with the non-members, for any law of the scores. Three comparisons share one level: whether the
    memorized texts are too likely, or too much of them is extracted (`pvalue`, the smaller one of the two), and whether
    texts are too unlikely (`unlikely_pvalue`). For at most 5 % of sets of unseen texts any of them is 5 % or less. The
    last two rules name at most n / (m + 1) of n texts on average: hardly any where they were far below the non-members,
    for then a quarter of the way is farther than unseen text lies. Where only some texts of a set were memorized, and
    weakly, these may be the easier ones, which lie higher in every model; scores less those of a reference model vary
    less in this.

    Args:
        before: mean negative log-likelihoods, (n,) of the texts and (m,) of the non-members, nats per token, under the
            original model.
        now: the same under the model in question.
        extracted: minus the share of each text that the model in question still gives, (n,) and (m,), -1 to 0.
        rate: the false discovery rate of each selection, between 0 and 1.
        seed: of the choices behind the p-values.
        memorized: (n,) True for the texts that the original model had memorized; default: those that `discoveries`
            selects.
        level: p-value up to which the memorized texts lie too high all together, or all texts too low.

    Returns:
        Left(standing_out, too_low, pvalue, unlikely_pvalue, forms_pvalue), the last None.

    Raises:
        ArgumentError: as generalized_exposure; a rate outside (0, 1).

    Example:
        >>> unseen = np.arange(99.0)
        >>> before, now = Scores(np.full(3, -9.0), unseen), Scores(np.array([-9.0, 3.0, 50.0]), unseen)
        >>> left(before, now, Scores(np.zeros(3), np.zeros(99))).standing_out.tolist()
        [True, False, False]

    See Also:
        verdict: the verdicts. exposure_top_test: the test of a set.

    Source: ours; one level for several comparisons by Westfall and Young 1993, Resampling-Based Multiple Testing.
    """
    if memorized is None:
        memorized = discoveries(generalized_exposure(*before).lower, rate=rate).significant
    pvalue, unlikely = _pvalues(now, extracted, memorized, seed)
    lowest, highest = now.non_members.min(), now.non_members.max()
    beyond = _BEYOND * (highest - lowest)
    too_low = (now.texts > highest + beyond) | (unlikely <= level)
    standing = np.zeros(len(memorized), dtype=bool)
    if not memorized.any():
        return Left(standing, too_low, None, unlikely)
    if pvalue <= level:
        for scores in (now, extracted):
            exposures = generalized_exposure(*scores).lower[memorized]
            standing[memorized] |= discoveries(exposures, rate=rate).significant
    unmoved = _unmoved(before, now) & (now.texts < lowest)
    standing |= memorized & (unmoved | (now.texts < lowest - beyond))
    return Left(standing, too_low, pvalue, unlikely)


def left_by_form(
    before: Scores,
    now: Scores,
    extracted: Scores,
    forms: tuple[NDArray[np.int64], NDArray[np.int64]],
    memorized: NDArray[np.bool_],
    *,
    names: Sequence[str],
    rate: float = 0.05,
    seed: int = 0,
) -> Left:
    """Find what `left` does of texts in several forms, each of which is compared with its like alone.

    The texts as they are have what they have without other forms. The other forms share a level of 5 % among them, a
    part of it for each name, so that for at most 5 % of sets of unseen texts any of them lies too high or too low.
    Several paraphrases of one text depend on each other, so each is a form here. A text in another form that has hardly
    moved is named alone only where its way was four spreads long or more: of a shorter one, many forms of many texts
    that lie where they lay before are no surprise.

    Args:
        before, now, extracted, rate, seed: as in left.
        forms: (n,) and (m,) number of each text's form, 0 for texts as they are.
        memorized: (n,) True for the texts that the original model had memorized.
        names: (n,) name of each text's form; those of one number may differ.

    Raises:
        ArgumentError: as left.

    Source: ours.
    """
    of_texts, own = forms
    standing, too_low = np.zeros((2, len(memorized)), dtype=bool)
    others = list(dict.fromkeys((form, name) for form, name in zip(of_texts.tolist(), names, strict=True) if form))
    outcomes = []
    for form, name in [(0, ""), *others]:
        texts, unseen = (of_texts == form) & (np.array(names) == name), own == form
        parts = [Scores(scores.texts[texts], scores.non_members[unseen]) for scores in (before, now, extracted)]
        level = _LEVEL / len(others) if form else _LEVEL
        outcome = left(*parts, rate=rate, seed=seed, memorized=memorized[texts], level=level)
        certain = not form or (outcome.pvalue is not None and outcome.pvalue <= level)
        way, spread = _way(parts[0])
        standing[texts] = outcome.standing_out & (certain | (way >= _FAR_OF_FORMS * spread))
        too_low[texts] = outcome.too_low
        outcomes.append(outcome)
    pvalues = [outcome.pvalue for outcome in outcomes[1:] if outcome.pvalue is not None]
    together = min(1.0, len(others) * min(pvalues)) if pvalues else None
    return outcomes[0]._replace(standing_out=standing, too_low=too_low, forms_pvalue=together)


def newly_known(
    now: Scores, forms: tuple[NDArray[np.int64], NDArray[np.int64]], memorized: NDArray[np.bool_], *, rate: float
) -> NDArray[np.bool_]:
    """Return (n,) which texts stand out in a model that the original model had not memorized.

    They are selected as an audit without the original selects, at half of the rate: the texts that the original had
    memorized have a test of their own.

    Args:
        now: scores under the model in question.
        forms: (n,) and (m,) number of each text's form, 0 for texts as they are.
        memorized: (n,) True for the texts that the original model had memorized.
        rate: the false discovery rate, between 0 and 1.

    >>> alike = (np.zeros(2, dtype=np.int64), np.zeros(99, dtype=np.int64))
    >>> newly_known(Scores(np.array([-1.0, 50.0]), np.arange(99.0)), alike, np.zeros(2, dtype=bool), rate=0.05).tolist()
    [True, False]
    """
    exposure = generalized_exposure(*now, groups=forms).lower
    families = 2 * families_of(exposure, *forms) + memorized
    return discoveries_within(families, exposure, rate=rate / 2)[0] & ~memorized


def _unmoved(before: Scores, now: Scores) -> NDArray[np.bool_]:
    """Return (n,) which texts have hardly moved on the way to the mean of unseen text, or not at all."""
    (way, spread), moved = _way(before), now.texts - before.texts
    hardly: NDArray[np.bool_] = (moved < _UNMOVED * way) & (way >= _FAR * spread)
    return hardly | (np.abs(moved) < _STILL * way)


def _way(before: Scores) -> tuple[Floats, float]:
    """Return (n,) ways from the texts to the mean of unseen text, and the spread of that."""
    mean = before.non_members.mean()
    below = np.minimum(before.non_members - mean, 0.0)
    spread = np.sqrt(2 * np.mean(below**2))  # of the likelier half; the standard deviation of a symmetric law
    return mean - before.texts, float(spread)


def _pvalues(now: Scores, extracted: Scores, memorized: NDArray[np.bool_], seed: int) -> tuple[float, float]:
    """Return the p-values of memorized texts that are too likely or too much extracted, and of too unlikely texts."""
    order = np.argsort(~memorized, kind="stable")
    likelihood, share = (
        (all_of - all_of.mean()) / max(float(all_of.std()), 1e-12)
        for all_of in (np.concatenate([scores.texts[order], scores.non_members]) for scores in (now, extracted))
    )
    count, n = int(memorized.sum()), len(memorized)
    comparisons = [Comparison(-likelihood, likelihood, n)]
    if count:
        comparisons += [Comparison(likelihood, -likelihood, count), Comparison(share, -share, count)]
    unlikely, *likely = joint_top_tests(comparisons, n, seed=seed).tolist()
    return min(likely, default=1.0), unlikely
