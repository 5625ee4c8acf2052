"""Privacy: how well an attack tells the forget set from text that was never trained on, and MUSE's PrivLeak.

Scores are those of `attacks`: LOW = more likely a member.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

from pyunlearn.errors import ArgumentError
from pyunlearn.metrics._binomial import clopper_pearson
from pyunlearn.metrics._bounded_mean import bounded_mean
from pyunlearn.metrics._check import Floats, at_least_one, between, numbers, one_of, same_length
from pyunlearn.metrics.confidence import FEWEST, Interval, percentiles, tail

_AT_ONCE = 2**22  # resampled numbers in memory at a time
_FEW = 100  # texts of a side up to which auc also uses the interval of that side alone


class TruePositiveRate(NamedTuple):
    """True-positive rate at a false-positive rate, with its interval: the result of tpr_at_fpr."""

    estimate: float
    """Share of the forget set called members, 0 to 1; high = exposed."""
    low: float
    """Low end of the interval of the rate at `fpr`; NaN where not `resolved`."""
    high: float
    threshold: float
    """Texts that score below it are called members."""
    fpr: float
    """False-positive rate of this threshold on the holdout: at most the requested one."""
    resolved: bool
    """True where the holdout is large enough for that rate: at least 1 / fpr texts."""


def auc(forget: ArrayLike, holdout: ArrayLike, *, confidence: float = 0.95, members: str = "low") -> Interval:
    """Compute the area under the ROC curve of an attack: forget set against holdout.

        P(a holdout text scores above a forget text) + 1/2 P(they tie)

    From mid-ranks, so ties count one half. The interval is DeLong's on the logit scale, with Student's t for its
    variance (Satterthwaite's degrees of freedom); a side of 100 texts or fewer, whose shares are skewed where the area
    is near 0 or 1, widens it to mean_interval's for that side alone. Where the variance is 0 (perfect separation, all
    tied, one text on a side) that would have no width, and the interval is Clopper-Pearson's for the
    min(n_forget, n_holdout) pairs that share no text.

    Args:
        forget: (n,) scores, low = more likely a member.
        holdout: (m,) of text from the same source that was never trained on: otherwise the area measures the difference
            of sources.
        confidence: of the interval, between 0 and 1.
        members: "low" where low scores mean members (all of `attacks`), "high" the other way round.

    Returns:
        Interval(estimate, low, high), 0 to 1: 1 = every forget text is identified, 0.5 = chance, 0 = driven below
        unseen text, which identifies the forget texts too.

    Raises:
        ArgumentError: an empty side, NaN or Inf, an unknown choice.

    Example:
        >>> round(auc([0.1, 0.2, 0.9], [0.8, 1.0, 1.2]).estimate, 3)
        0.889

    See Also:
        tpr_at_fpr: the attack's success at few false alarms. privleak: the area against a retrained model's.

    Source: DeLong et al. 1988, Biometrics 44, 837-845.
    """
    f, h = _sides(forget, holdout, members)
    between("confidence", confidence, 0, 1)
    ranks = stats.rankdata(np.concatenate([f, h]))
    of_forget = 1 - (ranks[: f.size] - stats.rankdata(f)) / h.size  # share of the holdout above each forget text
    of_holdout = (ranks[f.size :] - stats.rankdata(h)) / f.size
    area = float(of_holdout.mean())
    parts = [x.var(ddof=1) / x.size if min(f.size, h.size) > 1 else 0.0 for x in (of_forget, of_holdout)]
    variance = float(sum(parts))
    if variance < 1e-24 or not 1e-12 < area < 1 - 1e-12:
        pairs = min(f.size, h.size)
        low, high = clopper_pearson(area * pairs, pairs, confidence)
        return Interval(area, float(low), float(high))
    freedom = variance**2 / (parts[0] ** 2 / (f.size - 1) + parts[1] ** 2 / (h.size - 1))  # Satterthwaite's
    width = stats.t.ppf((1 + confidence) / 2, freedom) * np.sqrt(variance) / (area * (1 - area))
    ends = [special.expit(special.logit(area) + np.array([-width, width]))]
    ends += [bounded_mean(x, confidence, seed=0, draws=500) for x in (of_forget, of_holdout) if x.size <= _FEW]
    return Interval(area, float(min(low for low, _ in ends)), float(max(high for _, high in ends)))


def tpr_at_fpr(
    forget: ArrayLike, holdout: ArrayLike, fpr: float = 0.01, *, confidence: float = 0.95, members: str = "low"
) -> TruePositiveRate:
    """Compute the share of the forget set below the best threshold that calls at most `fpr` of the holdout members.

    The threshold is a step of the empirical ROC curve, not interpolated: with fewer than 1 / fpr holdout texts it is
    "below all of them", `resolved` is False and there is no interval. A text that ties with a holdout text beyond the
    allowance does not count.

    The interval is that of the rate at exactly `fpr` for new texts of both kinds. The number of holdout texts below the
    true threshold is K ~ Binomial(m, fpr), so that this lies between the K-th and the (K + 1)-th lowest of them: the
    ends are quantiles of Clopper-Pearson's Beta laws for the forget texts below those, mixed over K. It covers with
    at least the stated probability; one that takes the threshold as known covers 32 to 81 % for 400 texts against 199.

    Args:
        forget: (n,) scores, low = more likely a member.
        holdout: (m,) of text from the same source that was never trained on.
        fpr: false-positive rate allowed, between 0 and 1; customary are 0.01 and 0.001.
        confidence: of the interval, between 0 and 1.
        members: "low" where low scores mean members, "high" the other way round (the threshold is then that of -score).

    Returns:
        TruePositiveRate(estimate, low, high, threshold, fpr, resolved), 0 to 1; `fpr` itself = chance, high = exposed.
        Ends NaN where not resolved.

    Raises:
        ArgumentError: as `auc`; an fpr outside (0, 1).

    Example:
        >>> rate = tpr_at_fpr([0.0, 0.5, 9.0, 9.0], range(1, 11), fpr=0.1)
        >>> rate.estimate, rate.fpr, rate.resolved
        (0.5, 0.1, True)

    See Also:
        auc: over all thresholds.

    Source: Carlini et al. 2022, arXiv 2112.03570.
    """
    f, h = _sides(forget, holdout, members)
    between("confidence", confidence, 0, 1)
    between("fpr", fpr, 0, 1)
    allowed = min(int(fpr * h.size + 1e-9), h.size - 1)
    threshold = np.sort(h)[allowed]
    positives = int((f < threshold).sum())
    estimate, attained = positives / f.size, float((h < threshold).mean())
    low, high = _rate_interval(f, h, fpr, confidence) if allowed else (np.nan, np.nan)
    if allowed:
        low, high = min(low, estimate), max(high, estimate)
    return TruePositiveRate(estimate, low, high, float(threshold), attained, allowed >= 1)


def _rate_interval(forget: Floats, holdout: Floats, fpr: float, confidence: float) -> tuple[float, float]:
    """Compute the interval of P(forget < t) at the t with P(holdout < t) = fpr."""
    n, m, tail = forget.size, holdout.size, (1 - confidence) / 2
    first, last = stats.binom.ppf([1e-9, 1 - 1e-9], m, fpr)
    below = np.arange(int(first), int(last) + 1)  # K, (k,)
    weights = stats.binom.pmf(below, m, fpr)
    ends = np.concatenate([[-np.inf], np.sort(holdout), [np.inf]])
    least, most = (np.searchsorted(np.sort(forget), ends[below + more], side="left") for more in (0, 1))
    return _mixed_quantile(least, n - least + 1, weights, tail), _mixed_quantile(most + 1, n - most, weights, 1 - tail)


def _mixed_quantile(a: NDArray[np.int64], b: NDArray[np.int64], weights: Floats, level: float) -> float:
    """Compute a quantile of Beta(a, b) laws mixed with these weights; a = 0 is all at 0, b = 0 all at 1."""

    def excess(x: float) -> float:
        cdf = np.where(a <= 0, 1.0, np.where(b <= 0, 0.0, stats.beta.cdf(x, np.maximum(a, 1), np.maximum(b, 1))))
        return float(weights @ cdf / weights.sum() - level)

    if excess(0.0) >= 0 or excess(1 - 1e-12) <= 0:
        return float(excess(0.0) < 0)
    return float(optimize.brentq(excess, 0.0, 1.0 - 1e-12, xtol=1e-9))


def privleak(auc: float, auc_retrained: float = 0.5) -> float:
    """Compute MUSE's PrivLeak in percent: how far an attack's area lies from that under a retrained model.

        100 (A - A_retrained) / A_retrained,   A = 1 - auc

    Trap: MUSE's area is that of the forget set being the *less* exposed, one minus ours (1 = identified) and minus most
    people's. MUSE's attack is `min_k_score` with k = 0.4.

    Args:
        auc: area under the unlearned model, `auc(...).estimate`, 0 to 1.
        auc_retrained: the same under the retrained model; 0.5, chance, where there is none (as in open-unlearning).

    Returns:
        Percent: about 0 = as retrained; -100 = under-unlearned (auc 1); above 0 = over-unlearned, up to
        100 auc_retrained / (1 - auc_retrained), 100 at 0.5.

    Raises:
        ArgumentError: an area outside 0 to 1; auc_retrained 1, against which nothing can be measured.

    Example:
        >>> round(privleak(0.9, auc_retrained=0.5))
        -80

    See Also:
        privleak_interval: from the scores, with an interval.

    Source: Shi et al. 2024, arXiv 2407.06460.
    """
    for name, value in (("auc", auc), ("auc_retrained", auc_retrained)):
        if not 0 <= value <= 1:
            raise ArgumentError(f"{name} must lie from 0 to 1, got {value!r}")
    if auc_retrained == 1:
        raise ArgumentError(
            "auc_retrained must be below 1, got 1: the attack identifies every forget text under the retrained model: "
            "check that it never saw them"
        )
    return 100 * ((1 - auc) / (1 - auc_retrained) - 1)


def privleak_interval(
    forget: ArrayLike,
    holdout: ArrayLike,
    forget_retrained: ArrayLike | None = None,
    holdout_retrained: ArrayLike | None = None,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    draws: int = 1000,
    members: str = "low",
) -> Interval:
    """Compute PrivLeak in percent from the scores, with an interval.

        privleak(auc(forget, holdout), auc(forget_retrained, holdout_retrained))

    Without retrained scores the second area is 0.5, and the ends are those of the interval of `auc`. With them the
    interval is a percentile bootstrap: texts of the forget set and of the holdout are resampled with replacement, each
    text with its scores under both models, because easy texts are easy under both and the areas rise and fall together.
    A resample whose retrained area is 1 has no PrivLeak, and counts as -100 for the lower end and as
    infinite for the upper. Where an area is 0 or 1 no resample differs, and those of fewer than 6 texts do not reach
    far enough; the interval then spans what `auc`'s own intervals leave open, and is wide.

    Args:
        forget: (n,) scores under the unlearned model, low = more likely a member.
        holdout: (m,) of text that was never trained on.
        forget_retrained: (n,) of the same forget texts under the retrained model; both or neither of the two.
        holdout_retrained: (m,) of the same holdout texts under it.
        confidence: between 0 and 1.
        seed: the same seed returns the same interval.
        draws: number of resamples.
        members: "low" where low scores mean members, "high" the other way round.

    Returns:
        Interval(estimate, low, high), percent; 0 = as retrained, below = under-unlearned, above = over-unlearned. NaN
        ends where a side is one text.

    Raises:
        ArgumentError: as auc and privleak; scores of other texts, or of one side alone, under the retrained model.

    Example:
        >>> privleak_interval([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]).estimate
        0.0

    See Also:
        privleak: from two areas.

    Source: Shi et al. 2024, arXiv 2407.06460; the interval: Efron and Tibshirani 1993, chapter 13.
    """
    between("confidence", confidence, 0, 1)
    at_least_one(draws=draws)
    if (forget_retrained is None) != (holdout_retrained is None):
        raise ArgumentError("forget_retrained and holdout_retrained must be passed both or neither, got one of them")
    pairs = [_sides(forget, holdout, members)]
    if forget_retrained is not None and holdout_retrained is not None:
        pairs.append(_sides(forget_retrained, holdout_retrained, members))
        same_length("forget", pairs[0][0], "forget_retrained", pairs[1][0])
        same_length("holdout", pairs[0][1], "holdout_retrained", pairs[1][1])
    areas = [auc(*pair, confidence=confidence) for pair in pairs]
    estimate = privleak(*(area.estimate for area in areas))
    n, m = (side.size for side in pairs[0])
    if min(n, m) == 1:
        return Interval(estimate, np.nan, np.nan)
    if len(pairs) == 1:
        return Interval(estimate, privleak(areas[0].high), privleak(areas[0].low))
    rng, drawn = np.random.default_rng(seed), []
    for start in range(0, draws, step := max(1, _AT_ONCE // (n + m))):
        times = [rng.multinomial(k, np.full(k, 1 / k), min(step, draws - start)) for k in (n, m)]
        drawn.append([_areas(*pair, *times) for pair in pairs])
    complements = 1 - np.concatenate(drawn, axis=1)  # A = 1 - auc of each resample, one row per model
    none = complements[1] < 1e-12
    leaks = 100 * (complements[0] / np.where(none, 1, complements[1]) - 1)
    low, high = (
        percentiles(np.where(none, x, leaks), tail(confidence, min(n, m)))[end]
        for end, x in enumerate((-100.0, np.inf))
    )
    if min(n, m) < FEWEST or any(not 1e-12 < area.estimate < 1 - 1e-12 for area in areas):
        corners = [privleak(a, r) if r < 1 else np.inf for a in areas[0][1:] for r in areas[1][1:]]
        low, high = min(low, *corners), max(high, *corners)
    return Interval(estimate, low, high)


def _areas(
    forget: Floats, holdout: Floats, forget_times: NDArray[np.int64], holdout_times: NDArray[np.int64]
) -> Floats:
    """Compute the area of each resample, (draws,), from the copies of each text in it, (draws, n) and (draws, m)."""
    order = np.argsort(holdout)
    below = np.pad(np.cumsum(holdout_times[:, order], axis=1), ((0, 0), (1, 0)))  # of the k lowest holdout texts
    left, right = (np.searchsorted(holdout[order], forget, side=side) for side in ("left", "right"))
    above = holdout.size - (below[:, left] + below[:, right]) / 2  # ties count one half
    return (forget_times * above).sum(1) / (forget.size * holdout.size)


def _sides(forget: ArrayLike, holdout: ArrayLike, members: str) -> tuple[Floats, Floats]:
    """Check the scores of members and non-members; return both with the sign for which low means member."""
    one_of("members", members, ("low", "high"))
    sign = 1.0 if members == "low" else -1.0
    return sign * numbers("forget", forget, empty=False), sign * numbers("holdout", holdout, empty=False)
