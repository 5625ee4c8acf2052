"""Exposure: its distribution for text that was never trained on, and the definitions that it agrees with."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from pyunlearn.metrics import (
    NULL_MEAN,
    SIGNIFICANT,
    SkewNormalFit,
    _skew_normal,
    calibrated_scores,
    exposure,
    generalized_exposure,
)

scores = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12)
few = st.lists(st.integers(0, 5).map(float), min_size=1, max_size=12)  # with many ties


def exchangeable(m, count, seed=0):
    """Draw `count` exposures, each of one draw among m others of the same law."""
    draws = np.random.default_rng(seed).gumbel(size=(count, m + 1))
    result = [generalized_exposure(row[0], row[1:]) for row in draws]
    return np.array([f.lower[0] for f in result]), np.array([f.upper[0] for f in result])


@pytest.mark.full
@pytest.mark.parametrize("m", [19, 99])
def test_text_that_is_exchangeable_with_its_non_members_passes_the_null(m):
    """P(exposure >= k) <= 2^-k for every k on either side, within the error of 20,000 draws."""
    for exposures in exchangeable(m, 20_000):
        for k in np.arange(0.25, math.log2(m + 1) + 0.5, 0.25):
            share, bound = (exposures >= k).mean(), 2.0**-k
            assert share <= bound + 4 * math.sqrt(bound * (1 - bound) / len(exposures))
        assert exposures.max() <= math.log2(m + 1) + 1e-12
        assert exposures.min() >= 0


def test_its_mean_is_near_one_over_ln_2():
    """The mean is log2(m + 1) - mean log2(rank): 1.396 bits for 99 non-members, 1.436 for 999, 1.443 in the limit."""
    for m, mean in ((99, 1.396), (999, 1.436)):
        assert np.mean(math.log2(m + 1) - np.log2(np.arange(1, m + 2))) == pytest.approx(mean, abs=1e-3)
        every = generalized_exposure(np.arange(m + 1) - 0.5, np.arange(m)).lower  # each rank once
        assert every.mean() == pytest.approx(mean, abs=1e-3)
    assert pytest.approx(1.442695, abs=1e-6) == NULL_MEAN
    lower, upper = exchangeable(999, 4000)
    for exposures in (lower, upper):
        assert exposures.mean() == pytest.approx(1.436, abs=4 * 1.44 / math.sqrt(4000))


def test_it_is_exponential_with_rate_ln_2():
    """Over ten seeds a Kolmogorov-Smirnov test accepts the exponential law for unseen text, and rejects it for
    memorized text."""
    p = [
        stats.kstest(exchangeable(1999, 300, seed)[0], "expon", args=(0, 1 / math.log(2))).pvalue for seed in range(10)
    ]
    assert min(p) > 1e-3
    assert np.median(p) > 0.1
    draws = np.random.default_rng(0).normal(size=(300, 200))
    memorized = [generalized_exposure(row[0] - 1, row[1:]).lower[0] for row in draws]
    assert stats.kstest(memorized, "expon", args=(0, 1 / math.log(2))).pvalue < 1e-6


@pytest.mark.full
def test_significant_is_what_one_unseen_text_in_twenty_reaches():
    """log2(20) bits are exceeded with probability 1/20; the smallest holdout that can show it has 19 texts."""
    assert pytest.approx(1 / 20) == 2**-SIGNIFICANT
    lower, _ = exchangeable(199, 20_000)
    assert (lower >= SIGNIFICANT - 1e-9).mean() == pytest.approx(1 / 20, abs=4 * math.sqrt(0.05 * 0.95 / 20_000))
    assert generalized_exposure(0.0, np.arange(1, 20)).lower[0] == pytest.approx(SIGNIFICANT)
    assert generalized_exposure(0.0, np.arange(1, 19)).lower[0] < SIGNIFICANT - 0.05


@given(st.integers(2, 300), st.integers(0, 10_000))
def test_it_equals_the_secret_sharer_s_exposure_when_the_non_members_enumerate_the_space(size, seed):
    """Exposure is log2 |R| - log2 rank, rank 1 being the most likely of all |R| secrets of the format (arXiv
    1802.08232)."""
    perplexity = np.random.default_rng(seed).permutation(size).astype(float)
    for secret in {0, size // 2, size - 1}:
        rank = 1 + (np.sort(perplexity) < perplexity[secret]).sum()
        result = generalized_exposure(perplexity[secret], np.delete(perplexity, secret))
        assert result.lower[0] == pytest.approx(math.log2(size) - math.log2(rank))


@given(few, few)
def test_exposure_agrees_with_its_definition_by_counting(x, non_members):
    """Exposure is log2(m + 1) - log2(1 + #{r <= x}), with >= on the other side: ties count against the text."""
    result = generalized_exposure(x, non_members)
    for i, score in enumerate(x):
        for bits, count in (
            (result.lower[i], sum(r <= score for r in non_members)),
            (result.upper[i], sum(r >= score for r in non_members)),
        ):
            assert bits == pytest.approx(math.log2((len(non_members) + 1) / (1 + count)))


@given(scores, scores)
def test_the_two_sides_mirror_each_other(x, non_members):
    """Negating all scores swaps the sides."""
    result, mirrored = (generalized_exposure(sign * np.array(x), sign * np.array(non_members)) for sign in (1, -1))
    np.testing.assert_array_equal(result.lower, mirrored.upper)
    np.testing.assert_array_equal(result.upper, mirrored.lower)


@given(scores, scores, st.randoms())
def test_the_order_of_the_non_members_does_not_matter_and_that_of_the_scores_stays(x, non_members, random):
    """Permuting the scores permutes the exposures, and permuting the non-members changes nothing."""
    shuffled, order = list(non_members), list(range(len(x)))
    random.shuffle(shuffled)
    random.shuffle(order)
    result, again = generalized_exposure(x, non_members), generalized_exposure([x[i] for i in order], shuffled)
    np.testing.assert_array_equal(result.lower[order], again.lower)
    np.testing.assert_array_equal(result.upper[order], again.upper)


@given(scores, scores)
def test_a_more_likely_text_is_never_less_exposed(x, non_members):
    """Lower falls and upper rises with the score; both lie within 0 and log2(m + 1)."""
    result = generalized_exposure(sorted(x), non_members)
    assert (np.diff(result.lower) <= 0).all()
    assert (np.diff(result.upper) >= 0).all()
    for side in (result.lower, result.upper):
        assert ((side >= -1e-12) & (side <= math.log2(len(non_members) + 1) + 1e-12)).all()


def test_ties_count_against_the_text_on_either_side():
    """A text exactly like all its non-members is neither memorized nor over-unlearned: 0 bits."""
    result = generalized_exposure([2.0], [2.0] * 63)
    assert (result.lower[0], result.upper[0]) == (0.0, 0.0)
    assert generalized_exposure([1.0], [2.0] * 63).lower[0] == 6.0


@pytest.mark.parametrize(
    ("x", "non_members", "message"),
    [
        ([1.0], [], "at least one non-member score, got none"),
        ([math.nan], [1.0], "finite scores, got NaN or Inf"),
        ([1.0], [1.0, math.inf], "finite scores, got NaN or Inf"),
        ([-math.inf], [1.0], "finite scores, got NaN or Inf"),
    ],
)
def test_scores_that_are_not_numbers_are_refused(x, non_members, message):
    """A NaN would silently be the most or the least exposed of all."""
    with pytest.raises(ValueError, match=message):
        generalized_exposure(x, non_members)


@pytest.mark.parametrize("narrow", [np.float16, torch.float16, torch.bfloat16])
def test_scores_of_16_bits_are_refused(narrow):
    """2.0001 and 2.0003 nats are one number in 16 bits, and the tie removes all exposure from the text."""
    wide = np.float32([2.0001, 2.0003, 2.0005])
    low = wide.astype(narrow) if narrow is np.float16 else torch.from_numpy(wide).to(narrow)
    assert low[0] == low[1] == low[2]
    assert (
        generalized_exposure(wide[:1], wide[1:]).lower[0]
        > generalized_exposure(low[:1].tolist(), low[1:].tolist()).lower[0]
    )
    for call in (generalized_exposure, exposure, calibrated_scores):
        for pair in ((low[:1], wide[1:2]), (wide[:1], low[1:2])):
            with pytest.raises(ValueError, match=r"float32 or float64, got b?float16, in which they tie"):
                call(*pair)
    assert generalized_exposure(torch.from_numpy(wide[:1]), torch.from_numpy(wide[1:])).lower[0] > 1


def test_any_array_will_do_and_one_number_is_an_array_of_one():
    """Lists, float32 arrays and scalars are accepted."""
    assert generalized_exposure(1, [2, 3, 4]).lower.tolist() == [2.0]
    result = generalized_exposure(np.float32([1, 5]), np.float32([2, 3, 4]))
    assert result.lower.tolist() == [2.0, 0.0]
    assert result.upper.tolist() == [0.0, 2.0]
    assert result.lower.dtype == np.float64
    assert generalized_exposure([], [1.0]).lower.shape == (0,)


# ---------------------------------------------------------------- own non-members, calibrated scores, two sides


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_own_non_members_are_the_same_as_each_text_alone(n, m, seed):
    """Exposures from (n, m) non-members equal those of each row alone, extrapolated or not."""
    rng = np.random.default_rng(seed)
    x, non_members = rng.integers(-3, 9, n).astype(float), rng.integers(0, 6, (n, m)).astype(float)
    for extrapolate in (False, True):
        result = generalized_exposure(x, non_members, extrapolate=extrapolate)
        for i in range(n):
            alone = generalized_exposure(x[i], non_members[i], extrapolate=extrapolate)
            assert (result.lower[i], result.upper[i]) == (alone.lower[0], alone.upper[0])
            assert result.extrapolated[i] == alone.extrapolated[0]


def test_a_table_of_non_members_must_have_a_row_for_each_score():
    """(2, 3) non-members for 3 texts are refused, where flattening would make them 6 shared ones."""
    with pytest.raises(ValueError, match=r"shape \(m,\), or \(3, m\) with a row for each score, got \(2, 3\)"):
        generalized_exposure([1.0, 2.0, 3.0], np.ones((2, 3)))


def test_the_two_sided_exposure_is_that_of_the_two_sided_p_value():
    """The exposure is -log2 min(1, 2 min(p, p)), and for unseen text P(two_sided >= k) <= 2^-k."""
    rng = np.random.default_rng(0)
    x, non_members = rng.normal(size=4000), rng.normal(size=(4000, 99))
    result = generalized_exposure(x, non_members)
    p = np.minimum(1, 2 * np.minimum(2.0**-result.lower, 2.0**-result.upper))
    np.testing.assert_allclose(result.two_sided, -np.log2(p), atol=1e-12)
    for k in (1, 2, 3, 4):
        assert (result.two_sided >= k).mean() <= 2.0**-k + 4 * math.sqrt(2.0**-k / 4000)
    assert generalized_exposure([9.0], np.arange(7)).two_sided[0] == 2.0


def test_calibrated_scores_take_a_text_s_own_difficulty_off():
    """Two texts of very different difficulty, memorized alike, have the same exposure after calibration."""
    base, non_members = np.array([1.0, 5.0]), np.linspace(0, 6, 31)
    result = generalized_exposure(
        calibrated_scores(base - 1, base), calibrated_scores(non_members + np.tile([0.1, -0.1], 16)[:31], non_members)
    )
    assert result.lower.tolist() == [5.0, 5.0]
    with pytest.raises(ValueError, match="same texts, got 2 and 1"):
        calibrated_scores(base, [1.0])


# ---------------------------------------------------------------- beyond log2(m + 1)


def test_extrapolation_changes_nothing_inside_the_range():
    """Scores inside the range of the non-members are unchanged; outside, the tail's number is at least log2(m + 1) and
    marked."""
    non_members = stats.norm.ppf((np.arange(63) + 0.5) / 63)
    x = np.array([-3.3, -0.3, 0.4, 2.0, 3.3])
    plain, result = generalized_exposure(x, non_members), generalized_exposure(x, non_members, extrapolate=True)
    assert result.extrapolated.tolist() == [True, False, False, False, True]
    assert not plain.extrapolated.any()
    assert plain.fit is None
    np.testing.assert_array_equal(result.lower[1:], plain.lower[1:])
    np.testing.assert_array_equal(result.upper[:-1], plain.upper[:-1])
    assert plain.lower[0] == plain.upper[-1] == 6.0
    truth = -stats.norm.logcdf(-3.3) / math.log(2)  # 11.0 bits
    assert result.lower[0] == pytest.approx(truth, rel=0.1)
    assert result.upper[-1] == pytest.approx(truth, rel=0.1)


@pytest.mark.full
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([19, 63]),
    st.sampled_from(["normal", "exponential", "uniform", "gumbel"]),
)
def test_extrapolated_exposure_is_finite_monotone_and_never_below_the_count(seed, m, law):
    """For any non-members and scores far out exposure stays finite, where plain maximum likelihood gives 10^15 bits;
    the generalized one is at most 2 log2(m + 1)."""
    rng = np.random.default_rng(seed)
    non_members = getattr(rng, law)(size=m)
    spread = non_members.std()
    x = np.concatenate(
        [
            non_members.min() - spread * np.array([300, 30, 8, 4, 2, 1, 0.1]),
            non_members.max() + spread * np.array([0.1, 1, 3, 300]),
        ]
    )
    result, plain = generalized_exposure(x, non_members, extrapolate=True), generalized_exposure(x, non_members)
    assert np.isfinite(result.lower).all()
    assert np.isfinite(result.upper).all()
    assert (np.diff(result.lower) <= 1e-9).all()
    assert (np.diff(result.upper) >= -1e-9).all()
    assert (result.lower >= plain.lower).all()
    assert (result.upper >= plain.upper).all()
    assert max(result.lower.max(), result.upper.max()) <= 2 * math.log2(m + 1)
    assert exposure(x, non_members, "skewnorm").lower.max() < 1e8


def test_the_median_extrapolation_is_right_for_a_normal_law():
    """Six deviations below the mean of 63 normal numbers the median is near the true 29.9 bits."""
    rng = np.random.default_rng(1)
    result = [exposure(-6.0, rng.normal(size=63), "skewnorm").lower[0] for _ in range(40)]
    assert np.median(result) == pytest.approx(29.9, rel=0.2)
    assert np.quantile(result, 0.9) < 60


@pytest.mark.full
def test_the_tail_of_another_law_is_capped():
    """199 numbers of Student's t law with 5 degrees of freedom, at its 20 bits: the median fit shows hundreds, as the
    paper's exposure does, and generalized exposure 2 log2(200) = 15.3, marked."""
    rng, x = np.random.default_rng(0), stats.t.ppf(2.0**-20, 5)
    drawn = [rng.standard_t(5, size=199) for _ in range(40)]
    assert np.median([exposure(x, r, "skewnorm").lower[0] for r in drawn]) > 100
    for r in drawn:
        capped, above = (generalized_exposure(s, r, extrapolate=True) for s in (x, -x))
        assert math.log2(200) <= capped.lower[0] <= 2 * math.log2(200)
        assert math.log2(200) <= above.upper[0] <= 2 * math.log2(200)
        assert capped.extrapolated[0]
    assert capped.lower[0] == above.upper[0] == 2 * math.log2(200)


@pytest.mark.parametrize("shape", [-4.0, -0.5, 0.0, 3.0])
def test_the_fit_is_that_of_maximum_likelihood_where_there_is_enough_to_fit(shape):
    """The fit of 4000 numbers is as likely as scipy's, mirrors with them, and does not depend on the unit."""
    x = stats.skewnorm.rvs(shape, 1, 2, size=4000, random_state=1)
    fit = exposure(0.0, x, "skewnorm").fit
    log_likelihood = stats.skewnorm.logpdf(x, fit.shape[0], fit.location[0], fit.scale[0]).sum()
    best = stats.skewnorm.logpdf(x, *stats.skewnorm.fit(x)).sum()
    assert best - 1 < log_likelihood <= best + 1e-3
    assert fit.statistic[0] < 0.03
    assert fit.pvalue[0] > 0.01
    assert exposure(0.0, x**3, "skewnorm").fit.pvalue[0] < 1e-3
    for scale, offset in ((-1, 0), (1e6, -5e6), (1e-6, 3e-6)):
        again, low = exposure(scale * -4.0 + offset, scale * x + offset, "skewnorm"), exposure(-4.0, x, "skewnorm")
        pair = (low.lower, low.upper) if scale > 0 else (low.upper, low.lower)
        np.testing.assert_allclose([again.lower, again.upper], pair, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("law", ["normal", "exponential", "gumbel", "uniform"])
def test_the_fit_of_few_numbers_is_the_least_penalised_likelihood(law):
    """Moving any parameter either way lowers the penalised likelihood, and the shape stays finite where plain
    likelihood has no maximum."""
    rng = np.random.default_rng(0)
    for m in (19, 63):
        x = getattr(rng, law)(size=m)
        fit = exposure(0.0, x, "skewnorm").fit
        parameters = np.array([fit.shape[0], fit.location[0], fit.scale[0]])
        assert abs(fit.shape[0]) < 100

        def cost(p, x=x):
            return 0.87591 * np.log1p(0.85625 * p[0] ** 2) - stats.skewnorm.logpdf(x, *p).sum()

        for i, step in itertools.product(range(3), (-1e-2, 1e-2)):
            moved = parameters + step * np.eye(3)[i] * [1, x.std(), x.std()]
            assert cost(moved) > cost(parameters)


@pytest.mark.parametrize("shape", [-5.0, 0.0, 1.0, 5.0, 50.0])
@pytest.mark.parametrize("z", [-0.5, -2.0, -5.0, -12.0])
def test_the_tail_is_the_integral_of_the_density_where_it_underflows(shape, z):
    """The tail agrees with adaptive quadrature of the density, and the survival function with the mirrored law."""

    def log_density(x):
        return math.log(2) + stats.norm.logpdf(x) + stats.norm.logcdf(shape * x)

    width = 60 / (1 + abs(z) * (1 + max(shape, 0.0) ** 2))
    area = integrate.quad(lambda u: math.exp(log_density(z - u) - log_density(z)), 0, width, limit=500)[0]
    law = SkewNormalFit(*(np.array([v]) for v in (shape, 0.0, 1.0, 0.0, 1.0)))
    truth = log_density(z) + math.log(area)
    assert _skew_normal.log_cdf(np.array([z]), law)[0] == pytest.approx(truth, rel=1e-6)
    mirror = law._replace(shape=-law.shape)
    assert _skew_normal.log_survival(np.array([-z]), mirror)[0] == pytest.approx(truth, rel=1e-6)
