"""Steps to forget: the first step at or below the threshold, and a median that allows for censoring."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyunlearn.errors import ArgumentError
from pyunlearn.metrics import median_steps, steps_to_forget


def test_steps_to_forget_is_the_first_time_and_says_what_never_came():
    """The first step counts, not the last, and the threshold itself counts as forgotten."""
    exposures = np.array([[6, 6, 1, 6], [1.5, 6, 6, 6], [4, 5, 6, 2], [1, 5, 6, 6]])
    result = steps_to_forget(exposures, 2)
    assert result.steps.tolist() == [1, 3, 0, 2]
    assert result.censored.tolist() == [False, True, False, False]
    assert steps_to_forget(exposures, 2, steps=[0, 16, 32, 40]).steps.tolist() == [16, 40, 0, 32]
    with pytest.raises(ArgumentError, match="must ascend"):
        steps_to_forget(exposures, 2, steps=[0, 2, 2, 3])
    with pytest.raises(ArgumentError, match="4 rows of exposures, got 3"):
        steps_to_forget(exposures, 2, steps=[0, 1, 2])


def kaplan_meier(steps, censored):
    """Compute the median by the product formula: of those still at risk, the share that survives each event."""
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
    """The median agrees with the product formula."""
    steps, censored = zip(*rows, strict=True)
    assert median_steps(steps, censored) == kaplan_meier(steps, censored)


def test_censored_examples_are_not_easy_ones():
    """A majority never forgotten has no median, and an early censored example raises it above the naive 2."""
    assert median_steps([1, 9, 9], [False, True, True]) == math.inf
    assert median_steps([1, 2, 3, 4], [False] * 4) == 2
    assert median_steps([1, 1, 3, 4], [False, True, False, False]) == 3
