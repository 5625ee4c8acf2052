"""The forecast of a run: its size, its cost, and the time that is left meanwhile."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from unlearning_runs import run

from pyunlearn.progress import logger
from pyunlearn.unlearning import forecast
from pyunlearn.unlearning.forecast import Forecast, Pace, share_done

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def lines(monkeypatch):
    """Return the list to which the forecasts in the log are added."""
    shown = []
    monkeypatch.setattr(logger, "info", lambda line: shown.append(line) if "to forget with" in line else None)
    return shown


def test_a_run_states_its_size_and_cost_before_the_first_step(story, lines):
    """Texts, scored tokens, memorized texts, steps and time."""
    result = run(story, story.forget + story.unseen)
    (line,) = lines
    tokens = sum(e.tokens for e in result.examples)
    assert re.fullmatch(
        rf"4 texts to forget with {tokens} scored tokens: 2 memorized; about 16 steps \(at most 200\), about \d+ s",
        line,
    )


def test_a_run_that_has_nothing_to_do_says_so(story, lines):
    """No text is memorized, or no step is allowed."""
    run(story, story.unseen)
    run(story, max_steps=0)
    assert [line.partition(": ")[2] for line in lines] == [f"{n} memorized, no step to take" for n in (0, 2)]


def session(*, memorized, batch_size=8, retain=(), answers=(), seconds_per_id=1e-3):
    """Return what a forecast reads of a run: `memorized` texts of ten ids among as many again."""
    return SimpleNamespace(
        texts=SimpleNamespace(
            forget=[Ids(10)] * (2 * memorized),
            retain=list(retain),
            utility=SimpleNamespace(tokens=[Ids(100)]),
            holdout=[],
        ),
        schedule=SimpleNamespace(batch_size=batch_size),
        stopping=SimpleNamespace(memorized=np.arange(2 * memorized) < memorized),
        retain_term=SimpleNamespace(active=bool(retain)),
        unseen_term=SimpleNamespace(retain=answers) if answers else None,
        max_steps=10_000,
        robustness=None,
        seconds_per_id=seconds_per_id,
    )


class Ids:
    """A text of so many ids, all but two of which are scored."""

    def __init__(self, length):
        self.length, self.scored = length, range(length - 2)

    def __len__(self):
        return self.length


def test_the_cost_is_that_of_the_passes():
    """A step is three passes over its texts; the scores after a round are one."""
    alone, held = Forecast.of(session(memorized=8)), Forecast.of(session(memorized=8, retain=[Ids(20)] * 4))
    assert (alone.texts, alone.tokens, alone.memorized, alone.steps) == (16, 128, 8, 16)
    round_cost = 3 * 80 + (160 + 100)  # one step a round: its 8 texts, then all 16 and the utility set
    assert alone.seconds == pytest.approx(16 * round_cost / 1000)
    assert held.seconds - alone.seconds == pytest.approx(16 * 3 * 4 * 20 / 1000)
    answering = Forecast.of(session(memorized=8, answers=[Ids(20), Ids(40)] * 50))
    assert answering.seconds - alone.seconds == pytest.approx(16 * 3 * 8 * 30 / 1000)
    many = Forecast.of(session(memorized=800))
    assert many.steps == 1600
    assert many.seconds / 800 < alone.seconds / 8  # the scores of a round are shared by 16 steps


def test_the_time_left_follows_the_forecast_and_then_the_pace(monkeypatch):
    """The pace counts from where a resumed run began."""
    now = [100.0]
    monkeypatch.setattr(forecast, "time", SimpleNamespace(monotonic=lambda: now[0]))
    pace = Pace(Forecast(1, 1, 1, 1, 1, 500.0), done=0.2)
    assert pace.left(0.21) == pytest.approx(500 * 0.79)
    now[0] += 30
    assert pace.left(0.5) == pytest.approx(50)
    assert pace.left(1.0) == 0


def test_the_share_that_is_done_is_that_of_the_way_to_the_level():
    """A settled text is done; one that has not been settled is not, however far it came."""
    stopping = SimpleNamespace(
        memorized=np.array([True, True, True, True, False]),
        initial=SimpleNamespace(log_likelihood=np.full(5, -1.0)),
        current=SimpleNamespace(log_likelihood=np.array([-1.0, -2.0, -9.0, -2.0, -1.0])),
        level=np.full(5, -3.0),
        unsettled=np.array([0, 1, 2]),
    )
    assert share_done(SimpleNamespace(stopping=stopping)) == pytest.approx((0 + 0.5 + 0.95 + 1) / 4)
    stopping.memorized[:] = False
    assert share_done(SimpleNamespace(stopping=stopping)) == 1
