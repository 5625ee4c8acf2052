"""Verdicts on the texts from the scores under every attack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyunlearn.attacks.config import AttackConfig
from pyunlearn.attacks.target import Floats, Trial
from pyunlearn.metrics import (
    Recovery,
    discoveries,
    exposure_interval,
    generalized_exposure,
    recovery,
)
from pyunlearn.metrics.exposure import is_significant
from pyunlearn.metrics.families import SET, stands_out

EXPOSED, BACK, DOUBTFUL = "still exposed", "comes back", "doubtful"
STAYS, UNTESTED = "stays forgotten", "untested"
"""The verdicts: exposed without any attack, or under one; doubtful, where only the set as a whole comes back."""


class Judged(NamedTuple):
    """Verdicts on n texts under a trials, the first of which is no attack."""

    verdict: list[str]
    exposure: Floats
    """(a, n) bits among the non-members under the same attack; NaN where a text was not tested."""
    combined: Floats
    """(n,) bits: -log2 of the p-value over all attacks together; NaN where a text was not tested."""
    strongest: NDArray[np.int64]
    """(n,) index of the attack under which the text stands out most, or 0 where it is exposed without one; -1 where it
    was not tested."""
    interval: list[tuple[float, float]]
    """95 % interval, bits, of the exposure under that trial."""
    set_pvalue: Floats
    """(a,) that a set of unseen texts stands out as much under this attack, adjusted for the number of attacks; NaN for
    trials that are not judged, and for the first."""
    pvalue: float
    """That a set of unseen texts stands out as much under any of the attacks."""


def judge(trials: Sequence[Trial], config: AttackConfig, groups: Sequence[int] | None = None) -> Judged:
    """Judge each text by its scores under every attack, and the set as a whole.

        still exposed    it stands out without an attack
        comes back       it stands out over all attacks together, among those that are not exposed without one
        doubtful         it does not, but has 4.32 bits or more under an attack under which the set as a whole stands
                         out
        stays forgotten  none of these
        untested         no attack was tried on it

    Half of the false discovery rate is for the model without an attack (Benjamini-Hochberg), and half for the attacks:
    there the set must stand out (`pvalue`), and then single texts are named at the whole rate, among those that are not
    exposed already: these would lower the bar for the others. So a model that never saw the texts has a text named in
    at most that share of cases, and of the texts that come back at most that share are unseen ones. The set stands out
    under an attack where more texts do than would of unseen ones (Holm over the attacks), or over all attacks together;
    a set of fewer than five texts by the latter alone. Of near copies, and of a record in several windows, which depend
    on each other, the first counts for the set.

    Args:
        trials: the first is the model without an attack.
        config: the settings.
        groups: (n,) a number for each text, the same for those that depend on each other; default: none do.
    """
    n, rate = len(trials[0].forget), config.false_discovery_rate
    exposure = np.stack([_exposure(t) for t in trials])
    exposed = discoveries(exposure[0], rate=rate / 2).significant
    set_pvalue = np.full(len(trials), np.nan)
    judged = [k for k, t in enumerate(trials) if t.judged and k]
    if not judged:
        names = np.where(exposed, EXPOSED, UNTESTED)
        intervals = [_interval(trials[0], i) for i in range(n)]
        return Judged(names.tolist(), exposure, np.full(n, np.nan), np.zeros(n, int), intervals, set_pvalue, 1.0)
    recovered = _recovery([trials[k] for k in judged])
    combined = -np.log2(recovered.pvalue) + 0.0
    tested, first = ~np.isnan(combined), np.zeros(n, dtype=bool)
    first[np.unique(np.arange(n) if groups is None else groups, return_index=True)[1]] = True
    tried = np.stack([~np.isnan(trials[k].forget) for k in judged])
    pvalue = _over_all(np.where(first, combined, np.nan), tried, recovered.compared, config.seed)
    if first.sum() >= SET:
        own = [_set_pvalue(trials[k], np.where(first, exposure[k], np.nan), config.seed) for k in judged]
        set_pvalue[judged] = holm([min(1.0, 2 * p) for p in own])
        pvalue = min(1.0, 2 * pvalue, float(np.min(set_pvalue[judged])))
    back, others = np.zeros(n, dtype=bool), tested & ~exposed
    if pvalue <= rate / 2:
        back[others] = discoveries(combined[others], rate=rate).significant
    suspect = is_significant(exposure[set_pvalue <= rate / 2]).any(axis=0)
    names = np.select([exposed, back, suspect, tested], [EXPOSED, BACK, DOUBTFUL, STAYS], UNTESTED)
    strongest = np.where(exposed, 0, np.where(tested, np.array(judged)[recovered.strongest], -1))
    intervals = [_interval(trials[k], i) for i, k in enumerate(strongest)]
    return Judged(names.tolist(), exposure, combined, strongest, intervals, set_pvalue, pvalue)


def non_members_for(rate: float) -> int:
    """Return the least number of non-members with which a verdict is possible at a false discovery rate.

    >>> non_members_for(0.05)
    39
    """
    return math.ceil(2 / rate - 1 - 1e-9)


def holm(pvalues: Sequence[float]) -> Floats:
    """Return p-values adjusted for their number: at most a share x of families without an effect have one below x.

    Source: Holm 1979, Scandinavian Journal of Statistics 6, 65-70.

    >>> holm([0.01, 0.04, 0.5]).tolist()
    [0.03, 0.08, 0.5]
    """
    p = np.asarray(pvalues, dtype=np.float64)
    order = np.argsort(p)
    adjusted = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    out = np.empty_like(p)
    out[order] = np.minimum(1.0, adjusted)
    return out


def _set_pvalue(trial: Trial, exposure: Floats, seed: int) -> float:
    """Return the chance of a set of unseen texts of which as many stand out under an attack."""
    tested = ~np.isnan(exposure)
    return stands_out(exposure[tested], len(_tested(trial.non_members)), seed) if tested.any() else 1.0


def _over_all(exposure: Floats, tried: NDArray[np.bool_], m: NDArray[np.int64], seed: int) -> float:
    """Return the chance of a set of unseen texts that stands out as much over all attacks.

    Texts on which other attacks were tried have other non-members: of these parts the smallest chance, adjusted.

    Args:
        exposure: (n,) bits over all attacks, NaN where a text was not tested.
        tried: (a, n) True where an attack was tried on a text.
        m: (n,) the number of non-members of each text.
        seed: of the simulation.
    """
    part, tested = np.unique(tried, axis=1, return_inverse=True)[1].ravel(), ~np.isnan(exposure)
    parts = [(part == k) & tested for k in np.unique(part[tested])]
    pvalues = [stands_out(exposure[own], int(m[own][0]), seed) for own in parts]
    return min(1.0, len(pvalues) * min(pvalues)) if pvalues else 1.0


def returned(judged: Judged, i: int) -> list[int]:
    """Return the trials, from the strongest, under which a text that comes back is exposed on its own."""
    own = judged.exposure[:, i]
    others = [k for k in np.argsort(-np.nan_to_num(own)) if k > 0 and is_significant(own)[k]]
    strongest = int(judged.strongest[i])
    return [strongest, *(int(k) for k in others if k != strongest)]


def _recovery(trials: Sequence[Trial]) -> Recovery:
    """Compute the p-values of all texts over these trials."""
    return recovery(np.stack([t.forget for t in trials]), np.stack([t.non_members for t in trials]))


def _exposure(trial: Trial) -> Floats:
    """Return (n,) exposures of a trial, bits; NaN where a text was not tested."""
    out, tried = np.full(len(trial.forget), np.nan), ~np.isnan(trial.forget)
    if tried.any():
        out[tried] = generalized_exposure(trial.forget[tried], _tested(trial.non_members)).lower
    return out


def _tested(scores: Floats) -> Floats:
    """Return the scores of the non-members that were tested."""
    return scores[~np.isnan(scores)]


def _interval(trial: Trial, i: int) -> tuple[float, float]:
    """Return the 95 % interval of a text's exposure in a trial, bits; NaN where it was not tested."""
    if np.isnan(trial.forget[i]):
        return float("nan"), float("nan")
    low, high = exposure_interval(trial.forget[i : i + 1], _tested(trial.non_members))
    return float(low[0]), float(high[0])
