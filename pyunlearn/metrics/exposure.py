"""Exposure: how far a text stands out among texts of its kind that were never trained on, in bits.

Scores are low where a text is likely: negative log-likelihood, summed (the Secret Sharer's log-perplexity, whatever the logarithm) or mean per
token, min-k, or either less the same under a reference model (`calibrated_scores`). Give them in float32 or better: 16-bit scores tie.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyunlearn.errors import ArgumentError
from pyunlearn.metrics import _skew_normal
from pyunlearn.metrics._check import Floats, numbers, one_of, same_length
from pyunlearn.metrics._skew_normal import SkewNormalFit

NULL_MEAN = 1 / math.log(2)
"""Mean exposure, in bits, of a text exchangeable with its references (never trained on, or perfectly unlearned): 1 / ln 2 = 1.443."""

SIGNIFICANT = math.log2(20)
"""Exposure, in bits, that such a text reaches with probability 1/20: 4.32."""


class Exposure(NamedTuple):
    """Both sides, in bits, each an array with one number for each score, in the order of the scores."""

    lower: Floats
    """-log2 of the share of texts at least as likely: high = memorized."""
    upper: Floats
    """-log2 of the share of texts at least as unlikely: high = driven below what unseen text gets."""
    extrapolated: NDArray[np.bool_]
    """The number comes from the tail of a fitted law, beyond what the references can show."""
    fit: SkewNormalFit | None = None
    """That law and how well it fits the references; None where no law was asked for."""

    @property
    def two_sided(self) -> Floats:
        """-log2 of the two-sided p-value min(1, 2 min(p_lower, p_upper)): max(0, max(lower, upper) - 1). High = unlike unseen text either way."""
        return np.maximum(0.0, np.maximum(self.lower, self.upper) - 1)


def generalized_exposure(scores: ArrayLike, non_member_scores: ArrayLike, *, extrapolate: bool = False) -> Exposure:
    """The generalized exposure of scores (n,) among non_member_scores (m,), or (n, m) with a row of its own for each text; both sides, in bits.

        lower = log2(m + 1) - log2(1 + #{j : reference_j <= score}),   upper likewise with >=

    This is -log2 of a permutation p-value: if a text is exchangeable with its references, P(lower >= k) <= 2 ** -k and the mean is about
    1 / ln 2 = 1.443 bits. Range 0 to log2(m + 1); lower is high for memorized text, upper for text driven below unseen text. Ties count against
    the text on either side.

    *Anchored* exposure is this same function of other inputs: the current scores, and the references' scores under the original model, taken once.
    With references scored under the current model, exposure can fall to its null merely because everything like the text became improbable.

    Our formalisation after Carlini et al. 2019 (arXiv 1802.08232, section 4; the same number when the references enumerate the space), motivated
    by Baluta et al. 2024 (arXiv 2411.04388).

    Args:
        scores: (n,), low where a text is likely, raw or calibrated (then calibrate the references too).
        non_member_scores: (m,) shared by all texts, or (n, m).
        extrapolate: beyond log2(m + 1), where a text lies outside all its references, read the exposure off the tail of a skew-normal law fitted
            to them, and mark it `extrapolated`. A model of a tail, not a measurement: look at `fit`.

    Returns:
        Exposure(lower, upper, extrapolated, fit).

    Raises:
        ArgumentError: no references, a score that is not finite or has 16 bits, shapes that do not fit.
    """
    s, r = _scores("generalized_exposure", scores, non_member_scores)
    as_likely, as_unlikely = _counts(s, r)
    m = r.shape[-1]
    lower, upper = (math.log2(m + 1) - np.log2(1 + count) for count in (as_likely, as_unlikely))
    if not extrapolate:
        return Exposure(lower, upper, np.zeros(s.shape, dtype=bool))
    below, above = as_likely == 0, as_unlikely == 0
    rows = np.atleast_2d(r)
    law = _skew_normal.fit(rows, below | above if len(rows) == len(s) else np.array([(below | above).any()]))
    tail_lower, tail_upper = _tails(s, law)
    # where the fitted tail promises less than the count already shows, the count stands; NaN compares false
    far_below, far_above = below & (tail_lower > lower), above & (tail_upper > upper)
    return Exposure(
        np.where(far_below, tail_lower, lower), np.where(far_above, tail_upper, upper), far_below | far_above, law
    )


def exposure(score: ArrayLike, non_member_scores: ArrayLike, method: str = "rank") -> Exposure:
    """The exposure of a secret in the space that its references stand for, in bits (Carlini et al. 2019, arXiv 1802.08232, section 4).

        "rank"      log2 |R| - log2 rank. The references are all other secrets of the space, |R| = m + 1, rank = 1 + #{j : reference_j <= score}
        "sampling"  -log2 P(reference <= score), P estimated by the share among m references drawn from the space; none: 1 / m
        "skewnorm"  -log2 of the cumulative skew-normal law fitted to the m references, at the score; no upper end

    Range 0 to log2(m + 1), 0 to log2 m, 0 to infinity; high = memorized. `upper` is the same of the other side. Traps of public code: with m for
    |R| a secret less likely than all references has negative exposure (here 0 is the least), and sorted scores come back in another order (here
    they keep theirs). The skew-normal shape is fitted with a penalty that keeps it finite, and the tail summed in logarithms, so that no number of
    bits becomes infinite where the probability underflows.

    Args:
        score: of the secret, low where it is likely; one number or (n,).
        non_member_scores: (m,) of other secrets of the same format, without the secret itself; or (n, m).
        method: "rank", "sampling" or "skewnorm".

    Returns:
        Exposure(lower, upper, extrapolated, fit); `lower` is the exposure. With "skewnorm", `extrapolated` marks scores outside all references, and
        `fit.statistic` is the Kolmogorov-Smirnov distance of the references from the law, the paper's check of the fit.

    Raises:
        ArgumentError: no references, a score that is not finite or has 16 bits, shapes that do not fit, an unknown method; "skewnorm" of references that are all equal.
    """
    one_of("method", method, ("rank", "sampling", "skewnorm"))
    if method == "rank":
        return generalized_exposure(score, non_member_scores)
    s, r = _scores("exposure", score, non_member_scores)
    as_likely, as_unlikely = _counts(s, r)
    m = r.shape[-1]
    if method == "sampling":
        lower, upper = (math.log2(m) - np.log2(np.maximum(count, 1)) for count in (as_likely, as_unlikely))
        return Exposure(lower, upper, np.zeros(s.shape, dtype=bool))
    rows = np.atleast_2d(r)
    if (np.ptp(rows, axis=1) == 0).any():
        raise ArgumentError('method "skewnorm" needs references that differ, got equal ones: use "rank"')
    law = _skew_normal.fit(rows, np.ones(len(rows), dtype=bool))
    return Exposure(*_tails(s, law), (as_likely == 0) | (as_unlikely == 0), law)


def calibrated_scores(scores: ArrayLike, reference_model_scores: ArrayLike) -> Floats:
    """score - score under a reference model, (n,): what is left when a text's own difficulty is taken off. Unit of the scores, low = memorized.

    The reference model must not have been trained on the texts. Exposure of calibrated scores takes calibrated references.

    Raises:
        ArgumentError: different lengths, a score that is not finite or has 16 bits.
    """
    _require_wide(scores, reference_model_scores)
    s, base = numbers("scores", scores), numbers("reference_model_scores", reference_model_scores)
    same_length("scores", s, "reference_model_scores", base)
    return s - base


def _scores(function: str, scores: ArrayLike, non_member_scores: ArrayLike) -> tuple[Floats, Floats]:
    """(n,) and (m,) or (n, m), checked."""
    _require_wide(scores, non_member_scores)
    s = np.asarray(scores, dtype=np.float64).reshape(-1)
    r = np.asarray(non_member_scores, dtype=np.float64)
    r = r if r.ndim == 2 else r.reshape(-1)
    if r.shape[-1] == 0:
        raise ArgumentError(f"{function} needs at least one reference score, got none")
    if r.ndim == 2 and len(r) != len(s):
        raise ArgumentError(
            f"{function} needs non_member_scores of shape (m,), or ({len(s)}, m) with a row for each score, got {r.shape}"
        )
    if not (np.isfinite(s).all() and np.isfinite(r).all()):
        raise ArgumentError(f"{function} needs finite scores, got NaN or Inf")
    return s, r


def _require_wide(*scores: object) -> None:
    """Raises ArgumentError for scores in 16 bits: rounded to three digits they tie, and each tie lowers an exposure."""
    for values in scores:
        kind = str(getattr(values, "dtype", "")).removeprefix("torch.")
        if kind in ("float16", "bfloat16"):
            raise ArgumentError(f"scores must be float32 or float64, got {kind}, in which they tie: compute them wider")


def _counts(s: Floats, r: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(n,) each: references at least as likely, and at least as unlikely."""
    if r.ndim == 2:
        return (r <= s[:, None]).sum(1), (r >= s[:, None]).sum(1)
    r = np.sort(r)
    return np.searchsorted(r, s, side="right"), r.size - np.searchsorted(r, s, side="left")


def _tails(s: Floats, law: SkewNormalFit) -> tuple[Floats, Floats]:
    """-log2 of the fitted law's two tails at each score."""
    return tuple(-f(s, law) / math.log(2) + 0.0 for f in (_skew_normal.log_cdf, _skew_normal.log_survival))  # type: ignore[return-value]
