"""Verdict on each text, with the confidence interval of the exposure behind it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyunlearn.errors import ArgumentError
from pyunlearn.metrics._binomial import clopper_pearson
from pyunlearn.metrics._check import Floats, as_floats, between, one_of
from pyunlearn.metrics.discoveries import discoveries
from pyunlearn.metrics.exposure import (
    NULL_MEAN,
    SIGNIFICANT,
    Exposure,
    Groups,
    check_scores,
    count_in_groups,
    generalized_exposure,
    is_significant,
)

NOT_EXTRACTED = math.log2(5)
"""Exposure, in bits, up to which a text's extracted share is that of non-members: 2.32, below four of five of them.

It is looser than the target of the likelihood: shares move in steps of whole tokens, and one more is no evidence.
"""


class Bounds(NamedTuple):
    """Confidence interval for each text, (n,) each."""

    low: Floats
    high: Floats


_LIKELIER = 0.1  # nats a token by which unseen text has to become likelier to be a new measure


class Verdict(NamedTuple):
    """Verdicts and the exposures behind them, (n,) each: the result of verdict."""

    verdict: NDArray[np.str_]
    """"not memorized", "still exposed", "undecided" (only with `standing_out`), "forgotten" or "over-unlearned"."""
    before: Exposure
    """Exposures under the original model."""
    after: Exposure
    """Exposures under the unlearned model."""
    low: Floats
    """Low end of the deciding exposure, bits: before for "not memorized", upper after for "over-unlearned", else lower
    after."""
    high: Floats
    """High end of the same exposure."""
    certain: NDArray[np.bool_]
    """True where the interval lies wholly on the verdict's side of the threshold, so that more non-members would not be
    expected to change it; never of "undecided". "still exposed" and "forgotten" also need the interval before above
    `threshold`; "not memorized" needs it below 4.32 bits, from which a text counts as memorized in the most favourable
    set, and "still exposed" with `standing_out` above that."""
    threshold: float
    """Bits from which a text of this set counts as memorized (with `families`, the most of any): 4.32 or more,
    see discoveries."""
    extraction: Floats | None
    """Exposure of the share extracted, bits; None without `extracted`."""


def exposure_interval(
    scores: ArrayLike,
    non_member_scores: ArrayLike,
    *,
    confidence: float = 0.95,
    side: str = "lower",
    groups: Groups | None = None,
) -> Bounds:
    """Compute the confidence interval of each text's exposure from m non-members, in bits.

    The share p of unseen texts at least as likely is estimated by c of m; its Clopper-Pearson interval is

        p from Beta(c, m - c + 1) at (1 - confidence) / 2 to Beta(c + 1, m - c) at (1 + confidence) / 2

    and exposure = -log2 p. Conservative: it covers with at least the stated probability when the non-members are
    independent draws.

    Args:
        scores: (n,), low where a text is likely.
        non_member_scores: (m,) or (n, m).
        confidence: between 0 and 1.
        side: "lower" (memorized is high) or "upper" (over-unlearned is high).
        groups: of the scores and the non-members, as in generalized_exposure.

    Returns:
        Bounds(low, high), bits. `high` is infinite where no non-member is as likely: m non-members cannot show how much
        more than log2(m + 1) bits a text is exposed.

    Raises:
        ArgumentError: as generalized_exposure; a confidence outside (0, 1); an unknown side.

    Example:
        >>> bounds = exposure_interval([0.5, 50.5], np.arange(1, 100))
        >>> bounds.low.round(2).tolist(), bounds.high.round(2).tolist()
        ([4.77, 0.72], [inf, 1.31])

    See Also:
        generalized_exposure: the estimate. verdict: thresholds on it.

    Source: Clopper and Pearson 1934, Biometrika 26, 404-413.
    """
    between("confidence", confidence, 0, 1)
    one_of("side", side, ("lower", "upper"))
    s, r = check_scores("exposure_interval", scores, non_member_scores)
    *counts, m = count_in_groups(s, r, groups)
    count = counts[side == "upper"]
    least, most = clopper_pearson(count, m, confidence)
    with np.errstate(divide="ignore"):  # no non-member is as likely: no upper end
        return Bounds(-np.log2(most) + 0.0, -np.log2(least))


def verdict(
    scores_before: ArrayLike,
    scores_after: ArrayLike,
    non_member_scores: ArrayLike,
    *,
    non_member_scores_after: ArrayLike | None = None,
    extracted: ArrayLike | None = None,
    non_member_extracted: ArrayLike | None = None,
    recited: ArrayLike | None = None,
    standing_out: ArrayLike | None = None,
    too_low: ArrayLike | None = None,
    groups: Groups | None = None,
    families: ArrayLike | None = None,
    target_exposure: float = NULL_MEAN,
    false_discovery_rate: float = 0.05,
    confidence: float = 0.95,
) -> Verdict:
    """Judge each text of a set by the rules of the unlearning loop, with the interval of the exposure that decided.

        over-unlearned  upper exposure after selected by `discoveries`, and before below 4.32 bits (SIGNIFICANT)
        not memorized   lower exposure before not selected by `discoveries`, and not `standing_out`
        forgotten       lower exposure after at most `target_exposure`, not extracted more than non-members, not recited
        still exposed   otherwise

    in this order. Of all texts called memorized (those of the last two verdicts), at most `false_discovery_rate` are
    unseen ones, on average; a set of one is judged at 4.32 bits. Over-unlearned texts are selected among the memorized
    ones and among the others, each for itself; with `families`, both so in each of them.

    Rule three is the loop's aim, and no test: 37 % of unseen texts lie above their mean. With `standing_out`, which is
    the audit's rule, a text is still exposed where it stands out, memorized before or not, and a memorized one is
    undecided where it neither does nor is forgotten.

    Exposures are anchored: the same non-members, under the original model, before and after. Unlearning can also make
    unseen text likelier, where the model had recited in its place; then `non_member_scores_after` takes it (see
    `anchor_after`). With fewer than 19
    non-members no text can be memorized or over-unlearned; few memorized among many need more (non_members_needed).
    A text stopped at `target_exposure` lies near the threshold by design, and few of those verdicts are `certain`.

    A mean log-likelihood also falls when a few tokens fall far and the model still writes the rest. `extracted` is the
    share of a text that the model still gives (exact_memorization or extraction_strength); its exposure among the same
    numbers of the non-members must be 2.32 bits or less (NOT_EXTRACTED), or the target where that is higher. Texts that
    are `recited` are not forgotten either.

    Args:
        scores_before: (n,) under the original model, low where a text is likely.
        scores_after: (n,) of the same texts under the unlearned model.
        non_member_scores: (m,) or (n, m), under the original model.
        non_member_scores_after: (m,) or (n, m), what `scores_after` are compared with; default: the same.
        extracted: (n,) 0 to 1, under the unlearned model, high where a text is extracted.
        non_member_extracted: (m,) or (n, m), under the original model; with `extracted`.
        recited: (n,) True where the unlearned model's greedy continuation of a text's beginning is its rest.
        standing_out: (n,) True where a text stands out among unseen text under the unlearned model, see `left`.
        too_low: (n,) True where a text may be over-unlearned, see `left`; by default all may be.
        groups: of the texts and the non-members, as in generalized_exposure.
        families: (n,) numbers: memorized and over-unlearned texts are selected among those of the same number; default:
            among all.
        target_exposure: bits, 0 or more; default 1.443 (NULL_MEAN), the mean of unseen text.
        false_discovery_rate: between 0 and 1.
        confidence: of the intervals, between 0 and 1.

    Returns:
        Verdict(verdict, before, after, low, high, certain, threshold, extraction).

    Raises:
        ArgumentError: as generalized_exposure; another number of entries than of texts; a negative `target_exposure`; a
            rate or confidence outside (0, 1); one of `extracted` and `non_member_extracted` alone.

    Example:
        >>> non_members = np.arange(1, 100)
        >>> verdict([0.5, 0.5, 50.5], [50.5, 1.5, 50.5], non_members).verdict.tolist()
        ['forgotten', 'still exposed', 'not memorized']

    See Also:
        generalized_exposure: the exposures. discoveries: the selection. left: which texts stand out.
    """
    if not target_exposure >= 0:
        raise ArgumentError(f"target_exposure must be 0 bits or more, got {target_exposure!r}")
    before = generalized_exposure(scores_before, non_member_scores, groups=groups)
    anchor = non_member_scores if non_member_scores_after is None else non_member_scores_after
    after = generalized_exposure(scores_after, anchor, groups=groups)
    if len(before.lower) != len(after.lower):
        raise ArgumentError(
            f"scores_before and scores_after must be of the same texts, got {len(before.lower)} and {len(after.lower)}"
        )
    n = len(before.lower)
    own_families = np.zeros(n) if families is None else _of_texts("families", families, n)
    memorized, thresholds = discoveries_within(own_families, before.lower, rate=false_discovery_rate)
    _, numbers = np.unique(own_families, return_inverse=True)
    over, over_thresholds = over_unlearned(before, after, 2 * numbers + memorized, rate=false_discovery_rate)
    over &= True if too_low is None else _of_texts("too_low", too_low, n).astype(bool)
    extraction = _extraction(extracted, non_member_extracted, groups, n)
    forgotten = after.lower <= target_exposure
    if extraction is not None:
        forgotten &= extraction <= max(target_exposure, NOT_EXTRACTED)
    if recited is not None:
        forgotten &= ~_of_texts("recited", recited, n).astype(bool)
    exposed, unknown = np.ones_like(forgotten), ~memorized
    if standing_out is not None:
        exposed = _of_texts("standing_out", standing_out, n).astype(bool)
        forgotten, unknown = forgotten & ~exposed, unknown & ~exposed
    name = np.select(
        [over, unknown, forgotten, exposed],
        ["over-unlearned", "not memorized", "forgotten", "still exposed"],
        "undecided",
    )

    of_before = exposure_interval(scores_before, non_member_scores, confidence=confidence, groups=groups)
    of_lower = exposure_interval(scores_after, anchor, confidence=confidence, groups=groups)
    of_upper = exposure_interval(scores_after, anchor, confidence=confidence, side="upper", groups=groups)
    bounds = zip(of_upper, of_before, of_lower, strict=True)
    low, high = (np.select([over, unknown], [u, b], x) for u, b, x in bounds)
    least = math.log2(1 / false_discovery_rate)
    was_memorized = of_before.low >= thresholds
    certain = np.select(
        [over, unknown, forgotten, exposed],
        [
            low >= over_thresholds,
            high < least,
            was_memorized & (high <= target_exposure),
            (was_memorized | ~memorized) & (low > (target_exposure if standing_out is None else SIGNIFICANT)),
        ],
        False,
    )
    threshold = float(thresholds.max(initial=least))
    return Verdict(name, before, after, low, high, certain, threshold, extraction)


def anchor_after(original: Floats, present: Floats, forms: NDArray[np.int64] | None = None) -> Floats:
    """Return the non-members' scores with which the scores of an unlearned model are compared.

    Those of the original model: text that unlearning made unlikely is no measure of what unseen text is. But a model
    that knows much by heart recites it in the place of unseen text, which becomes likelier once that is forgotten, as
    it would be had the model never learned it. Where it has become likelier by 0.1 nats a token or more on average, its
    present scores are taken.

    Args:
        original: (m,) low where a text is likely, under the original model.
        present: (m,) of the same texts under the unlearned model.
        forms: (m,) numbers of their forms, of which each is taken for itself; default: all are of one form.

    >>> anchor_after(np.array([2.0, 4.0]), np.array([2.5, 3.0])).tolist()
    [2.5, 3.0]
    >>> anchor_after(np.array([2.0, 4.0]), np.array([2.0, 3.9])).tolist()
    [2.0, 4.0]
    >>> anchor_after(np.array([2.0, 4.0]), np.array([9.0, 3.0])).tolist()
    [2.0, 4.0]
    >>> anchor_after(np.array([2.0, 4.0]), np.array([2.5, 3.0]), np.array([0, 1])).tolist()
    [2.0, 3.0]
    """
    forms = np.zeros(len(original), dtype=np.int64) if forms is None else forms
    anchor = original.copy()
    for form in np.unique(forms):
        own = forms == form
        if present[own].mean() < original[own].mean() - _LIKELIER:
            anchor[own] = present[own]
    return anchor


def over_unlearned(
    before: Exposure, after: Exposure, families: NDArray[Any], *, rate: float = 0.05
) -> tuple[NDArray[np.bool_], Floats]:
    """Select the texts that became less likely than unseen text in each family, such as the memorized and the others.

    Args:
        before: exposures under the original model.
        after: exposures under the unlearned model.
        families: (n,) equal for the texts of one family, such as whether they were memorized.
        rate: the false discovery rate in each.

    Returns:
        (n,) True for each selected text, and (n,) bits from which it was.
    """
    over, thresholds = discoveries_within(families, after.upper, rate=rate)
    return over & ~is_significant(before.upper), thresholds


def discoveries_within(
    families: NDArray[Any], exposures: Floats, *, rate: float = 0.05
) -> tuple[NDArray[np.bool_], Floats]:
    """Select the texts that stand out in each family, each for itself.

    Args:
        families: (n,) equal for the texts of one family.
        exposures: (n,) bits.
        rate: the false discovery rate in each.

    Returns:
        (n,) True for each selected text, and (n,) bits from which it is.
    """
    selected, thresholds = np.zeros(len(exposures), dtype=bool), np.zeros(len(exposures))
    for family in np.unique(families):
        own = families == family
        selected[own], thresholds[own] = discoveries(exposures[own], rate=rate)
    return selected, thresholds


def _extraction(
    extracted: ArrayLike | None, non_member_extracted: ArrayLike | None, groups: Groups | None, n: int
) -> Floats | None:
    """Return the exposures of the extracted shares of n texts, bits."""
    if (extracted is None) != (non_member_extracted is None):
        raise ArgumentError("extracted and non_member_extracted are compared with each other: give both or neither")
    if extracted is None or non_member_extracted is None:
        return None
    shares = _of_texts("extracted", as_floats("extracted", extracted), n)
    of_non_members = as_floats("non_member_extracted", non_member_extracted)
    return generalized_exposure(-shares, -of_non_members, groups=groups).lower


def _of_texts(name: str, values: ArrayLike, n: int) -> NDArray[Any]:
    """Return values as an array (n,); raise ArgumentError unless there is one for each text."""
    array = np.atleast_1d(np.asarray(values))
    if array.shape != (n,):
        raise ArgumentError(f"{name} must have one entry for each of the {n} texts, got shape {array.shape}")
    return array
