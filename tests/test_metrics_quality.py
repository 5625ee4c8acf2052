"""Quality: truth ratio, forget quality, utility and prior agree with their definitions and conventions."""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pyunlearn.metrics import (
    UTILITY_PARTS,
    answer_prior,
    forget_quality,
    mean_interval,
    model_utility,
    model_utility_interval,
    option_probability,
    truth_ratio,
)

likelihood = st.floats(-12, -0.01)
answers = st.integers(1, 4).flatmap(
    lambda p: st.lists(st.tuples(likelihood, st.lists(likelihood, min_size=p, max_size=p)), min_size=1, max_size=5)
)


@given(answers, st.sampled_from(["geometric", "arithmetic"]))
def test_the_truth_ratio_is_its_definition(rows, mean):
    """Ratio and each aggregate agree with probabilities written out."""
    correct, wrong = [c for c, _ in rows], [w for _, w in rows]
    average = stats.gmean if mean == "geometric" else np.mean
    ratios = np.array([average(np.exp(w)) / math.exp(c) for c, w in rows])
    expected = {
        "closer_to_1_better": np.minimum(ratios, 1 / ratios),
        "true_better": np.maximum(0, 1 - ratios),
        "prob_mean": 1 / (1 + ratios),
    }
    for aggregate, values in expected.items():
        result = truth_ratio(correct, wrong, aggregate, mean=mean)
        np.testing.assert_allclose(result.ratio, ratios)
        np.testing.assert_allclose(result.value, values, atol=1e-12)
        assert result.mean.estimate == pytest.approx(values.mean())


def test_one_answer_alone_is_an_array_of_one():
    """One number with a row of wrong answers is one text; several correct answers need a row each."""
    assert truth_ratio(-1.0, [-1.0, -3.0]).ratio.tolist() == truth_ratio([-1.0], [[-1.0, -3.0]]).ratio.tolist()
    assert option_probability(-1.0, [-1.0]).tolist() == [0.5]
    with pytest.raises(ValueError, match="a row for each correct one"):
        truth_ratio([-1.0, -2.0], [-1.0, -3.0])


def test_the_two_means_differ_and_the_arithmetic_one_is_larger():
    """0.01 and 0.09 have a geometric mean of 0.03 and an arithmetic mean of 0.05; TOFU's own code uses both."""
    wrong = np.log([[0.01, 0.09]])
    assert truth_ratio(np.log([0.1]), wrong).ratio[0] == pytest.approx(0.3)
    assert truth_ratio(np.log([0.1]), wrong, mean="arithmetic").ratio[0] == pytest.approx(0.5)


def test_the_default_aggregate_is_two_sided_and_nothing_overflows():
    """A model driven to prefer wrong answers has not forgotten well either; 1000 nats apart stay finite."""
    result = truth_ratio([-1.0, -5.0, -1000.0], [[-5.0], [-1.0], [-0.5]])
    assert result.value[0] == pytest.approx(result.value[1])
    assert result.value[2] == 0
    for aggregate in ("true_better", "prob_mean"):
        assert np.isfinite(truth_ratio([-1000.0, -0.5], [[-0.5], [-1000.0]], aggregate).value).all()


# ---------------------------------------------------------------- forget quality


def test_forget_quality_is_the_two_sample_test_and_blind_to_inversion():
    """The p-value agrees with counting all ways to deal small samples, and is the same for 1 / R."""
    u, r = np.array([0.3, 0.8, 1.2, 2.0]), np.array([0.9, 1.5, 2.5])
    result = forget_quality(u, r)

    def distance(a, b):
        every = np.concatenate([a, b])
        return max(abs((a <= t).mean() - (b <= t).mean()) for t in every)

    pooled = np.concatenate([u, r])
    dealt = [distance(pooled[list(c)], np.delete(pooled, list(c))) for c in itertools.combinations(range(7), 4)]
    assert result.statistic == pytest.approx(distance(u, r))
    assert result.pvalue == pytest.approx(np.mean(np.array(dealt) >= distance(u, r) - 1e-12))
    assert forget_quality(1 / u, 1 / r)[:2] == pytest.approx(result[:2])
    assert not result.saturated


@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 4), (20, 40), (200, 200)])
def test_the_floor_is_the_p_value_of_samples_that_do_not_overlap(n, m):
    """At distance 1 the p-value equals the floor and is saturated."""
    result = forget_quality(np.arange(n), 1000.0 + np.arange(m))
    assert result.saturated
    assert result.statistic == 1
    assert result.pvalue == pytest.approx(10**result.log10_floor, rel=1e-6)


def test_the_floor_of_large_samples_is_a_number():
    """The floor of 2 / C(8000, 4000) is 10^-2406, finite as a logarithm."""
    result = forget_quality(np.arange(4000.0), np.arange(4000.0) + 0.5)
    assert result.log10_floor == pytest.approx(-2406, abs=1)
    assert not result.saturated
    assert result.pvalue > 0.9


def test_forget_quality_unpacks_into_statistic_and_p_value():
    """The result unpacks into a pair, and its two attributes survive a copy and a pickle."""
    result = forget_quality([1.0, 2.0, 3.0], [4.0, 5.0])
    statistic, pvalue = result
    assert (statistic, pvalue) == (result.statistic, result.pvalue) == (1.0, pytest.approx(0.2))
    for same in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert (tuple(same), same.log10_floor, same.saturated) == (tuple(result), result.log10_floor, True)
    assert "saturated=True" in repr(result)


# ---------------------------------------------------------------- utility


def test_model_utility_is_the_harmonic_mean_of_exactly_nine():
    """Utility agrees with a harmonic mean by hand; one 0 makes it 0; a missing or misspelt part is named."""
    parts = dict(zip(UTILITY_PARTS, np.linspace(0.1, 0.9, 9), strict=True))
    assert len(UTILITY_PARTS) == 9
    assert model_utility(parts) == pytest.approx(9 / sum(1 / v for v in parts.values()))
    assert model_utility(dict.fromkeys(UTILITY_PARTS, 0.25)) == pytest.approx(0.25)
    assert model_utility(parts | {"retain_rouge": 0.0}) == 0
    with pytest.raises(ValueError, match="got parts without retain_rouge, with retain_rogue"):
        model_utility({name.replace("retain_rouge", "retain_rogue"): v for name, v in parts.items()})
    with pytest.raises(ValueError, match=r"retain_rouge must lie from 0 to 1, got .*85"):
        model_utility(parts | {"retain_rouge": 85.0})


def test_the_interval_of_model_utility_draws_the_texts_of_each_split():
    """The interval agrees with a plain loop with one resample per split, and is wider than one that resamples the three
    parts of a split apart."""
    rng = np.random.default_rng(0)
    sizes = [n for n in (20, 12, 9) for _ in range(3)]
    own = [rng.uniform(0.05, 0.9, n) for n in (20, 12, 9)]
    parts = {name: own[i // 3] + 0.05 * rng.random(sizes[i]) for i, name in enumerate(UTILITY_PARTS)}
    result = model_utility_interval(parts, draws=500)

    def loop(together):
        rng = np.random.default_rng(0)
        values = []
        for _ in range(500):
            drawn = [rng.integers(0, n, n) for n in (sizes[::3] if together else sizes)]
            means = [x[drawn[i // 3 if together else i]].mean() for i, x in enumerate(parts.values())]
            values.append(9 / sum(1 / m for m in means))
        a = stats.norm.cdf(-math.sqrt(9 / 8) * stats.t.ppf(0.975, 8))  # the tail of the smallest split
        return np.quantile(values, a, method="lower"), np.quantile(values, 1 - a, method="higher")

    assert result.estimate == pytest.approx(model_utility({name: x.mean() for name, x in parts.items()}))
    assert result[1:] == pytest.approx(loop(True))
    apart = loop(False)
    assert apart[1] - apart[0] < 0.8 * (result.high - result.low)
    with pytest.raises(ValueError, match=r"retain_probability and retain_rouge must hold .*, got 20 and 3"):
        model_utility_interval(parts | {"retain_rouge": [0.1, 0.2, 0.3]})
    with pytest.raises(ValueError, match="got parts without retain_rouge"):
        model_utility_interval({name: x for name, x in parts.items() if name != "retain_rouge"})
    with pytest.raises(ValueError, match=r"retain_rouge must lie from 0 to 1, got .*85"):
        model_utility_interval(parts | {"retain_rouge": np.full(20, 85.0)})


@given(answers)
def test_the_probability_with_options_is_a_share(rows):
    """The share is P / (P + sum of the others), one in five by chance, for answers that are all improbable too."""
    result = option_probability([c for c, _ in rows], [w for _, w in rows])
    for (c, w), share in zip(rows, result, strict=True):
        assert share == pytest.approx(math.exp(c) / (math.exp(c) + sum(map(math.exp, w))))
    assert option_probability([-900.0], [[-900.0] * 4])[0] == pytest.approx(0.2)


def test_an_answer_that_needs_no_prompt_gains_nothing_from_it():
    """The gain is in nats per token; `explained` is the ratio of the likelihoods, at most 1."""
    result = answer_prior([-0.1, -0.1, -3.0], [-0.1, -3.1, -2.0])
    np.testing.assert_allclose(result.gain, [0, 3, -1], atol=1e-12)
    np.testing.assert_allclose(result.explained, [1, math.exp(-3), 1], atol=1e-12)
    assert result.mean.estimate == pytest.approx(2 / 3)
    assert result.mean == mean_interval([0, 3, -1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: truth_ratio([2.0], [[-1.0]]),
            "must be 0 or less, got 2.0: pass the mean log-likelihood per token, not the loss",
        ),
        (
            lambda: truth_ratio([-2.0], [-1.0]),
            r"must have shape \(1, wrong answers\), a row for each correct one, got \(1,\)",
        ),
        (lambda: truth_ratio([-2.0], [[math.nan]]), "wrong_log_likelihoods must be finite"),
        (lambda: truth_ratio([], np.zeros((0, 2))), "correct_log_likelihood must hold at least one number, got none"),
        (
            lambda: truth_ratio([-2.0], [[-1.0]], "closer"),
            "aggregate must be 'closer_to_1_better', 'true_better' or 'prob_mean', got 'closer'",
        ),
        (
            lambda: truth_ratio([-2.0], [[-1.0]], mean="harmonic"),
            "mean must be 'geometric' or 'arithmetic', got 'harmonic'",
        ),
        (lambda: forget_quality([1.0], []), "truth_ratios_retrained must hold at least one number"),
        (lambda: answer_prior([-1.0], [-1.0, -2.0]), "same texts, got 1 and 2"),
    ],
)
def test_what_has_no_quality_is_refused(call, message):
    """The error is one sentence that names the argument."""
    with pytest.raises(ValueError, match=message):
        call()
