"""Whether a whole set looks like unseen text: tests of its exposures against their null and against a retrained model, and the non_members' drift."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyunlearn.errors import ArgumentError
from pyunlearn.metrics._check import Floats, numbers, same_length
from pyunlearn.metrics.confidence import Interval, bootstrap_interval

_AT_ONCE = 2**22  # simulated counts in memory at a time


class ExposureTest(NamedTuple):
    """The outcome of exposure_null_test and exposure_two_sample_test."""

    statistic: float
    """Kolmogorov-Smirnov distance, 0 to 1; low = alike."""
    pvalue: float
    """Share of the null's statistics at least as large; never 0, at least 1 / (draws + 1)."""
    mean: float
    """Mean exposure of the set, bits; 1.443 for unseen text and many non_members."""
    n: int
    """Texts in the set: with few, only a large distance can show."""
    mean_interval: Interval
    """The mean with a bootstrap interval over the texts, 95 %; what the choice of non_members leaves open is not in it."""


def exposure_null_test(
    exposures: ArrayLike, non_members: int, *, shared: bool = True, draws: int = 2000, seed: int = 0
) -> ExposureTest:
    """Whether the exposures of a set could be those of unseen text.

        statistic = sup over k of |share of exposures >= k - 2^-k|

    the Kolmogorov-Smirnov distance from Exponential(rate ln 2), the law of exposure among endless non_members. Among m non_members exposure takes
    only the m + 1 values log2((m + 1) / rank), and texts that share their non_members rise and fall together, so the usual p-value would be wrong
    twice. Here the null is simulated: ranks of n texts among m non_members when all n + m are draws of one law, whatever that is (shared), or n
    independent uniform ranks (each text with its own non_members). The p-value is exact up to its draws, for scores without ties.

    Mean exposure alone is no sign of health: after a model collapses it comes back to 1.1 to 1.6. Nor does this test suit texts that a loop drove
    until each reached 1.443 bits: they gather there, where unseen text would spread. Then compare with a retrained model.

    Args:
        exposures: (n,) bits, `lower` or `upper` of generalized_exposure; extrapolated ones count as log2(m + 1).
        non_members: m, the non_members that each exposure was taken among.
        shared: all texts had the same non_members; False: each had its own.
        draws: simulations, and resamples for the interval of the mean.
        seed: the same seed gives the same p-value.

    Raises:
        ArgumentError: no exposures, one that m non_members cannot give, a number below 1.
    """
    e = numbers("exposures", exposures, least=1)
    _at_least_one(non_members=non_members, draws=draws)
    exact = (non_members + 1) * 2.0**-e
    ranks = np.maximum(np.rint(exact), 1)  # extrapolated: beyond rank 1
    if (ranks > non_members + 1).any() or (np.abs(ranks - exact) > 1e-6 * np.maximum(ranks, 1))[exact >= 1].any():
        raise ArgumentError(
            f"exposures must be those of {non_members} non_members, log2({non_members + 1}) - log2(rank): give the number of non_members they were taken among"
        )
    counts = np.bincount(ranks.astype(np.int64) - 1, minlength=non_members + 1)
    statistic = float(_distance(counts[None], e.size)[0])
    pvalue = _share(statistic, _null(e.size, non_members, shared, draws, seed))
    return ExposureTest(statistic, pvalue, float(e.mean()), e.size, bootstrap_interval(e, seed=seed, draws=draws))


def exposure_two_sample_test(
    unlearned: ArrayLike, retrained: ArrayLike, *, paired: bool = True, draws: int = 2000, seed: int = 0
) -> ExposureTest:
    """Set-level unlearning quality: whether the exposures after unlearning could be those under a model retrained without the set.

    statistic is the two-sample Kolmogorov-Smirnov distance, which needs no theory of the null. The p-value comes from permutations, so ties do no
    harm: paired, the two exposures of a text change places (the same texts under both models: easy texts are easy under both, which the usual
    test does not know); else all exposures are dealt anew. One retrained model is one draw of training's randomness.

    Args:
        unlearned: (n,) bits.
        retrained: (n,) of the same texts in the same order; with paired=False of any number of texts.
        paired: whether they are the same texts.
        draws: permutations, and resamples for the interval of the mean.
        seed: the same seed gives the same p-value.

    Returns:
        ExposureTest(statistic, pvalue, mean, n, mean_interval), mean and n of the unlearned set; a high p-value and a low statistic = alike.

    Raises:
        ArgumentError: no exposures, one that is not finite, different lengths of paired ones.
    """
    u, r = numbers("unlearned", unlearned, least=1), numbers("retrained", retrained, least=1)
    _at_least_one(draws=draws)
    if paired:
        same_length("unlearned", u, "retrained", r)
    places = np.unique(np.concatenate([u, r]))
    reached_u, reached_r = (x[:, None] <= places for x in (u, r))  # (n, places) each
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
    return ExposureTest(
        float(statistic), pvalue, float(u.mean()), u.size, bootstrap_interval(u, seed=seed, draws=draws)
    )


def non_member_drift(before: ArrayLike, after: ArrayLike, *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """mean(after - before) over the non_members' scores, with a bootstrap interval: the collateral damage of unlearning to text of the same kind.

    Unit of the scores (nats a token for mean negative log-likelihood); 0 = unharmed, above 0 = text that must survive became less likely. Where
    it is large, exposure taken among the current non_members says little, and anchored exposure is the one to read.

    Args:
        before: (m,) scores of the non_members under the original model.
        after: (m,) of the same non_members under the unlearned model.
        confidence: between 0 and 1.
        seed: the same seed gives the same interval.

    Raises:
        ArgumentError: different lengths, no non_members, a score that is not finite.
    """
    b, a = numbers("before", before, least=1), numbers("after", after, least=1)
    same_length("before", b, "after", a)
    return bootstrap_interval(a - b, confidence=confidence, seed=seed)


def _null(n: int, m: int, shared: bool, draws: int, seed: int) -> Floats:
    """(draws,) statistics of n unseen texts among m non_members."""
    rng, out = np.random.default_rng(seed), []
    for start in range(0, draws, step := max(1, _AT_ONCE // (m + 1))):
        size = (min(step, draws - start), m + 1)
        # m shared draws cut the unit interval into m + 1 gaps of Dirichlet(1, ..., 1) widths, into which the texts fall
        gaps = rng.standard_exponential(size) if shared else np.ones(size)
        out.append(_distance(rng.multinomial(n, gaps / gaps.sum(1, keepdims=True)), n))
    return np.concatenate(out)


def _distance(counts: NDArray[np.int64], n: int) -> Floats:
    """(draws,) Kolmogorov-Smirnov distances of n ranks, counted in (draws, m + 1), from the uniform law: 2^-exposure = rank / (m + 1)."""
    reached = np.cumsum(counts, axis=1) / n
    uniform = np.arange(1, counts.shape[1] + 1) / counts.shape[1]
    just_before = np.concatenate([np.zeros((len(counts), 1)), reached[:, :-1]], axis=1)
    return np.maximum(np.abs(reached - uniform), np.abs(just_before - uniform)).max(1)


def _share(statistic: float, null: Floats) -> float:
    return float((1 + (null >= statistic - 1e-12).sum()) / (1 + null.size))


def _at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ArgumentError(f"{name} must be 1 or more, got {value}")
