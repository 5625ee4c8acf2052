"""Confidence: intervals cover, tests have their nominal size, and one text or none is handled."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pyunlearn.metrics import aggregate_interval, bleu, bootstrap_interval, mean_interval, paired_difference, perplexity
from pyunlearn.metrics._binomial import clopper_pearson

values = st.lists(st.floats(-100, 100), min_size=6, max_size=12)


def tail(n, confidence=0.95):
    """Compute the tail in which the resampled mean of n normal numbers is as far out as Student's t."""
    return stats.norm.cdf(-math.sqrt(n / (n - 1)) * stats.t.ppf((1 + confidence) / 2, n - 1))


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_the_interval_covers_as_often_as_it_says(method):
    """90 % intervals of the mean of 40 exponential numbers cover in 82 to 95 % of 300 samples; skew costs a little."""
    rng = np.random.default_rng(0)
    covered = 0
    for i in range(300):
        result = bootstrap_interval(rng.exponential(size=40), confidence=0.9, seed=i, draws=400, method=method)
        covered += result.low <= 1 <= result.high
    assert 0.82 <= covered / 300 <= 0.95


def test_the_percentile_interval_is_the_quantiles_of_resampled_means():
    """The interval agrees with a bootstrap written out, with 40,000 draws."""
    x = np.random.default_rng(0).gamma(2, size=25)
    means = x[np.random.default_rng(7).integers(0, 25, (40_000, 25))].mean(1)
    result = bootstrap_interval(x, draws=40_000)
    assert result.estimate == pytest.approx(x.mean())
    assert result.low == pytest.approx(np.quantile(means, tail(25)), abs=0.02)
    assert result.high == pytest.approx(np.quantile(means, 1 - tail(25)), abs=0.02)
    assert tail(25) < 0.02 < tail(400) < 0.025


def test_bca_leans_towards_the_long_tail():
    """For exponential numbers both BCa ends lie above the percentile ones; for symmetric numbers they hardly differ."""
    x = np.random.default_rng(0).exponential(size=15)
    plain, better = (bootstrap_interval(x, method=m, draws=9999) for m in ("percentile", "bca"))
    assert better.low > plain.low + 0.01
    assert better.high > plain.high + 0.05
    x = np.arange(15.0)
    np.testing.assert_allclose(
        bootstrap_interval(x, method="bca", draws=9999), bootstrap_interval(x, draws=9999), atol=0.15
    )


@given(values)
def test_it_is_the_same_for_the_same_seed_in_any_unit_and_lies_within_the_values(x):
    """The ends lie between the least and the largest value, and scale and shift with the values."""
    result = bootstrap_interval(x, draws=50)
    assert result == bootstrap_interval(x, draws=50)
    assert min(x) - 1e-9 <= result.low <= result.high <= max(x) + 1e-9
    again = bootstrap_interval(3 * np.array(x) + 5, draws=50)
    np.testing.assert_allclose(again, 3 * np.array(result) + 5, atol=1e-9)


def test_any_statistic_will_do():
    """A statistic works with and without an axis argument."""
    x = np.arange(30.0)
    assert bootstrap_interval(x, np.median).estimate == 14.5
    result = bootstrap_interval(x, lambda v: float(v.max() - v.min()), draws=50)
    assert result.estimate == 29
    assert result.high <= 29


@pytest.mark.parametrize("n", [1, 5])
def test_few_values_have_no_interval_and_equal_values_one_of_no_width(n):
    """Up to five values have NaN ends: resamples of them do not reach far enough. Equal values do not break BCa."""
    few = bootstrap_interval(np.arange(float(n)))
    assert few.estimate == (n - 1) / 2
    assert np.isnan(few[1:]).all()
    assert bootstrap_interval([3.0] * 6, method="bca") == (3, 3, 3)


@pytest.mark.filterwarnings("error")
def test_bca_of_a_statistic_that_no_value_changes_has_no_interval():
    """The median of eleven zeros and a one: NaN ends, and no warning of scipy's; the percentiles are 0."""
    ties = [0.0] * 11 + [1.0]
    assert np.isnan(bootstrap_interval(ties, np.median, method="bca")[1:]).all()
    assert bootstrap_interval(ties, np.median) == (0, 0, 0)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        ([], {}, "values must hold at least one number, got none"),
        ([1.0, math.nan], {}, "values must be finite"),
        ([[1.0], [2.0]], {}, r"shape \(n,\), got shape \(2, 1\)"),
        (["a"], {}, "values must be numbers in an array, .* this list"),
        ([1.0, 2.0], {"method": "bac"}, "method must be 'percentile' or 'bca', got 'bac'"),
        ([1.0, 2.0], {"confidence": 95}, "confidence must lie between 0 and 1, got 95"),
        ([1.0, 2.0], {"draws": 0}, "draws must be 1 or more, got 0"),
    ],
)
def test_what_has_no_interval_is_refused(x, options, message):
    """The error is one sentence that names the argument."""
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(x, **options)


# ---------------------------------------------------------------- paired


def by_hand(difference):
    """Compute the two-sided p-value from every assignment of signs: twice the smaller tail, at most 1."""
    means = [np.mean(np.multiply(s, difference)) for s in itertools.product((1, -1), repeat=len(difference))]
    tails = (
        np.mean(np.array(means) >= np.mean(difference) - 1e-12),
        np.mean(np.array(means) <= np.mean(difference) + 1e-12),
    )
    return min(1, 2 * min(tails))


@pytest.mark.full
@pytest.mark.parametrize("n", [3, 6, 12, 40])
def test_the_t_interval_of_a_mean_covers_as_it_says(n):
    """95 % intervals hold the mean of a normal law in 95 % of 4000 sets; of a paired difference it is the same."""
    x = np.random.default_rng(n).normal(1.0, 2.0, size=(4000, n))
    intervals = [mean_interval(row) for row in x]
    assert np.mean([i.low <= 1 <= i.high for i in intervals]) == pytest.approx(0.95, abs=0.012)
    assert paired_difference(0 * x[0], x[0])[:3] == pytest.approx(intervals[0])


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12))
def test_between_bounds_the_interval_lies_within_them_in_any_unit(x):
    """The ends stay within the bounds and on either side of the mean; shifted and scaled values have the
    interval shifted and scaled."""
    result = mean_interval(x, bounds=(0, 1), draws=50)
    assert 0 <= result.low <= result.estimate <= result.high <= 1
    shifted = mean_interval(7 * np.array(x) - 2, bounds=(-2, 5), draws=50)
    np.testing.assert_allclose(shifted, 7 * np.array(result) - 2, atol=1e-6)


def test_between_bounds_it_is_student_s_where_nothing_is_skewed_and_clopper_pearson_s_at_a_bound():
    """Many numbers near one half have Student's interval; none and all of n have Clopper-Pearson's; values that are not
    possible are refused."""
    x = np.random.default_rng(0).uniform(0.4, 0.6, 400)
    assert mean_interval(x, bounds=(0, 1), draws=9999) == pytest.approx(mean_interval(x), abs=0.001)
    for k in (0, 12):
        low, high = map(float, clopper_pearson(k, 12, 0.95))
        result = mean_interval([k / 12] * 12, bounds=(0, 1), draws=20_000)
        assert result[1:] == pytest.approx((low, high), abs=0.01)
    assert np.isnan(mean_interval([0.5], bounds=(0, 1))[1:]).all()
    with pytest.raises(ValueError, match=r"values must lie within bounds=\(0, 1\), got 0.0 to 1.5"):
        mean_interval([0.0, 1.5], bounds=(0, 1))
    with pytest.raises(ValueError, match="values must lie within bounds"):
        mean_interval([1.0, 1.0], bounds=(1, 1))


@given(st.lists(st.floats(-100, 100).filter(lambda v: abs(v) > 1e-3), min_size=1, max_size=6))
def test_the_p_value_of_a_few_texts_counts_every_assignment_of_signs(difference):
    """The p-value agrees with a loop over itertools.product."""
    result = paired_difference(np.zeros(len(difference)), difference)
    assert result.exact
    assert result.pvalue == pytest.approx(by_hand(difference))
    assert result.estimate == pytest.approx(np.mean(difference))


def test_thirteen_texts_are_counted_and_fourteen_are_drawn():
    """With 9999 draws the smallest p-values are 2 / 2^13 for 13 texts and 2 / 10^4 for 14."""
    a = np.arange(1.0, 15)
    few, many = paired_difference(0 * a[:13], a[:13]), paired_difference(0 * a, a)
    assert (few.exact, many.exact) == (True, False)
    assert few.pvalue == pytest.approx(2 / 2**13)
    assert 2 / 10_000 <= many.pvalue < 0.002


@pytest.mark.full
def test_its_size_is_what_it_says():
    """For skewed differences symmetric about 0, 5 % of 400 p-values are below 5 %."""
    rng = np.random.default_rng(0)
    p = [paired_difference(np.zeros(20), rng.standard_t(2, size=20), draws=400, seed=i).pvalue for i in range(400)]
    assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.05, abs=0.038)
    assert np.mean(np.array(p) <= 0.5) == pytest.approx(0.5, abs=0.09)


def test_pairing_sees_a_steady_change_of_texts_that_differ():
    """A steady change of texts that differ greatly is significant, on the side where it lies."""
    before = np.linspace(0, 100, 12)
    after = before + np.linspace(0.1, 0.2, 12)
    assert paired_difference(before, after).pvalue == pytest.approx(2 / 2**12)
    assert paired_difference(before, after, alternative="greater").pvalue == pytest.approx(1 / 2**12)
    assert paired_difference(before, after, alternative="less").pvalue == 1


def test_one_text_proves_nothing():
    """One text has a p-value of 1, or of 1/2 on the side it points to."""
    assert paired_difference([1.0], [2.0]).pvalue == 1
    assert paired_difference([1.0], [2.0], alternative="greater").pvalue == 0.5
    assert paired_difference([1.0], [2.0], alternative="less").pvalue == 1
    assert math.isnan(paired_difference([1.0], [2.0]).low)


def test_nothing_changed_is_a_p_value_of_one():
    """Differences of 0 have a p-value of 1."""
    result = paired_difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert result[:4] == (0, 0, 0, 1)


def test_unpaired_numbers_are_refused():
    """Different lengths and an unknown alternative are refused."""
    with pytest.raises(
        ValueError, match="before and after must hold one entry for each of the same texts, got 2 and 3"
    ):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="alternative must be 'two-sided', 'greater' or 'less', got 'more'"):
        paired_difference([1.0], [2.0], alternative="more")


# ---------------------------------------------------------------- aggregates


def corpus(seed=0, n=30):
    """Draw log-likelihoods and token counts of texts of very different lengths."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 200, n)
    return -tokens * rng.gamma(4, 0.5, n), tokens


def test_an_aggregate_is_computed_again_from_whole_texts():
    """The interval of perplexity agrees with a loop of plain numpy over the same draws, and is narrower than one that
    resamples lengths apart from log-likelihoods."""
    sums, tokens = corpus()
    rng = np.random.default_rng(5)
    drawn = [rng.integers(0, 30, 30) for _ in range(400)]
    result = aggregate_interval(perplexity, sums, tokens, seed=5, draws=400, confidence=0.9)
    resampled = sorted(math.exp(-sums[i].sum() / tokens[i].sum()) for i in drawn)
    assert result.estimate == perplexity(sums, tokens)
    rank = tail(30, 0.9) * 399
    assert 16 < rank < 17
    assert result[1:] == pytest.approx((resampled[16], resampled[383]))  # just outside the ranks
    apart = aggregate_interval(perplexity, sums, tokens, sets=(0, 1), seed=5, draws=400, confidence=0.9)
    assert apart.high - apart.low > 1.5 * (result.high - result.low)


def test_an_aggregate_is_the_same_for_the_same_seed():
    """The same seed returns the same interval, another seed another one."""
    assert aggregate_interval(perplexity, *corpus(), draws=50) == aggregate_interval(perplexity, *corpus(), draws=50)
    assert aggregate_interval(perplexity, *corpus(), draws=50) != aggregate_interval(
        perplexity, *corpus(), draws=50, seed=1
    )


@pytest.mark.full
def test_an_aggregate_s_interval_covers_as_often_as_it_says():
    """90 % intervals cover the true perplexity in 80 to 97 % of 100 corpora of 40 texts; the mean log-likelihood per
    token is 2 for every length."""
    covered = 0
    for i in range(100):
        result = aggregate_interval(perplexity, *corpus(i, 40), confidence=0.9, draws=200, seed=i)
        covered += result.low <= math.exp(2) <= result.high
    assert 0.8 <= covered / 100 <= 0.97


def test_a_paired_difference_of_aggregates_sees_a_steady_change():
    """A small rise in every text is significant where both models' texts are resampled together, and not where they are
    resampled apart."""
    before, tokens = corpus()
    after = before - 0.05 * tokens

    def rise(a, n, b, n_again):
        return perplexity(b, n_again) - perplexity(a, n)

    assert aggregate_interval(rise, before, tokens, after, tokens, draws=200).low > 0
    apart = aggregate_interval(rise, before, tokens, after, tokens, sets=(0, 0, 1, 1), draws=200)
    assert apart.low < 0 < apart.high


def test_written_texts_stay_with_their_truths():
    """BLEU of perfect answers is 100 in every resample, with several truths too; where half are wrong the interval has
    a width."""
    written = [f"answer number {i} is quite a long one {i} {i}" for i in range(12)]
    truth = [w if i % 2 else [w, "something else"] for i, w in enumerate(written)]
    assert aggregate_interval(bleu, written, truth, draws=20) == pytest.approx((100, 100, 100))
    half = [w if i % 2 else "not at all" for i, w in enumerate(written)]
    result = aggregate_interval(bleu, half, truth, draws=40)
    assert 0 < result.low < result.estimate == bleu(half, truth) < result.high


def test_an_infinite_aggregate_stays_infinite_and_is_not_nan():
    """One text of probability 0 makes the upper end infinite and leaves the lower end finite."""
    sums, tokens = corpus(n=8)
    sums[3] = -math.inf
    result = aggregate_interval(perplexity, sums, tokens, draws=200)
    assert math.isfinite(result.low)
    assert (result.estimate, result.high) == (math.inf, math.inf)
    for n in (1, 5):
        assert np.isnan(aggregate_interval(perplexity, sums[:n], tokens[:n])[1:]).all()


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ([], {}, "sets must name the set of texts of each of one or more columns, got 0 for 0 columns"),
        ([[1, 2]], {"sets": (0, 1)}, "got 2 for 1 columns"),
        (["ab"], {}, r"columns\[0\] must be a list or an array of one entry for each text, got one str"),
        ([[1], 2.0], {}, r"columns\[1\] must be .* got one float"),
        ([np.zeros(())], {}, r"columns\[0\] must be .* got one ndarray"),
        ([[], []], {}, r"columns\[0\] must hold one entry for each of one or more texts, and is empty"),
        ([[1, 2], [1, 2, 3]], {}, r"must be equally long, got 3 entries in columns\[1\] and 2 before it"),
        ([[1, 2]], {"draws": 0}, "draws must be 1 or more, got 0"),
        ([[1, 2]], {"confidence": 95}, "confidence must lie between 0 and 1, got 95"),
        ([[1, 2]], {}, "statistic must return one number, got list"),
    ],
)
def test_columns_that_do_not_fit_are_refused(columns, options, message):
    """The error is one sentence; so is that for a statistic that returns no number."""
    with pytest.raises(ValueError, match=message):
        aggregate_interval(lambda *c: list(c[0]), *columns, **options)
