"""Membership attacks: each agrees with its definition, and avoids the known mistakes of public code."""

import math
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pyunlearn import metrics
from pyunlearn.metrics import (
    auc,
    calibrated_scores,
    lira_score,
    logit_score,
    loss_score,
    min_k_plus_plus_score,
    min_k_score,
    reference_score,
    zlib_score,
)

tokens = st.lists(st.floats(-20, 0), min_size=1, max_size=30)


def test_every_score_is_lower_for_a_text_that_is_better_known():
    """Low = member holds for every public `*_score`: the first text of each pair is the better known one."""
    known, unknown = np.full(10, -0.1), np.full(10, -3.0)
    means, statistics = [-0.1, -3.0], ([np.full(10, 1.0)] * 2, [np.full(10, 0.5)] * 2)
    calls = [
        (loss_score, means),
        (zlib_score, means, ["a sentence", "a sentence"]),
        (reference_score, means, [-2.0, -2.0]),
        (min_k_score, [known, unknown]),
        (min_k_plus_plus_score, [known, unknown], *statistics),
        (logit_score, means),
        (lira_score, means[::-1], np.tile(np.arange(5.0) - 3, (2, 1))),
        (lira_score, [-2.0, 1.0], [[1.0, 1.5, 0.5]] * 2, [[-2.0, -1.5, -2.5]] * 2),
        (calibrated_scores, [0.1, 3.0], [2.0, 2.0]),
    ]
    for function, *arguments in calls:
        scores = function(*arguments)
        assert scores.shape == (2,)
        assert scores[0] < scores[1], function.__name__
    assert {f.__name__ for f, *_ in calls} == {n for n in metrics.__all__ if n.endswith(("_score", "_scores"))}


def test_loss_zlib_and_reference_by_hand():
    """The three scores agree with hand-computed values for one text."""
    text = "ein Satz, zwei Sätze"
    assert loss_score(-1.5).tolist() == [1.5]
    assert zlib_score([-1.5], [text]).tolist() == [1.5 / len(zlib.compress(text.encode()))]
    assert zlib_score([-1.5], ["ä" * 500])[0] > 3 * zlib_score([-1.5], ["".join(map(chr, range(300, 800)))])[0]
    assert reference_score([-1.5], [-2.5]).tolist() == [-1.0]


@given(st.lists(tokens, min_size=1, max_size=4), st.floats(0.01, 1))
def test_min_k_is_minus_the_mean_of_the_lowest_tokens(texts, k):
    """Min-K% agrees with sorting and counting the tokens of texts of any length."""
    result = min_k_score(texts, k)
    for x, score in zip(texts, result, strict=True):
        count = max(1, math.floor(k * len(x) + 1e-9))
        assert score == pytest.approx(-np.mean(sorted(x)[:count]), abs=1e-12)
    np.testing.assert_allclose(min_k_score(texts, 1), loss_score([np.mean(x) for x in texts]), atol=1e-12)


def test_the_share_of_tokens_is_not_spoiled_by_rounding():
    """0.29 of 100 tokens are 29, although int(0.29 * 100) is 28; at least one token counts."""
    x = -np.arange(100.0)
    assert min_k_score(x, 0.29)[0] == np.arange(71, 100).mean()
    assert int(0.29 * 100) == 28
    assert min_k_score([-1.0, -2.0], 0.2)[0] == 2.0


def test_one_text_alone_is_a_list_of_one():
    """A vector is one text; a table and lists of unequal lengths are several."""
    assert min_k_score(np.float32([-1, -2, -3])).tolist() == [3.0]
    assert min_k_score(np.array([[-1.0, -2.0], [-3.0, -4.0]])).tolist() == [2.0, 4.0]
    assert min_k_score([[-1.0], [-3.0, -4.0]]).tolist() == [1.0, 4.0]
    assert min_k_score([]).shape == (0,)


def test_min_k_plus_plus_standardises_by_the_model_s_own_law():
    """Mean and variance agree with sums over the whole vocabulary; the mean is minus the entropy."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(7), size=10)
    target = rng.integers(0, 7, 10)
    x = np.log(p[np.arange(10), target])
    mu = (p * np.log(p)).sum(1)
    variance = (p * np.log(p) ** 2).sum(1) - mu**2
    z = np.sort((x - mu) / np.sqrt(variance))
    assert min_k_plus_plus_score(x, -mu, variance, 0.3)[0] == pytest.approx(-z[:3].mean())


def test_a_certain_token_has_a_least_variance():
    """A certain token has no variance: it makes no 0 / 0, and a nearly certain one does not outweigh all others."""
    assert min_k_plus_plus_score([0.0, 0.0], [0.0, 0.0], [0.0, 0.0])[0] == 0
    assert min_k_plus_plus_score([-0.001], [0.0], [1e-12])[0] == pytest.approx(1.0)


# ---------------------------------------------------------------- LiRA


@given(st.floats(-50, -1e-6))
def test_the_logit_is_that_of_the_probability(x):
    """The score is ln((1 - p) / p), finite at p = 1 and where p underflows."""
    p = math.exp(x)
    assert logit_score(x)[0] == pytest.approx(math.log1p(-p) - math.log(p), rel=1e-6, abs=1e-9)
    assert logit_score(0.0)[0] == pytest.approx(-53 * math.log(2))
    assert logit_score(-2000.0)[0] == 2000


def test_lira_is_the_ratio_of_two_normal_densities():
    """Text by text the score agrees with scipy's normal densities, without the models marked NaN."""
    rng = np.random.default_rng(0)
    x, out, inside = rng.normal(size=4), rng.normal(1, 2, size=(4, 8)), rng.normal(-1, 0.5, size=(4, 6))
    out[1, 3:] = np.nan
    result = lira_score(x, out, inside)
    for i in range(4):
        o, n = out[i][np.isfinite(out[i])], inside[i]
        truth = stats.norm.logpdf(x[i], o.mean(), o.std(ddof=1)) - stats.norm.logpdf(x[i], n.mean(), n.std(ddof=1))
        assert result[i] == pytest.approx(truth)
    np.testing.assert_allclose(
        lira_score(x, out), [stats.norm.logcdf(x[i], np.nanmean(out[i]), np.nanstd(out[i], ddof=1)) for i in range(4)]
    )


def test_global_variance_is_pooled_and_the_center_may_be_the_median():
    """The pooled variance is taken around each text's own mean, so texts of different difficulty do not widen it."""
    out = np.array([[0.0, 2.0, 4.0], [100.0, 102.0, 110.0]])
    pooled = math.sqrt((8 + 56) / 4)
    np.testing.assert_allclose(
        lira_score([0.0, 100.0], out, variance="global"), stats.norm.logcdf([-2 / pooled, -4 / pooled])
    )
    np.testing.assert_allclose(
        lira_score([0.0, 100.0], out, variance="global", center="median"), stats.norm.logcdf([-2 / pooled, -2 / pooled])
    )


def test_offline_lira_is_one_sided():
    """A text far less likely than under the models without it is no member; a normal density would call it one."""
    out = [[1.0, 1.1, 0.9, 1.2, 0.8]] * 3
    result = lira_score([-1.0, 1.0, 5.0], out)
    assert result[0] < -20
    assert result[0] < result[1] < result[2] <= 0
    np.testing.assert_allclose(lira_score([1.0, -1.0, -5.0], -np.array(out), members="high"), result)


def test_lira_finds_members_and_stays_finite_far_out():
    """On simulated shadow models the offline ratio beats the plain loss, and the online ratio reaches the area of two
    normal laws; scores far out stay finite."""
    rng = np.random.default_rng(1)
    difficulty = rng.normal(0, 3, size=400)
    member = np.arange(400) % 2 == 0
    x = difficulty + rng.normal(size=400) - 1.5 * member
    out = difficulty[:, None] + rng.normal(size=(400, 16))
    inside = difficulty[:, None] - 1.5 + rng.normal(size=(400, 16))
    plain = auc(x[member], x[~member]).estimate
    offline, online = (auc(s[member], s[~member]).estimate for s in (lira_score(x, out), lira_score(x, out, inside)))
    assert plain < 0.7 < offline
    assert online == pytest.approx(stats.norm.cdf(1.5 / math.sqrt(2)), abs=0.06)
    assert np.isfinite(lira_score(x - 1e3, out, inside)).all()
    assert np.isfinite(lira_score([1.0], [[2.0, 2.0]], [[1.0, 1.0]])).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: min_k_score([-1.0], 20), "k must lie between 0 and 1, got 20"),
        (lambda: min_k_score([-1.0], 0), "k must lie between 0 and 1, got 0"),
        (lambda: min_k_score([[-1.0], []]), r"log_likelihoods\[1\] has no token: leave the text out"),
        (lambda: min_k_score([[-1.0, math.nan]]), r"log_likelihoods\[0\] must be finite"),
        (lambda: min_k_plus_plus_score([-1.0], [1.0, 2.0], [1.0]), "entropy must have one number for each token"),
        (lambda: min_k_plus_plus_score([-1.0], [1.0], [-1.0]), "variance must be 0 or more"),
        (
            lambda: zlib_score([-1.0], "a"),
            "texts must be a list of texts, got one string",
        ),
        (lambda: reference_score([-1.0], [1.0, 2.0]), "same texts, got 1 and 2"),
        (lambda: logit_score([0.5]), "log_likelihood must be 0 or less, got 0.5: pass the logarithm, not the loss"),
        (
            lambda: lira_score([1.0], [[1.0]]),
            "out_scores must come from two models or more .*with one, use reference_score",
        ),
        (
            lambda: lira_score([1.0], [1.0, 2.0]),
            r"out_scores must have shape \(1, models\), finite or NaN, got shape \(2,\)",
        ),
        (lambda: lira_score([1.0], [[1.0, 2.0]], members="up"), "members must be 'low' or 'high', got 'up'"),
        (lambda: lira_score([1.0], [[1.0, 2.0]], center="mode"), "center must be 'mean' or 'median', got 'mode'"),
    ],
)
def test_what_is_no_score_is_refused(call, message):
    """The error is one sentence that names the argument."""
    with pytest.raises(ValueError, match=message):
        call()
