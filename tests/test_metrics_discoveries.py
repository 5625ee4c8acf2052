"""Texts selected at a false discovery rate: its guarantee, its power, and how many non-members it takes."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pyunlearn.errors import ArgumentError
from pyunlearn.metrics import discoveries, generalized_exposure, non_members_needed


@given(st.lists(st.floats(0, 12), min_size=1, max_size=40), st.sampled_from([0.01, 0.05, 0.2]))
def test_it_is_the_procedure_of_benjamini_and_hochberg(exposures, rate):
    """The same texts as by scipy's adjusted p-values, and the threshold separates them from the rest."""
    exposures = np.array(exposures)
    result = discoveries(exposures, rate=rate)
    adjusted = stats.false_discovery_control(2.0**-exposures)
    clear = np.abs(adjusted - rate) > 1e-6
    np.testing.assert_array_equal(result.significant[clear], (adjusted <= rate)[clear])
    np.testing.assert_array_equal(result.significant, exposures >= result.threshold - 1e-9)


def test_one_text_needs_4_32_bits_and_nineteen_non_members():
    """As a single test at 5 %; without texts there is nothing to select."""
    assert discoveries([math.log2(20)]).significant.tolist() == [True]
    assert discoveries([4.32]).significant.tolist() == [False]
    assert discoveries([]).significant.size == 0
    assert non_members_needed(1) == 19
    assert non_members_needed(20, 20) == 19


@pytest.mark.parametrize(("n", "k"), [(1, 1), (20, 20), (400, 20), (400, 1), (7, 3)])
def test_so_many_non_members_are_enough_and_one_fewer_is_not(n, k):
    """k texts likelier than all of them are selected, and the others, in the middle, are not."""
    for m, selected in ((non_members_needed(n, k), k), (non_members_needed(n, k) - 1, 0)):
        scores = np.where(np.arange(n) < k, -1.0, m / 2)
        assert discoveries(generalized_exposure(scores, np.arange(m)).lower).significant.sum() == selected


@pytest.mark.full
@pytest.mark.parametrize("m", [64, 199, 999])
@pytest.mark.parametrize("n", [1, 20, 400])
def test_unseen_texts_are_hardly_ever_selected(n, m):
    """Any of n unseen texts in at most 5 % of sets (7 % of 1000 sets, with chance); at 4.32 bits each, in all sets."""
    rng = np.random.default_rng(n + m)
    alarms = [
        discoveries(generalized_exposure(rng.gamma(8, size=n), rng.gamma(8, size=m)).lower).significant.any()
        for _ in range(1000)
    ]
    assert np.mean(alarms) <= 0.07


def test_memorized_texts_are_named_and_unseen_ones_are_not():
    """20 of 400 memorized at 4 standard deviations, 999 non-members: 80 % are named, 8 % at most of those are false."""
    rng, named, false = np.random.default_rng(0), [], []
    for _ in range(200):
        scores, non_members = rng.normal(size=400), rng.normal(size=999)
        scores[:20] -= 4
        selected = discoveries(generalized_exposure(scores, non_members).lower).significant
        named.append(selected[:20].mean())
        false.append(selected[20:].sum() / max(selected.sum(), 1))
    assert np.mean(named) >= 0.8
    assert np.mean(false) <= 0.06


def test_arguments_are_checked():
    """A rate outside (0, 1), NaN, no text."""
    for rate in (0, 1, math.nan):
        with pytest.raises(ArgumentError, match="rate must lie between 0 and 1"):
            discoveries([1.0], rate=rate)
    with pytest.raises(ArgumentError, match="finite"):
        discoveries([math.nan])
    with pytest.raises(ArgumentError, match="k must be 1 or more"):
        non_members_needed(10, 0)
