"""Verdicts: the loop's rules, and intervals that cover."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pyunlearn.metrics import SIGNIFICANT, exposure_interval, generalized_exposure, verdict

REFERENCES = np.arange(99.0)


def test_each_verdict_by_hand():
    """99 references 0 to 98: at most -1 is memorized, among the middle ones forgotten, at 97.5 over-unlearned by 2 in 100: not for certain."""
    before = [-1.0, -1.0, -1.0, 50.0, 50.0, 98.0]
    after = [-1.0, 50.0, 98.5, 50.0, 97.5, 98.5]
    found = verdict(before, after, REFERENCES)
    assert found.verdict.tolist() == [
        "still exposed", "forgotten", "over-unlearned", "not memorized", "over-unlearned", "not memorized",
    ]  # fmt: skip
    assert found.certain.tolist() == [True, True, True, True, False, True]
    np.testing.assert_array_equal(found.after.lower, generalized_exposure(after, REFERENCES).lower)


def test_nineteen_references_are_enough_and_eighteen_are_not():
    """log2(20) is reached exactly by 19, in floating point too."""
    assert verdict([-1.0], [-1.0], np.arange(19.0)).verdict[0] == "still exposed"
    assert verdict([-1.0], [-1.0], np.arange(18.0)).verdict[0] == "not memorized"
    assert verdict([9.0], [99.0], np.arange(19.0)).verdict[0] == "over-unlearned"


def test_a_text_near_the_threshold_is_not_certain():
    """Rank 6 of 100 is above 4 bits and below 4.32: not memorized, and 99 references cannot tell."""
    found = verdict([4.5], [4.5], REFERENCES)
    assert found.verdict[0] == "not memorized"
    assert not found.certain[0]
    assert found.low[0] < SIGNIFICANT < found.high[0]
    assert verdict([-1.0], [38.5], REFERENCES).verdict[0] == "forgotten"
    assert not verdict([-1.0], [38.5], REFERENCES).certain[0]


@given(st.lists(st.tuples(st.floats(-30, 130), st.floats(-30, 130)), min_size=1, max_size=30), st.floats(0, 5))
def test_verdicts_agree_with_the_loop_s(pairs, target_exposure):
    """The rules written out once more, text by text."""
    before, after = np.array(pairs).T
    b, a = generalized_exposure(before, REFERENCES), generalized_exposure(after, REFERENCES)
    found = verdict(before, after, REFERENCES, target_exposure=target_exposure)
    for i, name in enumerate(found.verdict):
        if a.upper[i] >= SIGNIFICANT - 1e-9 > b.upper[i]:
            assert name == "over-unlearned"
        elif b.lower[i] < SIGNIFICANT - 1e-9:
            assert name == "not memorized"
        else:
            assert name == ("forgotten" if a.lower[i] <= target_exposure else "still exposed")
    assert (found.low <= found.high).all()


@given(st.lists(st.floats(-30, 130), min_size=1, max_size=12), st.sampled_from(["lower", "upper"]))
def test_the_interval_holds_the_exposure_and_widens_with_confidence(scores, side):
    """And is scipy's exact binomial interval of the share, in bits."""
    exposure = getattr(generalized_exposure(scores, REFERENCES), side)
    narrow, wide = (exposure_interval(scores, REFERENCES, confidence=c, side=side) for c in (0.5, 0.99))
    assert (wide.low <= narrow.low + 1e-12).all()
    assert (wide.high >= narrow.high - 1e-12).all()
    assert ((wide.low <= exposure + 1e-12) & (exposure <= wide.high + 1e-12)).all()
    for i, s in enumerate(scores):
        count = int(((s >= REFERENCES) if side == "lower" else (s <= REFERENCES)).sum())
        exact = stats.binomtest(count, 99).proportion_ci(0.99, method="exact")
        assert 2.0 ** -wide.low[i] == pytest.approx(exact.high)
        assert 2.0 ** -wide.high[i] == pytest.approx(exact.low)


def test_the_interval_covers_the_exposure_among_endless_references():
    """Of 2000 sets of 63 references, 95 % or more of the intervals hold -log2 P(reference <= score)."""
    rng = np.random.default_rng(0)
    for z in (-2.5, -1.0, 0.5):
        truth = -stats.norm.logcdf(z) / math.log(2)
        found = exposure_interval(np.full(2000, z), rng.normal(size=(2000, 63)))
        held = (found.low <= truth) & (truth <= found.high)
        assert 0.945 <= held.mean() <= 1


def test_no_reference_can_say_how_exposed_the_likeliest_text_is():
    """The upper end is infinite, the lower 4.1 bits for 63 references."""
    found = exposure_interval([-1.0], np.arange(63.0))
    assert found.high[0] == math.inf
    assert found.low[0] == pytest.approx(-math.log2(1 - 0.025 ** (1 / 63)))


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
    """In one sentence."""
    with pytest.raises(ValueError, match=message):
        verdict(*arguments, **options)
    with pytest.raises(ValueError, match="side must be 'lower' or 'upper', got 'both'"):
        exposure_interval([1.0], [1.0], side="both")
