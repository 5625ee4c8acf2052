"""Exposure: how far a text stands out, in bits, among texts of its kind that were never trained on (non-members).

Scores are low where a text is likely: negative log-likelihood, summed (the Secret Sharer's log-perplexity, in any base)
or mean per token, min-k, or either minus the same under a reference model (`calibrated_scores`). Pass float32 or
wider: 16-bit scores tie.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyunlearn.errors import ArgumentError
from pyunlearn.metrics import _skew_normal
from pyunlearn.metrics._check import Floats, as_floats, numbers, one_of, same_length
from pyunlearn.metrics._skew_normal import SkewNormalFit

NULL_MEAN = 1 / math.log(2)
"""Mean exposure, in bits, of a text that is exchangeable with its non-members, as if never trained on: 1.443."""

SIGNIFICANT = math.log2(20)
"""Exposure, in bits, that a text like that reaches with probability 1/20: 4.32."""


def is_significant(exposure: Floats) -> NDArray[np.bool_]:
    """Return which exposures (n,), in bits, are SIGNIFICANT or more, up to rounding: 19 non-members reach it exactly.

    >>> is_significant(np.log2([19, 20, 21]) + [0, -1e-15, 0]).tolist()
    [False, True, True]
    """
    significant: NDArray[np.bool_] = exposure >= SIGNIFICANT - 1e-9
    return significant


class Exposure(NamedTuple):
    """Exposures on both sides, in bits: arrays with one number per score, in the order of the scores."""

    lower: Floats
    """-log2 of the share of texts at least as likely: high = memorized."""
    upper: Floats
    """-log2 of the share of texts at least as unlikely: high = driven below unseen text."""
    extrapolated: NDArray[np.bool_]
    """True where the number comes from the tail of a fitted law, beyond what the non-members can show."""
    fit: SkewNormalFit | None = None
    """That law and how well it fits the non-members; None where no law was fitted."""

    @property
    def two_sided(self) -> Floats:
        """-log2 of the two-sided p-value min(1, 2 min(p_lower, p_upper)): max(0, max(lower, upper) - 1)."""
        return np.maximum(0.0, np.maximum(self.lower, self.upper) - 1)


Counts = NDArray[np.int64]
Groups = tuple[ArrayLike, ArrayLike]
"""(n,) and (m,) numbers: a score is compared with the non-members of its own group alone."""


def generalized_exposure(
    scores: ArrayLike, non_member_scores: ArrayLike, *, groups: Groups | None = None, extrapolate: bool = False
) -> Exposure:
    """Compute the generalized exposure of scores among the scores of non-members, on both sides, in bits.

        lower = log2(m + 1) - log2(1 + #{j : non_member_j <= score}),   upper likewise with >=

    This is -log2 of a permutation p-value: if a text is exchangeable with its non-members, P(lower >= k) <= 2 ** -k and
    the mean is about 1 / ln 2 = 1.443 bits. Ties count against the text on either side.

    *Anchored* exposure is this function of other inputs: the current scores, and the non-members' scores under the
    original model, computed once. With non-members scored under the current model, exposure can fall to its null
    merely because all similar text became improbable.

    Args:
        scores: (n,), low where a text is likely, raw or calibrated (then calibrate the non-members too).
        non_member_scores: (m,) shared by all texts, or (n, m) with a row for each text.
        groups: numbers (n,) of the scores and (m,) of the non-members: each score is compared with the non-members of
            its group alone, such as the same form of other texts. Default: with all of them.
        extrapolate: where a text lies outside all its non-members, read the exposure off the tail of a skew-normal law
            fitted to them, at most 2 log2(m + 1) bits, and mark it `extrapolated`. A model of a tail, not a
            measurement: for Student's t law with 5 degrees of freedom it shows 278 bits where 20 are true, and m scores
            cannot tell which law they come from. `exposure(method="skewnorm")` is the law's number without that limit.

    Returns:
        Exposure(lower, upper, extrapolated, fit), 0 to log2(m + 1) bits, twice that where extrapolated. Lower is high
        for memorized text, upper for text driven below unseen text.

    Raises:
        ArgumentError: no non-members, in a group either; NaN, Inf or 16-bit scores; shapes that do not match; groups
            together with `extrapolate` or a row of non-members for each text.

    Example:
        >>> bits = generalized_exposure([0.5, 2.5], [1.0, 2.0, 3.0])
        >>> bits.lower.round(3).tolist(), bits.upper.round(3).tolist()
        ([2.0, 0.415], [0.0, 1.0])
        >>> generalized_exposure([2.5, 2.5], [1.0, 2.0, 3.0], groups=([0, 1], [0, 0, 1])).lower.tolist()
        [0.0, 1.0]

    See Also:
        verdict: thresholds on the exposure. exposure_interval: its confidence interval. exposure: the Secret Sharer's.

    Source: ours, after Carlini et al. 2019, arXiv 1802.08232, section 4 (the same number when the non-members enumerate
        the space), motivated by Baluta et al. 2024, arXiv 2411.04388.
    """
    s, r = check_scores("generalized_exposure", scores, non_member_scores)
    as_likely, as_unlikely, m = count_in_groups(s, r, groups)
    most = math.log2(m + 1) if groups is None else np.log2(m + 1)
    lower, upper = (most - np.log2(1 + count) for count in (as_likely, as_unlikely))
    if not extrapolate:
        return Exposure(lower, upper, np.zeros(s.shape, dtype=bool))
    if groups is not None:
        raise ArgumentError(
            "extrapolate fits one law to all non-members, and groups divide them: leave one of them out"
        )
    below, above = as_likely == 0, as_unlikely == 0
    rows = np.atleast_2d(r)
    law = _skew_normal.fit(rows, below | above if len(rows) == len(s) else np.array([(below | above).any()]))
    tail_lower, tail_upper = (np.minimum(tail, 2 * most) for tail in _tails(s, law))
    # The count is a lower bound: a fitted tail below it is not used. NaN compares false.
    far_below, far_above = below & (tail_lower > lower), above & (tail_upper > upper)
    return Exposure(
        np.where(far_below, tail_lower, lower), np.where(far_above, tail_upper, upper), far_below | far_above, law
    )


def exposure(score: ArrayLike, non_member_scores: ArrayLike, method: str = "rank") -> Exposure:
    """Compute the Secret Sharer's exposure of a secret in the space that its non-members stand for, in bits.

        "rank"      log2 |R| - log2 rank. The non-members are all other secrets of the space: |R| = m + 1,
                    rank = 1 + #{j : non_member_j <= score}
        "sampling"  -log2 P(non-member <= score), P estimated by the share among m draws from the space; none: 1 / m
        "skewnorm"  -log2 of the cumulative skew-normal law fitted to the m non-members, at the score

    Traps of public code: with m for |R| a secret less likely than all others has negative exposure (here 0 is the
    least), and sorted scores come back in another order (here the order is that of the scores). The skew-normal shape
    is fitted with a penalty that makes it finite, and the tail is summed in logarithms, so that no number of bits
    becomes infinite where the probability underflows.

    Args:
        score: score of the secret, low where it is likely; one number or (n,).
        non_member_scores: (m,) of other secrets of the same format, without the secret itself; or (n, m).
        method: "rank", "sampling" or "skewnorm".

    Returns:
        Exposure(lower, upper, extrapolated, fit); `lower` is the exposure, high = memorized: 0 to log2(m + 1), 0 to
        log2 m, or 0 to infinity. With "skewnorm", `extrapolated` marks scores outside all non-members, and
        `fit.statistic` is the Kolmogorov-Smirnov distance of the non-members from the law: the paper's check.

    Raises:
        ArgumentError: no non-members, NaN, Inf or 16-bit scores, shapes that do not match, an unknown method;
            "skewnorm" with non-members that are all equal.

    Example:
        >>> exposure(0.5, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]).lower.tolist()
        [3.0]

    See Also:
        make_canaries: secrets and non-members of one format. generalized_exposure: for any text.

    Source: Carlini et al. 2019, arXiv 1802.08232, section 4.
    """
    one_of("method", method, ("rank", "sampling", "skewnorm"))
    if method == "rank":
        return generalized_exposure(score, non_member_scores)
    s, r = check_scores("exposure", score, non_member_scores)
    as_likely, as_unlikely = count_sides(s, r)
    m = r.shape[-1]
    if method == "sampling":
        lower, upper = (math.log2(m) - np.log2(np.maximum(count, 1)) for count in (as_likely, as_unlikely))
        return Exposure(lower, upper, np.zeros(s.shape, dtype=bool))
    rows = np.atleast_2d(r)
    if (np.ptp(rows, axis=1) == 0).any():
        raise ArgumentError('method "skewnorm" needs non-members that differ, got equal ones: use "rank"')
    law = _skew_normal.fit(rows, np.ones(len(rows), dtype=bool))
    return Exposure(*_tails(s, law), (as_likely == 0) | (as_unlikely == 0), law)


def calibrated_scores(scores: ArrayLike, reference_model_scores: ArrayLike) -> Floats:
    """Subtract the scores under a reference model, which removes each text's own difficulty. Low = memorized.

    The reference model must not have been trained on the texts. Exposure of calibrated scores takes calibrated
    non-members.

    Args:
        scores: (n,) under the measured model.
        reference_model_scores: (n,) of the same texts under the reference model.

    Returns:
        (n,), in the unit of the scores.

    Raises:
        ArgumentError: different lengths, NaN, Inf or 16-bit scores.

    Example:
        >>> calibrated_scores([0.5, 4.0], [3.0, 4.0]).tolist()
        [-2.5, 0.0]

    See Also:
        reference_score: the same as an attack on log-likelihoods.

    Source: ours; the calibration of Watson et al. 2021, arXiv 2111.08440.
    """
    _require_wide(scores, reference_model_scores)
    s, base = numbers("scores", scores), numbers("reference_model_scores", reference_model_scores)
    same_length("scores", s, "reference_model_scores", base)
    return s - base


def check_scores(function: str, scores: ArrayLike, non_member_scores: ArrayLike) -> tuple[Floats, Floats]:
    """Return scores as (n,) and non-member scores as (m,) or (n, m), float64; raise ArgumentError on a mismatch."""
    _require_wide(scores, non_member_scores)
    s, r = as_floats("scores", scores), as_floats("non_member_scores", non_member_scores)
    if s.ndim > 1 or r.ndim > 2:
        raise ArgumentError(
            f"{function} needs scores of shape (n,) and non_member_scores of shape (m,) or (n, m), got {s.shape} and "
            f"{r.shape}"
        )
    s, r = s.reshape(-1), r if r.ndim == 2 else r.reshape(-1)
    if r.shape[-1] == 0:
        raise ArgumentError(f"{function} needs at least one non-member score, got none")
    if r.ndim == 2 and len(r) != len(s):
        raise ArgumentError(
            f"{function} needs non_member_scores of shape (m,), or ({len(s)}, m) with a row for each score, got "
            f"{r.shape}"
        )
    if not (np.isfinite(s).all() and np.isfinite(r).all()):
        raise ArgumentError(f"{function} needs finite scores, got NaN or Inf")
    return s, r


def count_sides(s: Floats, r: Floats) -> tuple[Counts, Counts]:
    """Count for each score, (n,) each, the non-members at least as likely and those at least as unlikely."""
    if r.ndim == 2:
        return (r <= s[:, None]).sum(1), (r >= s[:, None]).sum(1)
    r = np.sort(r)
    return np.searchsorted(r, s, side="right"), r.size - np.searchsorted(r, s, side="left")


def count_in_groups(s: Floats, r: Floats, groups: Groups | None) -> tuple[Counts, Counts, Any]:
    """Count as `count_sides` does, each score among the non-members of its group; and how many these are, (n,) or ().

    Raises ArgumentError for groups that are no numbers of the scores and the non-members, or have no non-member.
    """
    if groups is None:
        return *count_sides(s, r), r.shape[-1]
    of_scores, own = map(np.asarray, groups)
    if r.ndim == 2 or of_scores.shape != s.shape or own.shape != r.shape:
        raise ArgumentError(
            f"groups must be numbers of {s.size} scores and of the non-members that all scores share, got shapes "
            f"{of_scores.shape} and {own.shape} for {r.shape}"
        )
    as_likely, as_unlikely, m = np.zeros((3, s.size), dtype=np.int64)
    for group in np.unique(of_scores):
        mine, others = of_scores == group, r[own == group]
        if not others.size:
            raise ArgumentError(f"group {group} of the scores has no non-member: each group needs some of its own")
        as_likely[mine], as_unlikely[mine] = count_sides(s[mine], others)
        m[mine] = others.size
    return as_likely, as_unlikely, m


def _require_wide(*scores: object) -> None:
    """Raise ArgumentError for 16-bit scores: rounded to three digits they tie, and each tie lowers an exposure."""
    for values in scores:
        kind = str(getattr(values, "dtype", "")).removeprefix("torch.")
        if kind in ("float16", "bfloat16"):
            raise ArgumentError(f"scores must be float32 or float64, got {kind}, in which they tie: compute them wider")


def _tails(s: Floats, law: SkewNormalFit) -> tuple[Floats, Floats]:
    """Compute -log2 of the fitted law's two tails at each score."""
    below, above = (-f(s, law) / math.log(2) + 0.0 for f in (_skew_normal.log_cdf, _skew_normal.log_survival))
    return below, above
