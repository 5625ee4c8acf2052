"""Intervals that cover, p-values of the right size, and what they do where there is next to nothing to go by."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyunlearn.metrics import bootstrap_interval, paired_difference

values = st.lists(st.floats(-100, 100), min_size=2, max_size=9)


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_the_interval_covers_as_often_as_it_says(method):
    """The mean of 40 exponential numbers, 90 %, 300 times: a little under, as the bootstrap of skewed numbers is."""
    rng = np.random.default_rng(0)
    held = 0
    for i in range(300):
        found = bootstrap_interval(rng.exponential(size=40), confidence=0.9, seed=i, draws=400, method=method)
        held += found.low <= 1 <= found.high
    assert 0.82 <= held / 300 <= 0.95


def test_the_percentile_interval_is_the_quantiles_of_resampled_means():
    """Against a bootstrap written out, with as many draws as leave little to chance."""
    x = np.random.default_rng(0).gamma(2, size=25)
    means = x[np.random.default_rng(7).integers(0, 25, (40_000, 25))].mean(1)
    found = bootstrap_interval(x, draws=40_000)
    assert found.estimate == pytest.approx(x.mean())
    assert found.low == pytest.approx(np.quantile(means, 0.025), abs=0.02)
    assert found.high == pytest.approx(np.quantile(means, 0.975), abs=0.02)


def test_bca_leans_towards_the_long_tail():
    """Of exponential numbers both of its ends lie above the percentile ones; BCa at the sample mean of symmetric numbers moves little."""
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
    """low <= high, both between the least and the largest value; scaled and shifted with the values."""
    found = bootstrap_interval(x, draws=50)
    assert found == bootstrap_interval(x, draws=50)
    assert min(x) - 1e-9 <= found.low <= found.high <= max(x) + 1e-9
    again = bootstrap_interval(3 * np.array(x) + 5, draws=50)
    np.testing.assert_allclose(again, 3 * np.array(found) + 5, atol=1e-9)


def test_any_statistic_will_do():
    """With or without an axis argument."""
    x = np.arange(30.0)
    assert bootstrap_interval(x, np.median).estimate == 14.5
    found = bootstrap_interval(x, lambda v: float(v.max() - v.min()), draws=50)
    assert found.estimate == 29
    assert found.high <= 29


def test_one_value_has_no_interval_and_equal_values_one_of_no_width():
    """NaN, not the value itself: nothing is known of its spread. Equal values do not trip BCa."""
    one = bootstrap_interval([2.5])
    assert one.estimate == 2.5
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert bootstrap_interval([3.0] * 5, method="bca") == (3, 3, 3)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        ([], {}, "values must hold 1 numbers or more, got 0"),
        ([1.0, math.nan], {}, "values must be finite"),
        ([[1.0], [2.0]], {}, r"shape \(n,\), got shape \(2, 1\)"),
        (["a"], {}, "values must be numbers, one for each text, got list"),
        ([1.0, 2.0], {"method": "bac"}, "method must be 'percentile' or 'bca', got 'bac'"),
        ([1.0, 2.0], {"confidence": 95}, "confidence must lie between 0 and 1, got 95"),
        ([1.0, 2.0], {"draws": 0}, "draws must be 1 or more, got 0"),
    ],
)
def test_what_has_no_interval_is_refused(x, options, message):
    """In one sentence."""
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(x, **options)


# ---------------------------------------------------------------- paired


def by_hand(difference):
    """Two-sided, from every assignment of signs: twice the smaller tail, at most 1."""
    means = [np.mean(np.multiply(s, difference)) for s in itertools.product((1, -1), repeat=len(difference))]
    tails = (
        np.mean(np.array(means) >= np.mean(difference) - 1e-12),
        np.mean(np.array(means) <= np.mean(difference) + 1e-12),
    )
    return min(1, 2 * min(tails))


@given(st.lists(st.floats(-100, 100).filter(lambda v: abs(v) > 1e-3), min_size=1, max_size=6))
def test_the_p_value_of_a_few_texts_counts_every_assignment_of_signs(difference):
    """Against itertools.product."""
    found = paired_difference(np.zeros(len(difference)), difference)
    assert found.exact
    assert found.pvalue == pytest.approx(by_hand(difference))
    assert found.estimate == pytest.approx(np.mean(difference))


def test_thirteen_texts_are_counted_and_fourteen_are_drawn():
    """At 9999 draws; the smallest p-values are 2 / 2^13 and 2 / 10^4."""
    a = np.arange(1.0, 15)
    few, many = paired_difference(0 * a[:13], a[:13]), paired_difference(0 * a, a)
    assert (few.exact, many.exact) == (True, False)
    assert few.pvalue == pytest.approx(2 / 2**13)
    assert 2 / 10_000 <= many.pvalue < 0.002


def test_its_size_is_what_it_says():
    """Unequal, skewed differences that are symmetric about 0: 5 % in 5 % of 400 sets."""
    rng = np.random.default_rng(0)
    p = [paired_difference(np.zeros(20), rng.standard_t(2, size=20), draws=400, seed=i).pvalue for i in range(400)]
    assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.05, abs=0.038)
    assert np.mean(np.array(p) <= 0.5) == pytest.approx(0.5, abs=0.09)


def test_pairing_sees_a_steady_change_of_texts_that_differ():
    """One side only where one is asked for."""
    before = np.linspace(0, 100, 12)
    after = before + np.linspace(0.1, 0.2, 12)
    assert paired_difference(before, after).pvalue == pytest.approx(2 / 2**12)
    assert paired_difference(before, after, alternative="greater").pvalue == pytest.approx(1 / 2**12)
    assert paired_difference(before, after, alternative="less").pvalue == 1


def test_one_text_proves_nothing():
    """A p-value of 1, or of 1/2 on the side it points to."""
    assert paired_difference([1.0], [2.0]).pvalue == 1
    assert paired_difference([1.0], [2.0], alternative="greater").pvalue == 0.5
    assert paired_difference([1.0], [2.0], alternative="less").pvalue == 1
    assert math.isnan(paired_difference([1.0], [2.0]).low)


def test_nothing_changed_is_a_p_value_of_one():
    """Differences of 0."""
    found = paired_difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert found[:4] == (0, 0, 0, 1)


def test_unpaired_numbers_are_refused():
    """Different lengths, an unknown alternative."""
    with pytest.raises(
        ValueError, match="before and after must hold one number for each of the same texts, got 2 and 3"
    ):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="alternative must be 'two-sided', 'greater' or 'less', got 'more'"):
        paired_difference([1.0], [2.0], alternative="more")
