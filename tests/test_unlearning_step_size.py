"""The step size of a run: up while rounds are cheap, down where they are not, and the end of a run that is stuck."""

import math

from pyunlearn.unlearning.schedule import resolved_steps
from pyunlearn.unlearning.step_size import (
    CHEAP,
    EXPENSIVE,
    FAR,
    LARGEST,
    LARGEST_EXPONENT,
    LARGEST_FORGET_EXPONENT,
    MAX_REJECTIONS,
    NEAR,
    STUCK,
    StepSize,
)


def test_it_doubles_after_cheap_rounds_up_to_its_limit():
    """2^6 times the start, and not while an example was unsettled or half of a budget is used."""
    size = StepSize()
    for exponent in (1, 2, 3, 4, 5, 6, 6):
        size = size.after(accepted=True, budget_used=0.5, round_cost=CHEAP, moved=NEAR)
        assert size == (exponent, 0, LARGEST, 0)
    assert size.rate(1e-5) == 64e-5 == 2**LARGEST_EXPONENT * 1e-5
    assert StepSize(1).after(accepted=True, unsettled=1, settled=1) == StepSize(1)
    assert StepSize(1).after(accepted=True, budget_used=0.51, round_cost=0.01) == StepSize(1)
    assert StepSize(1, 3).after(accepted=True, budget_used=0.51) == StepSize(2, 3)  # the round used none of it
    assert StepSize(1).after(accepted=True, round_cost=CHEAP + 1e-6) == StepSize(1)
    assert StepSize(1).after(accepted=True, moved=NEAR + 1e-6) == StepSize(1)
    assert StepSize(1).after(accepted=True, budget_used=math.inf, round_cost=math.nan) == StepSize(1)  # a budget of 0


def test_the_forget_loss_grows_where_the_largest_rate_moves_nothing():
    """Up to 2^6 times; the learning rate stays, both shrink in the opposite order, and a rollback ends the growth."""
    size = StepSize(LARGEST_EXPONENT)
    assert size.after(accepted=True, moved=STUCK + 1e-6) == size
    for exponent in range(1, LARGEST_FORGET_EXPONENT + 1):
        size = size.after(accepted=True, moved=STUCK)
        assert (size.rate(1e-5), size.forget_weight) == (64e-5, 2.0**exponent)
    assert size.after(accepted=True)[:3] == size[:3]
    assert size.after(accepted=False) == (LARGEST_EXPONENT, 1, LARGEST_EXPONENT, 0)
    size = StepSize(LARGEST_EXPONENT + 1).after(accepted=True, round_cost=EXPENSIVE + 1e-6)
    assert (size.rate(1e-5), size.forget_weight) == (64e-5, 1.0)
    size = size.after(accepted=False)
    assert (size.rate(1e-5), size.forget_weight) == (32e-5, 1.0)


def test_a_few_of_many_active_examples_do_not_hold_up_the_others():
    """One in eight may be unsettled: it is restored meanwhile."""
    assert StepSize(3).after(accepted=True, unsettled=2, active=16) == StepSize(4)
    assert StepSize(3).after(accepted=True, unsettled=3, active=16) == StepSize(2, 0, 2)
    assert StepSize(3).after(accepted=True, settled=3, unsettled=3, active=16) == StepSize(3)


def test_it_is_halved_after_rounds_that_go_too_far():
    """Rolled back, expensive, long, or with more examples unsettled than settled."""
    assert StepSize(3).after(accepted=False) == StepSize(2, 1, 2)
    assert StepSize(3).after(accepted=True, round_cost=EXPENSIVE + 1e-6) == StepSize(2)
    assert StepSize(3).after(accepted=True, moved=FAR) == StepSize(3)
    assert StepSize(3).after(accepted=True, moved=FAR + 1e-6) == StepSize(2)
    assert StepSize(3).after(accepted=True, settled=2, unsettled=3) == StepSize(2, 0, 2)
    assert StepSize(-LARGEST_EXPONENT).after(accepted=True, unsettled=1) == StepSize(-6, 0, -6)
    assert StepSize(-9).after(accepted=True, unsettled=1) == StepSize(-9, 0, -9)
    size = StepSize(2, 0, 2)  # it returns after four cheap rounds
    for expected in (StepSize(2, 0, 2, 1), StepSize(2, 0, 2, 2), StepSize(2, 0, 2, 3), StepSize(3, 0, 3)):
        size = size.after(accepted=True)
        assert size == expected
    assert StepSize(0, 0, 2).after(accepted=True) == StepSize(1, 0, 2)


def test_seven_rollbacks_end_a_run():
    """An accepted round between them starts the count again only where it leaves half of each budget."""
    size = StepSize()
    for _ in range(MAX_REJECTIONS):
        assert not size.exhausted
        size = size.after(accepted=False)
    assert size == StepSize(-MAX_REJECTIONS, MAX_REJECTIONS, -LARGEST_EXPONENT)
    assert size.exhausted
    assert StepSize(-3, 3).after(accepted=True, budget_used=0.9, round_cost=0.01) == StepSize(-3, 3)
    assert StepSize(-3, 3).after(accepted=True, budget_used=0.9, round_cost=0.3) == StepSize(-4, 3)
    assert StepSize(-3, 3).after(accepted=True, budget_used=0.1) == StepSize(-2, 0)


def test_the_default_number_of_steps_follows_the_memorized_examples():
    """64 visits of each on average, and 200 steps at least; a number of the user's is a limit."""
    assert [resolved_steps(None, n, 8) for n in (0, 1, 16, 64, 65, 10_000)] == [200, 200, 200, 512, 576, 80_000]
    assert resolved_steps(None, 10, 1) == 640
    assert resolved_steps(0, 10_000, 8) == 0
    assert resolved_steps(None, 64, 8, forms=True) == 1024
