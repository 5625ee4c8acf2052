"""The verdict on each text, and how sure m references make it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyunlearn.errors import ArgumentError
from pyunlearn.metrics._binomial import clopper_pearson
from pyunlearn.metrics._check import Floats, between, one_of
from pyunlearn.metrics.exposure import (
    NULL_MEAN,
    SIGNIFICANT,
    Exposure,
    _counts,
    _scores,
    generalized_exposure,
)

_ROUNDING = 1e-9  # 19 references reach log2(20) exactly


class Bounds(NamedTuple):
    """(n,) each: a confidence interval for each text."""

    low: Floats
    high: Floats


class Verdict(NamedTuple):
    """(n,) each: see verdict."""

    verdict: NDArray[np.str_]
    """"not memorized", "still exposed", "forgotten" or "over-unlearned"."""
    before: Exposure
    after: Exposure
    low: Floats
    """Of the exposure that decided, bits: that before for "not memorized", the upper one after for "over-unlearned", else the lower one after."""
    high: Floats
    certain: NDArray[np.bool_]
    """The interval lies wholly on the verdict's side of the threshold: more references would not be expected to change it."""


def exposure_interval(
    scores: ArrayLike, non_member_scores: ArrayLike, *, confidence: float = 0.95, side: str = "lower"
) -> Bounds:
    """How well m references know the exposure of each text, in bits.

    The share p of unseen texts at least as likely was estimated from c of m; its Clopper-Pearson interval (1934) is

        p from Beta(c, m - c + 1) at (1 - confidence) / 2 to Beta(c + 1, m - c) at (1 + confidence) / 2,   exposure = -log2 p

    `high` is infinite where no reference is as likely: m references cannot say how much more exposed than log2(m + 1) a text is. Conservative:
    covers with at least the stated probability when the references are independent draws.

    Args:
        scores: (n,), low where a text is likely.
        non_member_scores: (m,) or (n, m).
        confidence: between 0 and 1.
        side: "lower" (memorized is high) or "upper" (over-unlearned is high).

    Raises:
        ArgumentError: as generalized_exposure; a confidence outside (0, 1); an unknown side.
    """
    between("confidence", confidence, 0, 1)
    one_of("side", side, ("lower", "upper"))
    s, r = _scores("exposure_interval", scores, non_member_scores)
    count, m = _counts(s, r)[side == "upper"], r.shape[-1]
    least, most = clopper_pearson(count, m, confidence)
    with np.errstate(divide="ignore"):  # no reference is as likely: no upper end
        return Bounds(-np.log2(most) + 0.0, -np.log2(least))


def verdict(
    scores_before: ArrayLike,
    scores_after: ArrayLike,
    non_member_scores: ArrayLike,
    *,
    target_exposure: float = NULL_MEAN,
    confidence: float = 0.95,
) -> Verdict:
    """The verdict on each text, by the rules of the unlearning loop, with the interval of the exposure that decided.

        over-unlearned  upper exposure after at least 4.32 bits (SIGNIFICANT), and not so before
        not memorized   lower exposure before below 4.32 bits
        forgotten       lower exposure after at most `target_exposure`
        still exposed   else

    in this order. Exposures are anchored: the same references, under the original model, before and after. With fewer than 19 references no
    text can be memorized or over-unlearned. A text stopped at `target_exposure` stands near the threshold by design, and few such verdicts are `certain`.

    Args:
        scores_before: (n,) under the original model, low where a text is likely.
        scores_after: (n,) of the same texts under the unlearned model.
        non_member_scores: (m,) or (n, m), under the original model.
        target_exposure: bits; 1.443 (NULL_MEAN), the mean of unseen text, unless told otherwise.
        confidence: of the intervals.

    Raises:
        ArgumentError: as generalized_exposure; different lengths; a negative `target_exposure`; a confidence outside (0, 1).
    """
    if not target_exposure >= 0:
        raise ArgumentError(f"target_exposure must be 0 bits or more, got {target_exposure!r}")
    before = generalized_exposure(scores_before, non_member_scores)
    after = generalized_exposure(scores_after, non_member_scores)
    if len(before.lower) != len(after.lower):
        raise ArgumentError(
            f"scores_before and scores_after must be of the same texts, got {len(before.lower)} and {len(after.lower)}"
        )
    significant = SIGNIFICANT - _ROUNDING
    over = (after.upper >= significant) & (before.upper < significant)
    unseen, forgotten = before.lower < significant, after.lower <= target_exposure
    name = np.select([over, unseen, forgotten], ["over-unlearned", "not memorized", "forgotten"], "still exposed")

    of_before = exposure_interval(scores_before, non_member_scores, confidence=confidence)
    of_lower = exposure_interval(scores_after, non_member_scores, confidence=confidence)
    of_upper = exposure_interval(scores_after, non_member_scores, confidence=confidence, side="upper")
    low, high = (np.select([over, unseen], [u, b], x) for u, b, x in zip(of_upper, of_before, of_lower, strict=True))
    certain = np.select(
        [over, unseen, forgotten],
        [low >= significant, high < significant, high <= target_exposure],
        low > target_exposure,
    )
    return Verdict(name, before, after, low, high, certain)
