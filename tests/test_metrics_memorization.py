"""Memorization: each number agrees with its definition, and avoids the known mistakes of public code."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyunlearn.errors import ArgumentError
from pyunlearn.metrics import counterfactual_memorization, exact_memorization, extraction_strength

matches = st.lists(st.booleans(), min_size=1, max_size=14)


def subsets(models, examples, seed):
    """Draw a mask in which every example is in and out at least once, and accuracies."""
    rng = np.random.default_rng(seed)
    mask = rng.random((models, examples)) < 0.5
    mask[0], mask[1] = True, False
    return mask, rng.random((models, examples))


@given(st.integers(2, 7), st.integers(1, 6), st.integers(0, 1000))
def test_counterfactual_memorization_is_in_minus_out(models, examples, seed):
    """The result is the mean over models with the example minus the mean over those without, from -1 to 1."""
    mask, scores = subsets(models, examples, seed)
    memorization = counterfactual_memorization(mask.astype(int), scores)
    for i in range(examples):
        inside = [scores[k, i] for k in range(models) if mask[k, i]]
        outside = [scores[k, i] for k in range(models) if not mask[k, i]]
        assert memorization[i] == pytest.approx(np.mean(inside) - np.mean(outside))
    assert (abs(memorization) <= 1).all()


def test_an_example_that_only_its_own_models_know_is_memorized():
    """The result is 1 for that example, and 0 for one that every model knows or no model knows."""
    mask = np.array([[1, 0, 1], [0, 1, 0], [1, 1, 0]])
    scores = np.column_stack([mask[:, 0], np.ones(3), np.zeros(3)])
    assert counterfactual_memorization(mask, scores).tolist() == [1, 0, 0]


def test_an_example_that_all_models_or_none_trained_on_is_refused():
    """The error names the examples, where public code divides by zero."""
    mask, scores = subsets(4, 9, 0)
    never, always = mask.copy(), mask.copy()
    never[:, [2, 5]], always[:, 7] = False, True
    with pytest.raises(ArgumentError, match=r"no model was trained on example\(s\) 2, 5"):
        counterfactual_memorization(never, scores)
    with pytest.raises(ArgumentError, match=r"every model was trained on example\(s\) 7"):
        counterfactual_memorization(always, scores)
    with pytest.raises(ArgumentError, match="0, 1, 2, 3, 4 and 4 more"):
        counterfactual_memorization(np.zeros_like(mask), scores)


def test_masks_and_scores_that_do_not_fit_are_refused():
    """Different shapes, NaN and a mask of fractions are refused."""
    mask, scores = subsets(4, 3, 0)
    with pytest.raises(ArgumentError, match=r"\(4, 3\), \(4, 2\)"):
        counterfactual_memorization(mask, scores[:, :2])
    with pytest.raises(ArgumentError, match="finite, got 1 NaN"):
        counterfactual_memorization(mask, np.where(np.arange(12).reshape(4, 3) == 5, np.nan, scores))
    with pytest.raises(ArgumentError, match="true and false"):
        counterfactual_memorization(mask * 0.5, scores)
    with pytest.raises(ArgumentError, match="2-dimensional"):
        counterfactual_memorization(mask[0], scores)


@given(matches)
def test_exact_memorization_is_the_share_of_matches(result):
    """Every scored token counts once."""
    assert exact_memorization(result) == pytest.approx(sum(result) / len(result))


def by_definition(result):
    """Compute 1 - min{k : all of matches[k:]} / n; k = n always qualifies."""
    n = len(result)
    return 1 - min(k for k in range(n + 1) if all(result[k:])) / n


@given(matches)
def test_extraction_strength_is_its_definition(result):
    """The strength agrees with a search prefix by prefix."""
    assert extraction_strength(result) == pytest.approx(by_definition(result))


@pytest.mark.parametrize("n", [1, 2, 7])
def test_no_match_has_strength_0_and_not_one_token_s_worth(n):
    """A last token that does not match makes 0, where public code leaves its loop early and reports 1 / n."""
    assert extraction_strength([False] * n) == 0
    assert extraction_strength([True] * (n - 1) + [False]) == 0
    assert extraction_strength([False] * (n - 1) + [True]) == pytest.approx((n > 1) / n + (n == 1))
    assert extraction_strength([True] * n) == 1


@pytest.mark.parametrize("metric", [exact_memorization, extraction_strength])
def test_no_token_and_no_truth_value_are_refused(metric):
    """Empty input and numbers are refused: a log-likelihood in place of a match would silently count as true."""
    with pytest.raises(ArgumentError, match="not empty"):
        metric([])
    with pytest.raises(ArgumentError, match="true and false"):
        metric([-0.5, 1.0])
    with pytest.raises(ArgumentError, match="1-dimensional"):
        metric([[True]])
