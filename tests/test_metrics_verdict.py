"""Verdicts: they agree with the rules of the loop, and their intervals cover."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pyunlearn.errors import ArgumentError
from pyunlearn.metrics import (
    SIGNIFICANT,
    discoveries,
    exposure_interval,
    generalized_exposure,
    verdict,
)

NON_MEMBERS = np.arange(99.0)


def test_each_verdict_by_hand():
    """Among 99 non-members 0 to 98, a score of -1 is memorized, a middle one forgotten, and 97.5 over-unlearned, but
    not certainly."""
    before = [-1.0, -1.0, -1.0, 50.0, 50.0, 98.0]
    after = [-1.0, 50.0, 98.5, 50.0, 97.5, 98.5]
    result = verdict(before, after, NON_MEMBERS)
    assert result.verdict.tolist() == [
        "still exposed",
        "forgotten",
        "over-unlearned",
        "not memorized",
        "over-unlearned",
        "not memorized",
    ]
    assert result.certain.tolist() == [False, False, False, True, False, True]
    assert result.threshold == math.log2(6 / (0.05 * 3))  # 3 of 6 are memorized; their intervals begin at 4.8 bits
    assert result.extraction is None
    np.testing.assert_array_equal(result.after.lower, generalized_exposure(after, NON_MEMBERS).lower)


def test_a_text_that_is_still_extracted_or_recited_is_still_exposed():
    """Its mean log-likelihood is that of non-members, and more of its tokens are first choices than theirs."""
    shares = np.linspace(0.0, 0.5, 99)
    extracted = [0.9, 0.2, 0.2]
    result = verdict([-1.0] * 3, [50.0] * 3, NON_MEMBERS, extracted=extracted, non_member_extracted=shares)
    assert result.verdict.tolist() == ["still exposed", "forgotten", "forgotten"]
    np.testing.assert_allclose(result.extraction, generalized_exposure(-np.array(extracted), -shares).lower)
    assert verdict([-1.0] * 2, [50.0] * 2, NON_MEMBERS, recited=[True, False]).verdict.tolist() == [
        "still exposed",
        "forgotten",
    ]
    with pytest.raises(ArgumentError, match="give both or neither"):
        verdict([-1.0], [50.0], NON_MEMBERS, extracted=[0.1])


def test_where_it_is_known_what_stands_out_the_others_are_undecided():
    """A text that stands out is still exposed, wherever it lies; one that neither does nor is forgotten, is not."""
    before, after = [-1.0] * 4, [-1.0, 10.0, 50.0, 50.0]
    result = verdict(before, after, NON_MEMBERS, standing_out=[True, False, False, True])
    assert result.verdict.tolist() == ["still exposed", "undecided", "forgotten", "still exposed"]
    assert not result.certain[1]
    assert verdict(before, after, NON_MEMBERS).verdict.tolist() == ["still exposed"] * 2 + ["forgotten"] * 2
    shares = {"extracted": [0.47] * 4, "non_member_extracted": np.linspace(0.0, 0.5, 99)}
    assert verdict(before, [50.0] * 4, NON_MEMBERS, standing_out=[False] * 4, **shares).verdict[0] == "undecided"


def test_nineteen_non_members_are_enough_and_eighteen_are_not():
    """19 non-members reach log2(20) bits exactly, in floating point too."""
    assert verdict([-1.0], [-1.0], np.arange(19.0)).verdict[0] == "still exposed"
    assert verdict([-1.0], [-1.0], np.arange(18.0)).verdict[0] == "not memorized"
    assert verdict([9.0], [99.0], np.arange(19.0)).verdict[0] == "over-unlearned"


def test_a_text_near_the_threshold_is_not_certain():
    """Rank 6 of 100 is between 4 and 4.32 bits: not memorized, and 99 non-members cannot be sure."""
    result = verdict([4.5], [4.5], NON_MEMBERS)
    assert result.verdict[0] == "not memorized"
    assert not result.certain[0]
    assert result.low[0] < SIGNIFICANT < result.high[0]
    assert verdict([-1.0], [38.5], NON_MEMBERS).verdict[0] == "forgotten"
    assert not verdict([-1.0], [38.5], NON_MEMBERS).certain[0]


def test_forgotten_is_certain_where_memorized_is():
    """Its interval before must lie above the set's threshold too."""
    for m, certain in ((40, False), (999, True)):
        result = verdict([-1.0] * 3, [0.6 * m] * 3, np.arange(m))
        assert result.verdict.tolist() == ["forgotten"] * 3
        assert result.certain.tolist() == [certain] * 3, m


def test_not_memorized_is_not_certain_because_non_members_are_few():
    """Among 400 texts 64 non-members name none; one that is likelier than 63 of them may well be memorized."""
    scores = np.r_[0.5, np.full(399, 30.0)]
    result = verdict(scores, scores, np.arange(64.0))
    assert set(result.verdict) == {"not memorized"}
    assert not result.certain[0]
    assert result.certain[1:].all()


def test_still_exposed_is_certain_where_memorized_is():
    """Its interval before must lie above 4.32 bits, not only that after above the target: not among 64 non-members."""
    for m, certain in ((19, False), (64, False), (99, True)):
        result = verdict([-1.0], [-1.0], np.arange(m))
        assert result.verdict[0] == "still exposed"
        assert result.certain[0] == certain, m
    few = np.arange(199.0)
    assert verdict([2.5], [2.5], few).certain[0]  # 3 below it
    assert not verdict([3.5], [3.5], few).certain[0]


@pytest.mark.full
def test_a_false_alarm_is_hardly_ever_certain():
    """Single texts that were never trained on: 5 % are called memorized, and half of these at most certainly."""
    rng, alarms, certain = np.random.default_rng(0), [], []
    for _ in range(2000):
        scores, non_members = rng.normal(size=1), rng.normal(size=199)
        result = verdict(scores, scores, non_members)
        alarms.append((result.verdict == "still exposed").mean())
        certain.append(((result.verdict == "still exposed") & result.certain).mean())
    assert 0.03 < np.mean(alarms) < 0.07
    assert np.mean(certain) < 0.5 * np.mean(alarms)


@given(st.lists(st.tuples(st.floats(-30, 130), st.floats(-30, 130)), min_size=1, max_size=30), st.floats(0, 5))
def test_verdicts_agree_with_the_loop_s(pairs, target_exposure):
    """Verdicts agree with the rules written out text by text."""
    before, after = np.array(pairs).T
    b, a = generalized_exposure(before, NON_MEMBERS), generalized_exposure(after, NON_MEMBERS)
    result = verdict(before, after, NON_MEMBERS, target_exposure=target_exposure)
    memorized = discoveries(b.lower).significant
    over = {group: discoveries(a.upper[memorized == group]).threshold for group in (False, True)}
    for i, name in enumerate(result.verdict):
        if a.upper[i] >= over[memorized[i]] - 1e-9 and b.upper[i] < SIGNIFICANT - 1e-9:
            assert name == "over-unlearned"
        elif not memorized[i]:
            assert name == "not memorized"
        else:
            assert name == ("forgotten" if a.lower[i] <= target_exposure else "still exposed")
    assert (result.low <= result.high).all()


@given(st.lists(st.floats(-30, 130), min_size=1, max_size=12), st.sampled_from(["lower", "upper"]))
def test_the_interval_holds_the_exposure_and_widens_with_confidence(scores, side):
    """The interval is scipy's exact binomial interval of the share, in bits."""
    exposure = getattr(generalized_exposure(scores, NON_MEMBERS), side)
    narrow, wide = (exposure_interval(scores, NON_MEMBERS, confidence=c, side=side) for c in (0.5, 0.99))
    assert (wide.low <= narrow.low + 1e-12).all()
    assert (wide.high >= narrow.high - 1e-12).all()
    assert ((wide.low <= exposure + 1e-12) & (exposure <= wide.high + 1e-12)).all()
    for i, s in enumerate(scores):
        count = int(((s >= NON_MEMBERS) if side == "lower" else (s <= NON_MEMBERS)).sum())
        exact = stats.binomtest(count, 99).proportion_ci(0.99, method="exact")
        assert 2.0 ** -wide.low[i] == pytest.approx(exact.high)
        assert 2.0 ** -wide.high[i] == pytest.approx(exact.low)


def test_the_interval_covers_the_exposure_among_infinitely_many_non_members():
    """At least 95 % of the intervals from 2000 sets of 63 non-members cover -log2 P(non-member <= score)."""
    rng = np.random.default_rng(0)
    for z in (-2.5, -1.0, 0.5):
        truth = -stats.norm.logcdf(z) / math.log(2)
        result = exposure_interval(np.full(2000, z), rng.normal(size=(2000, 63)))
        covered = (result.low <= truth) & (truth <= result.high)
        assert 0.945 <= covered.mean() <= 1


def test_the_exposure_of_the_most_likely_text_has_no_upper_end():
    """The upper end is infinite, the lower 4.1 bits for 63 non-members."""
    result = exposure_interval([-1.0], np.arange(63.0))
    assert result.high[0] == math.inf
    assert result.low[0] == pytest.approx(-math.log2(1 - 0.025 ** (1 / 63)))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([1.0, 2.0], [1.0], [1.0]), {}, "of the same texts, got 2 and 1"),
        (([1.0], [1.0], [1.0]), {"target_exposure": -1}, "target_exposure must be 0 bits or more, got -1"),
        (([1.0], [1.0], [1.0]), {"confidence": 95}, "confidence must lie between 0 and 1, got 95"),
        (([1.0], [math.nan], [1.0]), {}, "finite scores"),
        (([1.0], [1.0], []), {}, "at least one non-member score"),
    ],
)
def test_what_cannot_be_judged_is_refused(arguments, options, message):
    """The error is one sentence that names the argument."""
    with pytest.raises(ValueError, match=message):
        verdict(*arguments, **options)
    with pytest.raises(ValueError, match="side must be 'lower' or 'upper', got 'both'"):
        exposure_interval([1.0], [1.0], side="both")


def test_only_texts_that_may_be_are_over_unlearned():
    """`too_low` is False for one of two texts that both lie below all non-members: it is forgotten."""
    non_members = np.arange(1.0, 100.0)
    both = verdict([0.5, 0.5], [150.0, 150.0], non_members)
    one = verdict([0.5, 0.5], [150.0, 150.0], non_members, too_low=[True, False])
    assert both.verdict.tolist() == ["over-unlearned", "over-unlearned"]
    assert one.verdict.tolist() == ["over-unlearned", "forgotten"]
