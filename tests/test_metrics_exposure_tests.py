"""Tests of a set's exposures: their size over many seeds, their power, and the drift of the non-members."""

import itertools
import math

import numpy as np
import pytest
from coverings import in_full, slow
from scipy import stats

from pyunlearn.metrics import (
    exposure_null_test,
    exposure_top_test,
    exposure_two_sample_test,
    generalized_exposure,
    mean_exposure_interval,
    mean_interval,
    non_member_drift,
)
from pyunlearn.metrics.exposure_tests import tail


def exposures(rng, n, m, shared, shift=0.0):
    """Draw exposures of n texts that are `shift` deviations more likely than their non-members."""
    return generalized_exposure(rng.gumbel(size=n) - shift, rng.gumbel(size=m if shared else (n, m))).lower


@pytest.mark.full
@pytest.mark.parametrize(
    ("n", "m", "shared"), [(40, 63, True), (30, 19, False), *in_full((40, 63, False), (200, 63, True))]
)
def test_the_null_test_has_the_size_it_says(n, m, shared):
    """At 5 and 20 % the rejection rate over 400 sets of unseen text is nominal, and p-values average one half."""
    rng = np.random.default_rng(n + m + shared)
    p = np.array(
        [
            exposure_null_test(exposures(rng, n, m, shared), m, shared=shared, draws=400, seed=i).pvalue
            for i in range(400)
        ]
    )
    for level in (0.05, 0.2):
        assert (p <= level).mean() == pytest.approx(level, abs=3.5 * math.sqrt(level * (1 - level) / 400))
    assert p.mean() == pytest.approx(0.5, abs=0.06)


@pytest.mark.full
@pytest.mark.parametrize(
    ("n", "m", "shared"), [(40, 63, True), (30, 19, False), *slow((400, 64, True), (400, 199, True))]
)
def test_the_top_test_has_the_size_it_says(n, m, shared):
    """At 5 % it rejects at most 5 % of 400 sets of unseen text, and not far less; the exact one at most 5 %."""
    rng = np.random.default_rng(n + m + shared)
    tests = [exposure_top_test(exposures(rng, n, m, shared), m, shared=shared, draws=400, seed=i) for i in range(400)]
    for level in (0.05, 0.2):
        most = level + 3.5 * math.sqrt(level * (1 - level) / 400)
        assert np.mean([t.pvalue <= level for t in tests]) <= most
        assert np.mean([t.exact_pvalue <= level for t in tests]) <= most
    assert np.mean([t.pvalue <= 0.2 for t in tests]) > 0.08  # counts are discrete, so the test is a little conservative


@pytest.mark.full
@pytest.mark.parametrize(("m", "power"), [(64, 0.7), *in_full((199, 0.99)), *slow((999, 0.99))])
def test_twenty_memorized_texts_among_four_hundred_are_seen(m, power):
    """By the exact p-value, at 4 standard deviations; the Kolmogorov-Smirnov test sees 4 to 18 % of such sets."""
    rng, p = np.random.default_rng(m), []
    for _ in range(300):
        scores = rng.normal(size=400) - 4.0 * (np.arange(400) < 20)
        p.append(exposure_top_test(generalized_exposure(scores, rng.normal(size=m)).lower, m, draws=1).exact_pvalue)
    assert np.mean(np.array(p) <= 0.05) >= power


def test_many_texts_that_stand_out_a_little_are_seen_too():
    """All texts half a deviation likelier: the smallest p-value rejects more often than that of the extremes alone."""
    rng = np.random.default_rng(5)
    tests = [
        exposure_top_test(generalized_exposure(rng.normal(size=200) - 0.7, rng.normal(size=199)).lower, 199, draws=300)
        for _ in range(60)
    ]
    assert np.mean([t.pvalue <= 0.05 for t in tests]) > np.mean([t.exact_pvalue <= 0.05 for t in tests]) + 0.15


def test_the_exact_p_value_is_its_formula():
    """The product over the texts beyond all non-members, and the share of orders of a small pool by enumeration."""
    test = exposure_top_test([math.log2(10)] * 3 + [1.0] * 4, 9, draws=50)
    assert (test.beyond, test.n) == (3, 7)
    assert test.exact_pvalue == pytest.approx(math.prod((7 - i) / (7 + 9 - i) for i in range(3)))
    places = list(itertools.combinations(range(6), 2))  # those of two texts among four non-members
    for j in (1, 2, 3):
        reached = [sum(sum(q not in p for q in range(x)) < j for x in p) for p in places]
        for k in (0, 1, 2):
            assert tail(j, 2, 4, True)[k] == pytest.approx(np.mean(np.array(reached) >= k))


def test_the_textbook_p_value_is_wrong_where_non_members_are_shared():
    """200 unseen texts among 63 shared non-members fail the usual test far too often, so ours simulates its null."""
    rng = np.random.default_rng(0)
    p = [stats.kstest(exposures(rng, 200, 63, True), "expon", args=(0, 1 / math.log(2))).pvalue for _ in range(200)]
    assert np.mean(np.array(p) <= 0.05) > 0.3


def test_memorized_and_collapsed_sets_are_seen():
    """The test rejects memorized texts, and a set of extremes whose mean is near the null's."""
    rng = np.random.default_rng(0)
    assert exposure_null_test(exposures(rng, 100, 99, True, shift=1.2), 99).pvalue < 0.01
    odd = generalized_exposure(np.repeat([-9.0, 9.0], [22, 78]), rng.normal(size=99)).lower
    result = exposure_null_test(odd, 99)
    assert result.mean == pytest.approx(1.46, abs=0.01)
    assert result.pvalue < 0.01


def test_the_statistic_is_the_distance_from_the_exponential_law():
    """The statistic agrees with scipy's Kolmogorov-Smirnov distance for the same exposures."""
    rng = np.random.default_rng(3)
    for m in (7, 63, 999):
        e = exposures(rng, 25, m, True)
        assert exposure_null_test(0 * e, m, draws=10).statistic == 1  # no exposure at all reaches any k
        result = exposure_null_test(e, m, draws=10)
        p = 2.0**-e  # scipy's distance of the p-values: the same sup on a monotone scale
        assert result.statistic == pytest.approx(stats.kstest(p, "uniform").statistic, abs=1e-12)
        assert result.mean == pytest.approx(e.mean())
        assert result.mean_interval == mean_exposure_interval(e, m, draws=10)
        assert result.n == 25
        assert result.pvalue >= 1 / 11


def test_extrapolated_exposures_count_as_the_largest_and_others_must_fit_m():
    """30 bits among 63 non-members is rank 1; exposures among another number of them are refused, not rounded."""
    e = np.array([6.0, 2.0, 0.0, 1.0])
    beyond = np.array([30.0, 2.0, 0.0, 1.0])
    assert exposure_null_test(beyond, 63)[:2] == exposure_null_test(e, 63)[:2]
    with pytest.raises(ValueError, match="must be those among 63 non-members"):
        exposure_null_test([1.4427], 63)
    with pytest.raises(ValueError, match="must be those among 63 non-members"):
        exposure_null_test([-0.1], 63)
    with pytest.raises(ValueError, match="exposures must hold at least one number, got none"):
        exposure_null_test([], 63)
    with pytest.raises(ValueError, match="non_members must be 1 or more, got 0"):
        exposure_null_test([1.0], 0)


# ---------------------------------------------------------------- against a retrained model


@pytest.mark.full
@pytest.mark.parametrize("paired", [True, False])
def test_the_two_sample_test_has_the_size_it_says(paired):
    """At 5 and 20 % the rejection rate over 400 pairs of alike sets is nominal, paired or not."""
    rng, p = np.random.default_rng(1), []
    for i in range(400):
        difficulty = rng.normal(size=30)
        u, r = difficulty + rng.normal(size=30), (difficulty if paired else rng.normal(size=30)) + rng.normal(size=30)
        u, r = np.round(np.exp(u)), np.round(np.exp(r))  # with ties
        p.append(exposure_two_sample_test(u, r, paired=paired, draws=300, seed=i).pvalue)
    for level in (0.05, 0.2):
        assert (np.array(p) <= level).mean() <= level + 3.5 * math.sqrt(level * (1 - level) / 400)
    assert (np.array(p) <= 0.2).mean() > 0.08  # of a statistic with ties, the test is somewhat conservative


def test_pairing_sees_what_shuffling_cannot():
    """Pairing makes a small, steady change of very different texts significant, and shuffling does not."""
    rng = np.random.default_rng(0)
    difficulty = rng.exponential(3, size=60)
    result = [exposure_two_sample_test(difficulty + 0.8, difficulty, paired=p).pvalue for p in (True, False)]
    assert result[0] < 0.01
    assert result[1] > 0.05


def test_the_two_sample_statistic_is_the_kolmogorov_smirnov_distance():
    """The statistic agrees with scipy's, paired or not; paired sets of different sizes are refused."""
    rng = np.random.default_rng(2)
    u, r = rng.exponential(size=40), rng.exponential(size=25) + 0.3
    result = exposure_two_sample_test(u, r, paired=False)
    assert result.statistic == pytest.approx(stats.ks_2samp(u, r).statistic, abs=1e-12)
    assert result.pvalue == pytest.approx(stats.ks_2samp(u, r).pvalue, abs=0.05)
    assert exposure_two_sample_test(u[:25], r).statistic == pytest.approx(stats.ks_2samp(u[:25], r).statistic)
    with pytest.raises(ValueError, match="same texts, got 40 and 25"):
        exposure_two_sample_test(u, r)


def test_the_two_sample_test_has_an_interval_of_the_mean_where_it_knows_the_non_members():
    """Without their number the ends are NaN, with it they are those of mean_exposure_interval."""
    u = exposures(np.random.default_rng(0), 30, 63, True)
    assert math.isnan(exposure_two_sample_test(u, u, draws=50).mean_interval.low)
    for shared in (True, False):
        result = exposure_two_sample_test(u, u, non_members=63, shared=shared, draws=50)
        assert result.mean_interval == mean_exposure_interval(u, 63, shared=shared, draws=50)


# ---------------------------------------------------------------- the mean


@pytest.mark.full
def test_the_mean_s_interval_draws_gaps_and_texts():
    """The ends agree with a plain simulation: the law's share at the middle of each text's gap, the mean exposure of
    these shares among new non-members, and Student's t on the logit scale."""
    rng, m, n, most = np.random.default_rng(4), 31, 12, 5.0
    e = exposures(rng, n, m, True, shift=-0.5)
    ranks = np.rint(32 * 2.0**-e).astype(int) - 1
    assert ranks.min() > 0  # no text beyond all non-members, whose place would be the worst in its gap
    theta = []
    for _ in range(1500):
        ends = np.concatenate([[0.0], np.sort(rng.random(m)), [1.0]])
        u = (ends[ranks] + ends[ranks + 1]) / 2
        new = np.array([stats.binom.pmf(np.arange(m + 1), m, x) @ np.log2(1 + np.arange(m + 1)) for x in u])
        theta.append((most - new).mean() / most)
    q, error = e.mean() / most, e.std(ddof=1) / most / math.sqrt(n)
    z = np.log(np.array(theta) / (1 - np.array(theta))) + rng.standard_t(n - 1, 1500) * error / (q * (1 - q))
    result = mean_exposure_interval(e, m, draws=8000)
    assert result.estimate == pytest.approx(e.mean())
    assert result[1:] == pytest.approx(most / (1 + np.exp(-np.quantile(z, [0.025, 0.975]))), abs=0.12)
    assert result == mean_exposure_interval(e, m, draws=8000) != mean_exposure_interval(e, m, draws=8000, seed=1)


def test_a_set_beyond_all_non_members_has_an_interval_with_a_width():
    """Twenty texts of rank 1 among 63: the upper end is the largest mean, the lower one is below by what 20 texts and
    63 non-members leave open. One text has no interval, and one exposure may be extrapolated."""
    result = mean_exposure_interval([6.0] * 20, 63)
    assert result.estimate == result.high == 6
    assert 3 < result.low < 5
    assert mean_exposure_interval([11.0] * 20, 63) == result
    assert np.isnan(mean_exposure_interval([6.0], 63)[1:]).all()
    own = mean_exposure_interval([6.0] * 20, 63, shared=False)
    assert own == mean_interval([6.0] * 20, bounds=(0, 6))
    assert own.low == pytest.approx(6 * 0.025 ** (1 / 20), abs=0.1)
    with pytest.raises(ValueError, match="must be those among 63 non-members"):
        mean_exposure_interval([1.4427, 1.0], 63)
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1, got 95"):
        mean_exposure_interval([1.0, 2.0], 63, confidence=95)


# ---------------------------------------------------------------- drift


def test_the_drift_is_the_mean_rise_of_the_non_members_with_an_interval_that_covers():
    """90 % intervals cover the mean rise of 0.1 in about 90 % of 400 sets of 40 non-members."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        before = rng.gamma(4, size=40)
        after = before + rng.normal(0.1, 0.5, size=40)
        drift = non_member_drift(before, after, confidence=0.9)
        assert drift.estimate == pytest.approx((after - before).mean())
        covered += drift.low <= 0.1 <= drift.high
    assert covered / 400 == pytest.approx(0.89, abs=0.05)
    assert non_member_drift([1.0, 2.0], [1.0, 2.0]) == (0, 0, 0)
