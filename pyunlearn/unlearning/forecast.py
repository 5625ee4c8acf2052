"""Forecast of a run: the steps and the time that it will take, before the first step and after each round."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pyunlearn.unlearning.schedule import SCORED_OTHERS, STEPS_PER_ROUND
from pyunlearn.unlearning.setup import Session

VISITS = 16
"""Optimizer steps on an example until it is settled: a usual number at the defaults, see docs/benchmarks.md."""

ROBUST = "without what robust adds, which is not known before (tiny models: four to eleven times the time in all)"
"""What the expected steps and time of a robust run leave out."""

_STEP = 3.0  # passes that forward and backward cost, in forward passes
_SURE = 0.05  # share of the way from which a run's own pace says more than the forecast


class Work(NamedTuple):
    """Expected work of a run, in token ids that go through the model."""

    steps: int
    """Optimizer steps."""
    trained: float
    """Ids of the texts of one step."""
    scored: float
    """Ids that are scored after a round, for each of its steps."""

    @classmethod
    def of(
        cls,
        forget: Sequence[int],
        retain: Sequence[int],
        others: int,
        *,
        memorized: int,
        batch_size: int,
        max_steps: int,
    ) -> Work:
        """Return the work of a run.

        Args:
            forget: ids of each forget text.
            retain: ids of each text of the retain loss; none without one.
            others: ids of the utility set and of the holdout in all, which every round scores.
            memorized: texts that count as memorized.
            batch_size: forget examples in one optimizer step.
            max_steps: largest number of steps.
        """
        per_round = min(STEPS_PER_ROUND, -(-memorized // batch_size))
        length = sum(forget) / len(forget)
        trained = min(memorized, batch_size) * length
        trained += min(batch_size, len(retain)) * sum(retain) / max(1, len(retain))
        scored = min(len(forget), per_round * batch_size + SCORED_OTHERS) * length + others
        steps = min(max_steps, VISITS * -(-memorized // batch_size))
        return cls(steps, trained, scored / max(1, per_round))


class Forecast(NamedTuple):
    """Size and expected cost of a run."""

    texts: int
    tokens: int
    """Scored tokens of the forget set."""
    memorized: int
    """Texts that count as memorized."""
    steps: int
    """Expected optimizer steps."""
    most: int
    """Largest number of steps."""
    seconds: float
    """Expected time, without that for loading, the first scores and the final ones."""
    robust: bool = False
    """Whether the run is to be robust: what that adds is not in the steps and the time."""

    @classmethod
    def of(cls, session: Session) -> Forecast:
        """Return the forecast of a run that has not begun."""
        texts = session.texts
        memorized = int(session.stopping.memorized.sum())
        work = Work.of(
            [*map(len, texts.forget)],
            [*map(len, texts.retain)] if session.retain_term.active and texts.retain else [],
            sum(map(len, [*texts.utility.tokens, *texts.holdout])),
            memorized=memorized,
            batch_size=session.schedule.batch_size,
            max_steps=session.max_steps,
        )
        ids = work.steps * (_STEP * (work.trained + _answers(session)) + work.scored)
        tokens = sum(len(t.scored) for t in texts.forget)
        seconds, robust = ids * session.seconds_per_id, session.robustness is not None
        return cls(len(texts.forget), tokens, memorized, work.steps, session.max_steps, seconds, robust)

    @property
    def line(self) -> str:
        """One sentence for the user."""
        size = f"{_number(self.texts, 'text')} to forget with {_number(self.tokens, 'scored token')}"
        if not self.memorized or not self.most:
            return f"{size}: {self.memorized:,} memorized, no step to take"
        return (
            f"{size}: {self.memorized:,} memorized; about {_number(self.steps, 'step')} (at most {self.most:,}), "
            f"about {duration(self.seconds)}{f', {ROBUST}' if self.robust else ''}"
        )


def _answers(session: Session) -> float:
    """Return the ids of a step's answers to prompts that no record has."""
    if session.unseen_term is None:
        return 0.0
    lengths = [*map(len, session.unseen_term.retain)]
    return min(session.schedule.batch_size, len(lengths)) * sum(lengths) / len(lengths)


class Pace:
    """Time that is left of a run: from the forecast at first, later from how far the texts have come in what time.

    Args:
        forecast: of the run.
        done: share of the way that a resumed run has behind it.
    """

    def __init__(self, forecast: Forecast, done: float) -> None:
        self.forecast, self.before, self.began = forecast, done, time.monotonic()

    def left(self, done: float) -> float:
        """Return the seconds that are left where that share of the way is behind."""
        if done - self.before < _SURE:
            return self.forecast.seconds * (1 - done)
        return (time.monotonic() - self.began) * (1 - done) / (done - self.before)


def share_done(session: Session) -> float:
    """Return how far the memorized texts have come, 0 to 1: the mean share of the way down to their level."""
    stopping = session.stopping
    if not stopping.memorized.any():
        return 1.0
    start, now = stopping.initial.log_likelihood, stopping.current.log_likelihood
    way = np.maximum(start - stopping.level, 1e-6)
    share = np.clip((start - now) / way, 0, 0.95)  # the rest when it is settled
    settled = np.ones(len(share), dtype=bool)
    settled[stopping.unsettled] = False
    return float(np.where(settled, 1.0, share)[stopping.memorized].mean())


def duration(seconds: float) -> str:
    """Return a time as people say it.

    >>> duration(42.3), duration(310), duration(5500)
    ('42 s', '5 min', '1 h 32 min')
    """
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
