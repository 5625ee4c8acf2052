"""Tests of a whole set: its exposures against unseen text and against a retrained model, and the non-members' drift."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from pyunlearn.metrics._check import Floats, at_least_one, numbers, same_length
from pyunlearn.metrics.confidence import Interval, mean_interval
from pyunlearn.metrics.mean_exposure import mean_exposure_interval, rank_counts

_AT_ONCE = 2**22  # simulated counts in memory at a time
WEIGHTS = {1: 1, 2: 5, 3: 5, 5: 5, 10: 5, 20: 5}  # order statistics in exposure_top_test -> factor on their p-values


class ExposureTest(NamedTuple):
    """Outcome of exposure_null_test and exposure_two_sample_test."""

    statistic: float
    """Kolmogorov-Smirnov distance, 0 to 1; low = alike."""
    pvalue: float
    """Share of the null's statistics at least as large; never 0, at least 1 / (draws + 1)."""
    mean: float
    """Mean exposure of the set, bits; 1.443 for unseen text and many non-members."""
    n: int
    """Texts in the set: with few, only a large distance is significant."""
    mean_interval: Interval
    """The mean with the 95 % interval of mean_exposure_interval: texts and non-members are drawn. NaN ends for one
    text, and where exposure_two_sample_test was not told the number of non-members."""


class TopTest(NamedTuple):
    """Outcome of exposure_top_test."""

    pvalue: float
    """Chance of a set of unseen text that stands out as much; never 0, at least 1 / (draws + 1)."""
    exact_pvalue: float
    """The same for `beyond` alone, by a formula; more than `pvalue` where many texts stand out a little."""
    beyond: int
    """Texts that are more likely than every non-member."""
    n: int
    """Texts in the set."""


def exposure_top_test(
    exposures: ArrayLike, non_members: int, *, shared: bool = True, draws: int = 2000, seed: int = 0
) -> TopTest:
    """Test if more texts of a set stand out than would of unseen text: the test for a few memorized among many.

    Let K_j be the number of texts that are more likely than the j-th most likely of the m non-members. If all n + m are
    draws of one law, of any kind, then among the k + j - 1 most likely of them there are at most j - 1 non-members
    exactly where K_j >= k, so

        P(K_j >= k) = P(H <= j - 1),  H ~ Hypergeometric(k + j - 1 of n + m, m of them non-members)
        P(K_1 >= k) = prod over i < k of (n - i) / (n + m - i)

    K_1 has an exact p-value: of 20 among 400 texts that are 4 standard deviations likelier than the rest it sees 77 %
    with 64 shared non-members and 99 % with 199, where exposure_null_test sees 4 and 7 %. The statistic of `pvalue` is
    the smallest of P(K_1 >= k_1) and 5 P(K_j >= k_j) over j = 2, 3, 5, 10, 20, which also sees many texts that stand
    out a little; its null is simulated. Where each text has its own non-members, K_j is binomial.

    Args:
        exposures: (n,) bits, `lower` of generalized_exposure; extrapolated ones count as log2(m + 1).
        non_members: m, the number of non-members behind each exposure.
        shared: True where all texts had the same non-members, False where each had its own.
        draws: simulations.
        seed: the same seed returns the same p-value.

    Returns:
        TopTest(pvalue, exact_pvalue, beyond, n); low p-values = too many stand out for unseen text.

    Raises:
        ArgumentError: as exposure_null_test.

    Example:
        >>> exposures = [np.log2(100)] * 3 + [1.0] * 57  # 3 of 60 texts beyond all of 99 non-members
        >>> test = exposure_top_test(exposures, non_members=99)
        >>> test.beyond, round(test.exact_pvalue, 3)
        (3, 0.052)

    See Also:
        exposure_null_test: differences of any kind. verdict: which texts stand out.
    """
    counts, n = rank_counts(exposures, non_members, draws), np.size(exposures)
    tails = {j: factor * tail(j, n, non_members, shared) for j, factor in WEIGHTS.items() if j <= non_members}

    def smallest(simulated: NDArray[np.int64]) -> Floats:  # (draws, m + 1) -> (draws,)
        reached = np.cumsum(simulated, axis=1)
        best: Floats = np.min([tail[reached[:, j - 1]] for j, tail in tails.items()], axis=0)
        return best

    null = np.concatenate([smallest(simulated) for simulated in _simulated(n, non_members, shared, draws, seed)])
    statistic = float(smallest(counts[None])[0])
    pvalue = _share(-statistic, -null * (1 - 1e-9))
    return TopTest(pvalue, float(tails[1][counts[0]]), int(counts[0]), n)


def exposure_null_test(
    exposures: ArrayLike, non_members: int, *, shared: bool = True, draws: int = 2000, seed: int = 0
) -> ExposureTest:
    """Test if the exposures of a set could be those of unseen text.

        statistic = sup over k of |share of exposures >= k - 2^-k|

    This is the Kolmogorov-Smirnov distance from Exponential(rate ln 2), the law of exposure among infinitely many
    non-members. Among m non-members exposure takes only the m + 1 values log2((m + 1) / rank), and texts that share
    their non-members rise and fall together, so the usual p-value would be wrong twice. Here the null is simulated:
    ranks of n texts among m non-members when all n + m are draws of one law, of any kind (shared), or n independent
    uniform ranks (each text with its own non-members). The p-value is exact up to its draws, for scores without ties.

    Mean exposure alone is no sign of health: after a model collapses it returns to 1.1 to 1.6. The test does not suit
    texts that a loop drove until each reached 1.443 bits: they gather there, where unseen text would spread. Compare
    with a retrained model then.

    Args:
        exposures: (n,) bits, `lower` or `upper` of generalized_exposure; extrapolated ones count as log2(m + 1).
        non_members: m, the number of non-members behind each exposure.
        shared: True where all texts had the same non-members, False where each had its own.
        draws: simulations, of the null and for the interval of the mean.
        seed: the same seed returns the same p-value.

    Returns:
        ExposureTest(statistic, pvalue, mean, n, mean_interval); a high p-value and a low statistic = like unseen text.

    Raises:
        ArgumentError: no exposures, one that is not possible among m non-members, a number below 1.

    Example:
        >>> rank = [1, 1, 1, 2]  # of 100: all four texts stand out
        >>> exposures = [np.log2(100) - np.log2(k) for k in rank]
        >>> exposure_null_test(exposures, non_members=99).pvalue < 0.01
        True

    See Also:
        exposure_two_sample_test: against a retrained model.
    """
    counts, e = rank_counts(exposures, non_members, draws), np.asarray(exposures, dtype=np.float64)
    statistic = float(_distance(counts[None], e.size)[0])
    pvalue = _share(statistic, _null(e.size, non_members, shared, draws, seed))
    interval = mean_exposure_interval(e, non_members, shared=shared, seed=seed, draws=draws)
    return ExposureTest(statistic, pvalue, float(e.mean()), e.size, interval)


def exposure_two_sample_test(
    unlearned: ArrayLike,
    retrained: ArrayLike,
    *,
    paired: bool = True,
    non_members: int | None = None,
    shared: bool = True,
    draws: int = 2000,
    seed: int = 0,
) -> ExposureTest:
    """Test if the exposures after unlearning could be those under a model retrained without the set.

    The statistic is the two-sample Kolmogorov-Smirnov distance. The p-value comes from permutations, so ties do no
    harm. Paired, the two exposures of a text swap: easy texts are easy under both models, which the usual test ignores.
    Otherwise all exposures are shuffled. One retrained model is one draw of training's randomness.

    Args:
        unlearned: (n,) bits.
        retrained: (n,) of the same texts in the same order; with paired=False of any number of texts.
        paired: True where both are of the same texts.
        non_members: the number of non-members behind each unlearned exposure, for the interval of the mean.
        shared: True where all texts had the same non-members, False where each had its own.
        draws: permutations, and simulations for the interval of the mean.
        seed: the same seed returns the same p-value.

    Returns:
        ExposureTest(statistic, pvalue, mean, n, mean_interval), mean and n of the unlearned set; a high p-value and a
        low statistic = like retraining.

    Raises:
        ArgumentError: no exposures, NaN or Inf, different lengths of paired ones, exposures that are not possible among
            that number of non-members.

    Example:
        >>> exposure_two_sample_test([0.5, 1.5, 2.5], [0.5, 1.5, 2.5]).statistic
        0.0

    See Also:
        exposure_null_test: against unseen text.
    """
    u, r = numbers("unlearned", unlearned, empty=False), numbers("retrained", retrained, empty=False)
    at_least_one(draws=draws)
    if paired:
        same_length("unlearned", u, "retrained", r)
    grid = np.unique(np.concatenate([u, r]))  # (G,) every exposure that occurs
    reached_u, reached_r = (x[:, None] <= grid for x in (u, r))  # (n, G) each
    rng = np.random.default_rng(seed)
    if paired:
        steps = (reached_u.astype(np.float64) - reached_r) / u.size
        weights = rng.choice([-1.0, 1.0], size=(draws, u.size))
        statistic = np.abs(steps.sum(0)).max()
    else:
        steps = np.concatenate([reached_u, reached_r]).astype(np.float64)
        identity = np.concatenate([np.full(u.size, 1 / u.size), np.full(r.size, -1 / r.size)])
        weights = rng.permuted(np.tile(identity, (draws, 1)), axis=1)
        statistic = np.abs(identity @ steps).max()
    null = np.abs(weights @ steps).max(1)
    pvalue = _share(float(statistic), null)
    interval = Interval(float(u.mean()), np.nan, np.nan)
    if non_members is not None:
        interval = mean_exposure_interval(u, non_members, shared=shared, seed=seed, draws=draws)
    return ExposureTest(float(statistic), pvalue, float(u.mean()), u.size, interval)


def non_member_drift(before: ArrayLike, after: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """Compute mean(after - before) over the non-members' scores: the collateral damage of unlearning to similar text.

    Where it is large, exposure among the current scores of non-members is uninformative: read anchored exposure.

    Args:
        before: (m,) scores of the non-members under the original model.
        after: (m,) of the same texts under the unlearned model.
        confidence: between 0 and 1, of the t interval.

    Returns:
        Interval(estimate, low, high), in the unit of the scores (nats per token for mean negative log-likelihood); 0 =
        unharmed, above 0 = text that must survive became less likely.

    Raises:
        ArgumentError: different lengths, no non-members, NaN or Inf.

    Example:
        >>> non_member_drift([2.0, 3.0, 4.0], [2.25, 3.25, 4.25])
        Interval(estimate=0.25, low=0.25, high=0.25)

    See Also:
        paired_difference: with a p-value.
    """
    b, a = numbers("before", before, empty=False), numbers("after", after, empty=False)
    same_length("before", b, "after", a)
    return mean_interval(a - b, confidence=confidence)


def _simulated(n: int, m: int, shared: bool, draws: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yield (some of the draws, m + 1) counts of the ranks of n unseen texts among m non-members."""
    rng = np.random.default_rng(seed)
    for start in range(0, draws, step := max(1, _AT_ONCE // (m + 1))):
        size = (min(step, draws - start), m + 1)
        # m shared draws cut the unit interval into m + 1 gaps of Dirichlet(1, ..., 1) widths, into which the texts fall
        gaps = rng.standard_exponential(size) if shared else np.ones(size)
        yield rng.multinomial(n, gaps / gaps.sum(1, keepdims=True))


def _null(n: int, m: int, shared: bool, draws: int, seed: int) -> Floats:
    """Simulate the Kolmogorov-Smirnov statistic of n unseen texts among m non-members, (draws,)."""
    return np.concatenate([_distance(counts, n) for counts in _simulated(n, m, shared, draws, seed)])


def tail(j: int, n: int, m: int, shared: bool) -> Floats:
    """Compute (n + 1,) the chances that k = 0, ..., n of n unseen texts are likelier than the j-th of m non-members.

    j is at most m.
    """
    k = np.arange(n + 1)
    if not shared:
        return np.asarray(stats.binom.sf(k - 1, n, j / (m + 1)))
    drawn, non_members = np.maximum(k + j - 1, 1), np.arange(j)[:, None]
    texts = np.minimum(drawn - non_members, n)
    logs = _log_choose(m, non_members) + _log_choose(n, texts) - _log_choose(n + m, drawn)
    chances: Floats = np.where(drawn - non_members > n, 0.0, np.exp(logs)).sum(axis=0)
    return np.where(k == 0, 1.0, np.minimum(chances, 1.0))


def _log_choose(n: int, k: NDArray[np.int64]) -> Floats:
    """Compute the logarithm of the binomial coefficients of n and k, for 0 <= k <= n."""
    log: Floats = special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)
    return log


def _distance(counts: NDArray[np.int64], n: int) -> Floats:
    """Compute Kolmogorov-Smirnov distances of n ranks from the uniform law: 2^-exposure = rank / (m + 1).

    Args:
        counts: (draws, m + 1) number of texts of each rank.
        n: number of texts.

    Returns:
        (draws,), 0 to 1.
    """
    reached = np.cumsum(counts, axis=1) / n
    uniform = np.arange(1, counts.shape[1] + 1) / counts.shape[1]
    just_before = np.concatenate([np.zeros((len(counts), 1)), reached[:, :-1]], axis=1)
    return np.maximum(np.abs(reached - uniform), np.abs(just_before - uniform)).max(1)


def _share(statistic: float, null: Floats) -> float:
    """Compute the permutation p-value of a statistic."""
    return float((1 + (null >= statistic - 1e-12).sum()) / (1 + null.size))
