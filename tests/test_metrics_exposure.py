"""Exposure: what it is for text that was never trained on, and what it equals."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pyunlearn.metrics import NULL_MEAN, SIGNIFICANT, generalized_exposure

scores = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12)
few = st.lists(st.integers(0, 5).map(float), min_size=1, max_size=12)  # with many ties


def exchangeable(m, count, seed=0):
    """`count` exposures, each of one draw among m others of the same law."""
    draws = np.random.default_rng(seed).gumbel(size=(count, m + 1))
    found = [generalized_exposure(row[0], row[1:]) for row in draws]
    return np.array([f.lower[0] for f in found]), np.array([f.upper[0] for f in found])


@pytest.mark.parametrize("m", [19, 99])
def test_text_that_is_exchangeable_with_its_references_passes_the_null(m):
    """P(exposure >= k) <= 2^-k for every k, on either side, within what 20,000 draws can tell."""
    for exposures in exchangeable(m, 20_000):
        for k in np.arange(0.25, math.log2(m + 1) + 0.5, 0.25):
            share, bound = (exposures >= k).mean(), 2.0**-k
            assert share <= bound + 4 * math.sqrt(bound * (1 - bound) / len(exposures))
        assert exposures.max() <= math.log2(m + 1) + 1e-12
        assert exposures.min() >= 0


def test_its_mean_is_near_one_over_ln_2():
    """Exactly: log2(m + 1) - mean log2(rank); 1.396 bits for 99 references, 1.436 for 999, 1.443 in the limit."""
    for m, mean in ((99, 1.396), (999, 1.436)):
        assert np.mean(math.log2(m + 1) - np.log2(np.arange(1, m + 2))) == pytest.approx(mean, abs=1e-3)
        every = generalized_exposure(np.arange(m + 1) - 0.5, np.arange(m)).lower  # each rank once
        assert every.mean() == pytest.approx(mean, abs=1e-3)
    assert pytest.approx(1.442695, abs=1e-6) == NULL_MEAN
    lower, upper = exchangeable(999, 4000)
    for exposures in (lower, upper):
        assert exposures.mean() == pytest.approx(1.436, abs=4 * 1.44 / math.sqrt(4000))


def test_it_is_exponential_with_rate_ln_2():
    """Kolmogorov-Smirnov, over ten seeds: a share of small p-values as chance has it; and not for memorized text."""
    p = [
        stats.kstest(exchangeable(1999, 300, seed)[0], "expon", args=(0, 1 / math.log(2))).pvalue for seed in range(10)
    ]
    assert min(p) > 1e-3
    assert np.median(p) > 0.1
    draws = np.random.default_rng(0).normal(size=(300, 200))
    memorized = [generalized_exposure(row[0] - 1, row[1:]).lower[0] for row in draws]
    assert stats.kstest(memorized, "expon", args=(0, 1 / math.log(2))).pvalue < 1e-6


def test_significant_is_what_one_unseen_text_in_twenty_reaches():
    """log2(20) bits; the smallest holdout that can show it has 19 texts."""
    assert pytest.approx(1 / 20) == 2**-SIGNIFICANT
    lower, _ = exchangeable(199, 20_000)
    assert (lower >= SIGNIFICANT - 1e-9).mean() == pytest.approx(1 / 20, abs=4 * math.sqrt(0.05 * 0.95 / 20_000))
    assert generalized_exposure(0.0, np.arange(1, 20)).lower[0] == pytest.approx(SIGNIFICANT)
    assert generalized_exposure(0.0, np.arange(1, 19)).lower[0] < SIGNIFICANT - 0.05


@given(st.integers(2, 300), st.integers(0, 10_000))
def test_it_equals_the_secret_sharer_s_exposure_when_the_references_enumerate_the_space(size, seed):
    """log2 |R| - log2 rank, rank 1 being the likeliest of all |R| secrets of the format (arXiv 1802.08232)."""
    perplexity = np.random.default_rng(seed).permutation(size).astype(float)
    for secret in {0, size // 2, size - 1}:
        rank = 1 + (np.sort(perplexity) < perplexity[secret]).sum()
        found = generalized_exposure(perplexity[secret], np.delete(perplexity, secret))
        assert found.lower[0] == pytest.approx(math.log2(size) - math.log2(rank))


@given(few, few)
def test_it_is_the_count_it_is_defined_by(x, references):
    """log2(m + 1) - log2(1 + #{r <= x}), and with >= on the other side: ties count against the text on both."""
    found = generalized_exposure(x, references)
    for i, score in enumerate(x):
        for exposure, count in (
            (found.lower[i], sum(r <= score for r in references)),
            (found.upper[i], sum(r >= score for r in references)),
        ):
            assert exposure == pytest.approx(math.log2((len(references) + 1) / (1 + count)))


@given(scores, scores)
def test_the_two_sides_mirror_each_other(x, references):
    """Negating all scores swaps them."""
    found, mirrored = (generalized_exposure(sign * np.array(x), sign * np.array(references)) for sign in (1, -1))
    np.testing.assert_array_equal(found.lower, mirrored.upper)
    np.testing.assert_array_equal(found.upper, mirrored.lower)


@given(scores, scores, st.randoms())
def test_the_order_of_the_references_does_not_matter_and_that_of_the_scores_is_kept(x, references, random):
    """Permuting rows permutes the answer."""
    shuffled, order = list(references), list(range(len(x)))
    random.shuffle(shuffled)
    random.shuffle(order)
    found, again = generalized_exposure(x, references), generalized_exposure([x[i] for i in order], shuffled)
    np.testing.assert_array_equal(found.lower[order], again.lower)
    np.testing.assert_array_equal(found.upper[order], again.upper)


@given(scores, scores)
def test_a_likelier_text_is_never_less_exposed(x, references):
    """Lower falls, and upper rises, with the score; both lie within 0 and log2(m + 1)."""
    found = generalized_exposure(sorted(x), references)
    assert (np.diff(found.lower) <= 0).all()
    assert (np.diff(found.upper) >= 0).all()
    for side in found:
        assert ((side >= -1e-12) & (side <= math.log2(len(references) + 1) + 1e-12)).all()


def test_ties_count_against_the_text_on_either_side():
    """A text exactly like all its references is neither memorized nor over-unlearned: 0 bits."""
    found = generalized_exposure([2.0], [2.0] * 63)
    assert (found.lower[0], found.upper[0]) == (0.0, 0.0)
    assert generalized_exposure([1.0], [2.0] * 63).lower[0] == 6.0


@pytest.mark.parametrize(
    ("x", "references", "message"),
    [
        ([1.0], [], "at least one reference score, got none"),
        ([math.nan], [1.0], "finite scores, got NaN or Inf"),
        ([1.0], [1.0, math.inf], "finite scores, got NaN or Inf"),
        ([-math.inf], [1.0], "finite scores, got NaN or Inf"),
    ],
)
def test_scores_that_are_not_numbers_are_refused(x, references, message):
    """A NaN would silently be the most or the least exposed of all."""
    with pytest.raises(ValueError, match=message):
        generalized_exposure(x, references)


def test_any_array_will_do_and_one_number_is_an_array_of_one():
    """Lists, float32 arrays, scalars."""
    assert generalized_exposure(1, [2, 3, 4]).lower.tolist() == [2.0]
    found = generalized_exposure(np.float32([1, 5]), np.float32([2, 3, 4]))
    assert found.lower.tolist() == [2.0, 0.0]
    assert found.upper.tolist() == [0.0, 2.0]
    assert found.lower.dtype == np.float64
    assert generalized_exposure([], [1.0]).lower.shape == (0,)
