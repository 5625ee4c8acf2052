"""Privacy: area, true-positive rate and PrivLeak agree with their definitions, and their intervals cover."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pyunlearn.metrics import auc, privleak, privleak_interval, tpr_at_fpr
from pyunlearn.metrics.privacy import _areas

few = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=9)


@given(few, few)
def test_the_area_is_the_share_of_pairs_in_order(forget, holdout):
    """The area agrees with a count of pairs with one half for ties; the other direction is its complement."""
    pairs = [(h > f) + 0.5 * (h == f) for f, h in itertools.product(forget, holdout)]
    result = auc(forget, holdout)
    assert result.estimate == pytest.approx(np.mean(pairs))
    assert 0 <= result.low <= result.estimate + 1e-12
    assert result.estimate - 1e-12 <= result.high <= 1
    assert auc(forget, holdout, members="high").estimate == pytest.approx(1 - result.estimate)
    assert auc(holdout, forget).estimate == pytest.approx(1 - result.estimate)
    assert auc(np.negative(forget), np.negative(holdout), members="high") == pytest.approx(result)


def test_a_memorized_set_has_area_one():
    """Low scores for the forget set make an area of 1, in the direction of open-unlearning."""
    assert auc([0.1, 0.2], [3.0, 4.0]).estimate == 1
    assert auc([9.0, 8.0], [3.0, 4.0]).estimate == 0


@pytest.mark.full
@pytest.mark.parametrize(("shift", "n", "m"), [(0.0, 30, 50), (1.0, 30, 50), (2.3, 40, 25)])
def test_the_interval_of_the_area_covers(shift, n, m):
    """95 % intervals cover the area of two normal laws in 92 to 98 % of 600 samples, from chance to 0.95."""
    rng, truth = np.random.default_rng(0), stats.norm.cdf(shift / math.sqrt(2))
    result = [auc(rng.normal(size=n), rng.normal(shift, size=m)) for _ in range(600)]
    covered = np.mean([f.low <= truth <= f.high for f in result])
    assert 0.925 <= covered <= 0.985


def test_a_perfect_attack_on_few_texts_has_a_wide_interval():
    """DeLong's interval would be 1 to 1; 10 pairs in order are compatible with an area of 0.69 at 2.5 %."""
    result = auc(np.arange(10.0), np.arange(10.0) + 100)
    assert (result.estimate, result.high) == (1, 1)
    assert result.low == pytest.approx(0.025**0.1)
    low = auc(np.arange(10.0) + 100, np.arange(10.0))
    assert (low.low, low.high) == (0, pytest.approx(1 - 0.025**0.1))
    assert auc([1.0], [2.0, 3.0]).low == pytest.approx(0.025)
    tied = auc([1.0] * 8, [1.0] * 9)
    assert tied.estimate == 0.5
    assert tied.high - tied.low > 0.5


# ---------------------------------------------------------------- true-positive rate


@given(few, few, st.floats(0.01, 0.99))
def test_the_rate_is_the_best_of_all_thresholds_that_are_allowed(forget, holdout, fpr):
    """The rate agrees with a search over every threshold."""
    f, h = np.array(forget), np.array(holdout)
    best = max(
        (f < t).mean()
        for t in [*np.unique(np.concatenate([f, h])), np.inf]
        if (h < t).sum() <= math.floor(fpr * h.size + 1e-9)
    )
    result = tpr_at_fpr(f, h, fpr)
    assert result.estimate == best == (f < result.threshold).mean()
    assert result.fpr == (h < result.threshold).mean() <= fpr
    if result.resolved:
        assert result.low <= result.estimate <= result.high
    else:
        assert np.isnan(result[1:3]).all()
    np.testing.assert_array_equal(tpr_at_fpr(-f, -h, fpr, members="high")[:3], result[:3])


def test_a_small_holdout_cannot_show_a_small_rate_and_says_so():
    """One false positive in a thousand cannot be shown by 100 texts, and `resolved` is False; 1000 texts can."""
    holdout = np.arange(1000.0)
    few, many = tpr_at_fpr([-1.0, 0.5], holdout[:100], 0.001), tpr_at_fpr([-1.0, 0.5], holdout, 0.001)
    assert (few.estimate, few.fpr, few.resolved) == (0.5, 0, False)
    assert np.isnan([few.low, few.high]).all()
    assert (many.estimate, many.fpr, many.resolved) == (1.0, 0.001, True)


def test_chance_finds_as_many_as_it_gets_wrong():
    """Two samples of one law have the false-positive rate as rate, and its interval holds it and is wider than the
    binomial one of the forget set alone."""
    rng = np.random.default_rng(0)
    f, h = rng.normal(size=20_000), rng.normal(size=20_000)
    for fpr in (0.01, 0.001):
        result = tpr_at_fpr(f, h, fpr)
        assert result.estimate == pytest.approx(fpr, abs=5 * math.sqrt(2 * fpr / 20_000))
        exact = stats.binomtest(round(result.estimate * 20_000), 20_000).proportion_ci(0.95, method="exact")
        assert result.low < exact.low < exact.high < result.high
        assert result.low <= fpr <= result.high
        assert result.high - result.low < 2 * (exact.high - exact.low)


def test_the_interval_of_the_rate_mixes_beta_laws_over_the_draws_of_the_threshold():
    """The ends agree with quantiles of draws: how many holdout texts lie below the true threshold, then a Beta law."""
    rng = np.random.default_rng(0)
    f, h = rng.normal(-1.5, 1, 40), np.sort(rng.normal(size=60))
    result = tpr_at_fpr(f, h, 0.05)
    ends = np.concatenate([[-np.inf], h, [np.inf]])
    below = rng.binomial(60, 0.05, 100_000)
    least, most = ((f[:, None] < ends).sum(0)[below + more] for more in (0, 1))
    low = np.where(least == 0, 0.0, rng.beta(np.maximum(least, 1), 41 - least))
    high = np.where(most == 40, 1.0, rng.beta(most + 1, np.maximum(40 - most, 1)))
    assert result.low == pytest.approx(np.quantile(low, 0.025), abs=0.01)
    assert result.high == pytest.approx(np.quantile(high, 0.975), abs=0.01)


# ---------------------------------------------------------------- PrivLeak


def test_privleak_turns_our_area_round_as_muse_does():
    """PrivLeak is -100 for a set wholly identified, 0 as retrained and +100 at the other end; ours and MUSE's areas are
    complements."""
    assert privleak(1.0) == -100
    assert privleak(0.5) == 0
    assert privleak(0.0) == 100
    assert privleak(0.53, 0.53) == 0
    assert privleak(0.8, 0.6) == pytest.approx((0.2 - 0.4) / 0.4 * 100)
    assert privleak(auc([0.1, 0.2], [3.0, 4.0]).estimate, 0.45) == -100


def sides(rng, n=25, m=40, shift=1.0):
    """Draw scores of forget set and holdout under an unlearned and a retrained model; a text's own part is shared."""
    own = [rng.normal(size=k) for k in (n, m)]
    now, retrained = ([x + 0.3 * rng.normal(size=x.size) for x in own] for _ in range(2))
    return now[0] - shift, now[1], *retrained


def test_the_interval_of_privleak_draws_each_text_under_both_models():
    """The interval agrees with a plain loop that counts pairs, ties included, and is far narrower than one that
    resamples the models apart."""
    f, h, g, k = (np.round(x, 1) for x in sides(np.random.default_rng(0)))

    def area(f, h):
        return ((h > f[:, None]) + 0.5 * (h == f[:, None])).mean()

    def loop(together, draws=3000):
        rng = np.random.default_rng(1)
        result = []
        for _ in range(draws):
            i, j, i2, j2 = (rng.integers(0, n, n) for n in (25, 40, 25, 40))
            if together:
                i2, j2 = i, j
            result.append(privleak(area(f[i], h[j]), area(g[i2], k[j2])))
        return np.quantile(result, [0.025, 0.975])

    result = privleak_interval(f, h, g, k, draws=3000)
    assert result.estimate == pytest.approx(privleak(area(f, h), area(g, k)))
    np.testing.assert_allclose(result[1:], loop(True), atol=2.5)
    apart = loop(False)
    assert apart[1] - apart[0] > 1.5 * (result.high - result.low)
    assert result == privleak_interval(f, h, g, k, draws=3000)
    assert result != privleak_interval(f, h, g, k, draws=3000, seed=1)
    same = privleak_interval(-f, -h, -g, -k, draws=3000, members="high")
    np.testing.assert_allclose(same, result)


@pytest.mark.full
def test_the_interval_of_privleak_covers_as_often_as_it_says():
    """90 % intervals cover PrivLeak of two normal laws one apart in 82 to 97 % of 200 samples."""
    rng = np.random.default_rng(0)
    truth = privleak(stats.norm.cdf(1 / math.sqrt(2)))
    covered = 0
    for i in range(200):
        result = privleak_interval(rng.normal(-1, 1, 40), rng.normal(0, 1, 60), confidence=0.9, draws=200, seed=i)
        covered += result.low <= truth <= result.high
    assert 0.82 <= covered / 200 <= 0.97


def test_a_perfect_attack_on_few_texts_leaves_privleak_open():
    """Four texts a side are few: the interval is as wide as the area's, although every resample is -100."""
    f, h = [0.1, 0.2, 0.3, 0.4], [3.0, 4.0, 5.0, 6.0]
    result = privleak_interval(f, h)
    assert result[:2] == (-100, -100)
    assert result.high == pytest.approx(privleak(auc(f, h).low))
    assert result.high > -30


def test_a_draw_without_privleak_leaves_it_open_above():
    """Resamples whose retrained area is 1 have no PrivLeak, and leave the upper end infinite."""
    g, k = [0.0, 1.0, 2.0, 5.0], [4.0, 6.0, 7.0, 8.0]
    result = privleak_interval([5.0, 5.5, 6.5, 7.5], [4.0, 6.0, 7.0, 8.0], g, k)
    assert result.high == math.inf
    assert math.isfinite(result.low)
    assert np.isnan(privleak_interval([1.0], k, [5.0], k)[1:]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: auc([], [1.0]), "forget must hold at least one number, got none"),
        (lambda: auc([1.0], [math.nan]), "holdout must be finite"),
        (lambda: auc([1.0], [1.0], members="up"), "members must be 'low' or 'high', got 'up'"),
        (lambda: tpr_at_fpr([1.0], [1.0], 1.0), "fpr must lie between 0 and 1, got 1.0"),
        (lambda: privleak_interval([1], [2], [1]), "must be passed both or neither, got one of them"),
        (
            lambda: privleak_interval([1, 2], [2, 3], [1], [2, 3]),
            "forget and forget_retrained must hold .*, got 2 and 1",
        ),
        (lambda: privleak_interval([1, 2], [2, 3], draws=0), "draws must be 1 or more, got 0"),
        (lambda: privleak_interval([1, 2], [], draws=9), "holdout must hold at least one number, got none"),
        (lambda: privleak(1.2), "auc must lie from 0 to 1, got 1.2"),
        (lambda: privleak(0.5, 1.0), "auc_retrained must be below 1, got 1: .*never saw them"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, message):
    """The error is one sentence that names the argument."""
    with pytest.raises(ValueError, match=message):
        call()


def test_a_draw_counts_ties_one_half_as_the_area_itself_does():
    """With each text drawn once the area equals that of auc, on scores full of ties; a text drawn twice counts as two
    texts."""
    rng = np.random.default_rng(4)
    f, h = rng.integers(0, 4, 20).astype(float), rng.integers(0, 4, 30).astype(float)
    once = _areas(f, h, np.ones((1, 20), dtype=np.int64), np.ones((1, 30), dtype=np.int64))
    assert once[0] == pytest.approx(auc(f, h).estimate, abs=1e-12)
    times = rng.multinomial(30, np.full(30, 1 / 30), size=1)
    drawn = _areas(f, h, np.ones((1, 20), dtype=np.int64), times)
    assert drawn[0] == pytest.approx(auc(f, np.repeat(h, times[0])).estimate, abs=1e-12)
