"""Difficulty: each score against its definition, computed another way."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax

from pyunlearn.errors import ArgumentError
from pyunlearn.metrics import (
    difficulty,
    el2n,
    entanglement,
    g_effect,
    grand,
    mean_relative_difference,
    median_steps,
    steps_to_forget,
)

seeds = st.integers(0, 10_000)


def test_difficulty_is_the_nll_per_token():
    """Nats a token; a positive sum, a loss with the wrong sign, is refused."""
    assert difficulty([-6.0, -1.0, 0.0], [3, 4, 2]).tolist() == [2.0, 0.25, 0.0]
    for sums, counts, message in (([1.0], [1], "0 or less"), ([-1.0], [0], "at least 1"), ([-1.0], [1, 1], "1 and 2")):
        with pytest.raises(ArgumentError, match=message):
            difficulty(sums, counts)


@given(seeds, st.integers(2, 30))
def test_el2n_is_the_norm_of_the_error(seed, vocabulary):
    """||p - onehot||_2 with the sum of squares; without it 1 - p_t, a lower bound within sqrt(2)."""
    rng = np.random.default_rng(seed)
    x = log_softmax(rng.normal(size=(6, vocabulary)) * 6, axis=1)
    target = rng.integers(0, vocabulary, 6)
    p, own = np.exp(x), x[np.arange(6), target]
    expected = np.linalg.norm(p - np.eye(vocabulary)[target], axis=1)
    np.testing.assert_allclose(el2n(own, (p**2).sum(1)), expected, rtol=1e-7, atol=3e-8)  # sqrt of the rounding of 1
    np.testing.assert_allclose(el2n(own), 1 - np.exp(own))
    assert (el2n(own) <= expected + 1e-9).all()
    assert (expected <= math.sqrt(2) * el2n(own) + 1e-9).all()


def test_el2n_keeps_its_digits_for_a_certain_token():
    """1 - p_t of p_t = 1 - 1e-12; an impossible sum of squares is refused."""
    assert el2n(-1e-12) == pytest.approx(1e-12, rel=1e-6)
    for rounded in (1.0, 1 - 6e-8):  # a float32 sum, off by more than all there is
        assert 1e-9 <= el2n([-1e-9], [rounded])[0] * (1 + 1e-6) <= math.sqrt(2) * 1e-9 * (1 + 1e-5)
    assert el2n([-math.inf], [1.0])[0] == pytest.approx(math.sqrt(2))
    for squares in ([0.2], [1.1], [0.5, 0.5]):
        with pytest.raises(ArgumentError, match=r"between p_t\^2 and 1"):
            el2n([math.log(0.5)], squares)


def test_grand_is_the_mean_over_models():
    """Not over examples."""
    assert grand([[1.0, 2.0, 3.0], [3.0, 2.0, 7.0]]).tolist() == [2, 2, 5]
    with pytest.raises(ArgumentError, match="0 or more"):
        grand([[-1.0]])


@given(seeds, st.integers(1, 5), st.integers(1, 4))
def test_mean_relative_difference_is_its_formula(seed, tokens, draws):
    """Sum over tokens, mean over draws, absolute value last."""
    rng = np.random.default_rng(seed)
    plain = [-rng.exponential(size=tokens) - 0.01, -rng.exponential(size=2 * tokens) - 0.01]
    noisy = [-rng.exponential(size=(draws, len(p))) for p in plain]
    expected = [
        abs(sum(sum((p[t] - q[t]) / p[t] for t in range(len(p))) for q in qs) / draws)
        for p, qs in zip(plain, noisy, strict=True)
    ]
    np.testing.assert_allclose(mean_relative_difference(plain, noisy), expected, atol=1e-9)


def test_noise_that_cancels_is_no_difference_and_a_certain_token_does_not_blow_up():
    """The absolute value of the mean, not the mean of absolute values; and |P_t| = 0 counts as the floor."""
    assert mean_relative_difference([[-1.0]], [[[-0.5], [-1.5]]])[0] == 0
    found = mean_relative_difference([[0.0, -1.0]], [[[-1e-7, -1.0]]])
    assert found[0] == pytest.approx(0.1)
    for plain, noisy, message in (
        ([[-1.0]], [[[-1.0, -1.0]]], r"\(draws, 1\)"), ([[-1.0]], [], "1 and 0"), ([[1.0]], [[[-1.0]]], "0 or less"),
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match=message):
            mean_relative_difference(plain, noisy)


def test_steps_to_forget_is_the_first_time_and_says_what_never_came():
    """First, not last: an example may come back; at most the threshold, not below it."""
    exposures = np.array([[6, 6, 1, 6], [1.5, 6, 6, 6], [4, 5, 6, 2], [1, 5, 6, 6]])
    found = steps_to_forget(exposures, 2)
    assert found.steps.tolist() == [1, 3, 0, 2]
    assert found.censored.tolist() == [False, True, False, False]
    assert steps_to_forget(exposures, 2, steps=[0, 16, 32, 40]).steps.tolist() == [16, 40, 0, 32]
    with pytest.raises(ArgumentError, match="must rise"):
        steps_to_forget(exposures, 2, steps=[0, 2, 2, 3])
    with pytest.raises(ArgumentError, match="4 and 3"):
        steps_to_forget(exposures, 2, steps=[0, 1, 2])


def kaplan_meier(steps, censored):
    """By the product formula: of those still at risk, the share that survives each event."""
    survival = 1.0
    for t in sorted({s for s, c in zip(steps, censored, strict=True) if not c}):
        at_risk = sum(s >= t for s in steps)
        events = sum(s == t and not c for s, c in zip(steps, censored, strict=True))
        survival *= 1 - events / at_risk
        if survival <= 0.5 + 1e-12:
            return t
    return math.inf


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=12))
def test_median_steps_is_the_kaplan_meier_median(rows):
    """Against the product formula."""
    steps, censored = zip(*rows, strict=True)
    assert median_steps(steps, censored) == kaplan_meier(steps, censored)


def test_censored_examples_are_not_easy_ones():
    """Half and more never forgotten: no median; and one that leaves early unforgotten raises it above the naive 2."""
    assert median_steps([1, 9, 9], [False, True, True]) == math.inf
    assert median_steps([1, 2, 3, 4], [False] * 4) == 2
    assert median_steps([1, 1, 3, 4], [False, True, False, False]) == 3


@given(seeds)
def test_entanglement_is_its_formula(seed):
    """Term by term; translation, rotation and scale change nothing."""
    rng = np.random.default_rng(seed)
    f, r = rng.normal(size=(5, 3)), rng.normal(size=(8, 3)) * 2 + 1
    middle = (f.mean(0) + r.mean(0)) / 2
    within = np.mean([sum((h - f.mean(0)) ** 2) for h in f]) + np.mean([sum((h - r.mean(0)) ** 2) for h in r])
    between = 0.5 * (sum((f.mean(0) - middle) ** 2) + sum((r.mean(0) - middle) ** 2))
    assert entanglement(f, r) == pytest.approx(within / between)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    assert entanglement(3 * f @ turn + 7, 3 * r @ turn + 7) == pytest.approx(within / between)
    assert entanglement(f - 50, r) < entanglement(f, r)
    assert entanglement(f, f) == math.inf
    with pytest.raises(ArgumentError, match="3 and 2"):
        entanglement(f, r[:, :2])


def test_g_effect_predicts_what_a_small_step_does():
    """A step eta on the objective changes either loss by -eta GE, here of two quadratics; ascent on NLL_F has GE below 0."""
    rng = np.random.default_rng(0)
    theta, a, b = rng.normal(size=(3, 4))
    nll_f, nll_r = (lambda w, c=c: ((w - c) ** 2).sum() / 2 for c in (a, b))
    grad_f, grad_r = theta - a, theta - b
    objective = -grad_f + 0.3 * grad_r
    found, eta = g_effect(grad_f, grad_r, objective), 1e-6
    after = theta - eta * objective
    assert (nll_f(after) - nll_f(theta)) / -eta == pytest.approx(float(found.unlearning), rel=1e-4)
    assert (nll_r(after) - nll_r(theta)) / -eta == pytest.approx(float(found.retaining), rel=1e-4)
    assert g_effect(grad_f, grad_r, -grad_f).unlearning < 0
    groups = g_effect(np.stack([grad_f, 2 * grad_f]), np.stack([grad_r] * 2), np.stack([objective] * 2))
    assert groups.unlearning.tolist() == pytest.approx([float(found.unlearning), 2 * float(found.unlearning)])
    with pytest.raises(ArgumentError, match="one shape"):
        g_effect(grad_f, grad_r, objective[:2])
