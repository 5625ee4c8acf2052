"""Memorization: each number against its definition, and what public code gets wrong."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyunlearn.errors import ArgumentError
from pyunlearn.metrics import (
    counterfactual_memorization,
    discoverable_extraction,
    exact_memorization,
    extraction_strength,
    memorization_accuracy,
    simplicity,
)

matches = st.lists(st.booleans(), min_size=1, max_size=14)


def subsets(models, examples, seed):
    """A mask in which every example is in and out at least once, and accuracies."""
    rng = np.random.default_rng(seed)
    mask = rng.random((models, examples)) < 0.5
    mask[0], mask[1] = True, False
    return mask, rng.random((models, examples))


@given(st.integers(2, 7), st.integers(1, 6), st.integers(0, 1000))
def test_counterfactual_memorization_is_in_minus_out_and_simplicity_in_plus_out(models, examples, seed):
    """Means over the models with the example and over those without, loop by loop; accuracies bound both."""
    mask, scores = subsets(models, examples, seed)
    memorization, simple = counterfactual_memorization(mask, scores), simplicity(mask.astype(int), scores)
    for i in range(examples):
        inside = [scores[k, i] for k in range(models) if mask[k, i]]
        outside = [scores[k, i] for k in range(models) if not mask[k, i]]
        assert memorization[i] == pytest.approx(np.mean(inside) - np.mean(outside))
        assert simple[i] == pytest.approx(np.mean(inside) + np.mean(outside))
    assert (abs(memorization) <= 1).all()
    assert ((simple >= 0) & (simple <= 2)).all()


def test_what_only_its_own_models_know_is_memorized_and_what_all_know_is_simple():
    """1 and 1; 0 and 2; and 0 and 0 for what nobody knows."""
    mask = np.array([[1, 0, 1], [0, 1, 0], [1, 1, 0]])
    scores = np.column_stack([mask[:, 0], np.ones(3), np.zeros(3)])
    assert counterfactual_memorization(mask, scores).tolist() == [1, 0, 0]
    assert simplicity(mask, scores).tolist() == [1, 2, 0]


@pytest.mark.parametrize("metric", [counterfactual_memorization, simplicity])
def test_an_example_that_all_models_or_none_trained_on_is_refused(metric):
    """Public code divides by zero there; the error says which examples."""
    mask, scores = subsets(4, 9, 0)
    never, always = mask.copy(), mask.copy()
    never[:, [2, 5]], always[:, 7] = False, True
    with pytest.raises(ArgumentError, match=r"no model was trained on example\(s\) 2, 5"):
        metric(never, scores)
    with pytest.raises(ArgumentError, match=r"every model was trained on example\(s\) 7"):
        metric(always, scores)
    with pytest.raises(ArgumentError, match="0, 1, 2, 3, 4 and 4 more"):
        metric(np.zeros_like(mask), scores)


def test_masks_and_scores_that_do_not_fit_are_refused():
    """Shapes, NaN, and a mask of fractions."""
    mask, scores = subsets(4, 3, 0)
    with pytest.raises(ArgumentError, match=r"\(4, 3\), \(4, 2\)"):
        counterfactual_memorization(mask, scores[:, :2])
    with pytest.raises(ArgumentError, match="finite, and holds 1 NaN"):
        counterfactual_memorization(mask, np.where(np.arange(12).reshape(4, 3) == 5, np.nan, scores))
    with pytest.raises(ArgumentError, match="true and false"):
        counterfactual_memorization(mask * 0.5, scores)
    with pytest.raises(ArgumentError, match="2-dimensional"):
        counterfactual_memorization(mask[0], scores)


@given(matches)
def test_memorization_accuracy_and_exact_memorization_are_the_share_of_matches(found):
    """Over the tokens that something predicts: T - 1 of a whole text's T, every one of a completion's."""
    assert memorization_accuracy(found) == pytest.approx(sum(found) / len(found))
    assert exact_memorization(found) == pytest.approx(sum(found) / len(found))


def by_definition(found):
    """1 - min{k : all of found[k:]} / n, where k = n, giving everything away, always serves."""
    n = len(found)
    return 1 - min(k for k in range(n + 1) if all(found[k:])) / n


@given(matches)
def test_extraction_strength_is_its_definition(found):
    """Prefix by prefix."""
    assert extraction_strength(found) == pytest.approx(by_definition(found))


@pytest.mark.parametrize("n", [1, 2, 7])
def test_no_match_has_strength_0_and_not_one_token_s_worth(n):
    """Public code leaves its loop at k = n - 1 and reports 1 / n."""
    assert extraction_strength([False] * n) == 0
    assert extraction_strength([True] * (n - 1) + [False]) == 0
    assert extraction_strength([False] * (n - 1) + [True]) == pytest.approx((n > 1) / n + (n == 1))
    assert extraction_strength([True] * n) == 1


@given(matches, st.integers(0, 14), st.integers(1, 14))
def test_discoverable_extraction_is_a_whole_suffix_of_matches(found, prefix, suffix):
    """Every one of the suffix's tokens, and none before or after it, counts; a suffix cut short is refused."""
    if prefix + suffix > len(found):
        with pytest.raises(ArgumentError, match="whole suffix"):
            discoverable_extraction(found, [prefix], suffix_length=suffix)
    else:
        expected = float(all(found[prefix : prefix + suffix]))
        assert discoverable_extraction(found, [prefix, 0], suffix_length=suffix)[0] == expected


def test_a_text_extractable_from_its_start_is_discoverable_at_every_prefix():
    """And one with a single miss only beyond it."""
    assert discoverable_extraction([1] * 10, range(6), suffix_length=5).tolist() == [1] * 6
    assert discoverable_extraction([1, 1, 0, *[1] * 7], range(6), suffix_length=5).tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.raises(ArgumentError, match="-1"):
        discoverable_extraction([1] * 10, [-1], suffix_length=5)


@pytest.mark.parametrize("metric", [memorization_accuracy, exact_memorization, extraction_strength])
def test_no_token_and_no_truth_value_are_refused(metric):
    """A log-likelihood in place of a match would silently count as true."""
    with pytest.raises(ArgumentError, match="not empty"):
        metric([])
    with pytest.raises(ArgumentError, match="true and false"):
        metric([-0.5, 1.0])
    with pytest.raises(ArgumentError, match="1-dimensional"):
        metric([[True]])
