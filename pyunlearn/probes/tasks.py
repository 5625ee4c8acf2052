"""Tasks of lm-evaluation-harness as numbers with intervals: of one model, and of two models on the same documents."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyunlearn.metrics import Interval, aggregate_interval, mean_interval
from pyunlearn.models.harness import TaskNumbers, TaskRun

Floats = NDArray[np.float64]

SHARES = frozenset({"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "em", "probability", "rouge",
                    "truth_ratio"})  # fmt: skip
"""Metrics that lie between 0 and 1 for each document, by their names in lm-eval's tasks and in ours."""


@dataclass(frozen=True)
class TaskScore:
    """One number of a task or group, with 95 % intervals over its documents."""

    task: str
    metric: str
    """Name of lm-eval's metric, with that of its filter of answers: "exact_match, strict-match"."""
    documents: int
    """Number of documents that were read: the first ones of the task."""
    available: int
    """Number of documents that the task has."""
    higher_is_better: bool | None
    """As the task says; None where it does not."""
    part_of: str | None
    """The group in whose number this task is contained, or None."""
    now: Interval
    """The number of the model; its ends are NaN where the number has no interval: it is made of texts, as BLEU is, or
    is a group's and not the mean over its documents."""
    before: Interval | None
    """The number of the original model; None without one."""
    change: Interval | None
    """now less before, over the same documents under both models: the interval is of the paired differences."""

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> TaskScore:
        """Make one from the JSON that `plain_json` made of it, where NaN is None."""
        made = dict(content)
        for name in ("now", "before", "change"):
            if made[name] is not None:
                made[name] = Interval(*(np.nan if made[name][end] is None else made[name][end] for end in _ENDS))
        return cls(**made)


_ENDS = ("estimate", "low", "high")


def task_scores(now: TaskRun, before: TaskRun | None = None, *, seed: int = 0) -> list[TaskScore]:
    """Return each number of a run of tasks with its interval, and its change from another model's run.

    A mean has the interval of `metrics.mean_interval`, between 0 and 1 where it is a share, as accuracy is, and its
    change that of the documents' differences, between -1 and 1. Other numbers, such as a perplexity, have bootstrap
    intervals (`metrics.aggregate_interval`), in which the documents are drawn, each with both models' numbers. Each
    interval holds by itself: of many, one in twenty may miss.

    Args:
        now: the run of the model.
        before: the run of the same tasks on the original model.
        seed: of the bootstrap: the same seed gives the same ends.
    """
    others = {} if before is None else {(x.task, x.metric): x for x in before.numbers}
    with warnings.catch_warnings():  # of a task's own statistic, on a resample in which it is not defined
        warnings.simplefilter("ignore")
        return [_score(x, others.get((x.task, x.metric)), seed) for x in now.numbers]


def _score(now: TaskNumbers, before: TaskNumbers | None, seed: int) -> TaskScore:
    values = [x for x in (now, before) if x is not None]
    share = all(_is_share(x) for x in values)
    return TaskScore(
        task=now.task,
        metric=now.metric,
        documents=now.documents,
        available=now.available,
        higher_is_better=now.higher_is_better,
        part_of=now.part_of,
        now=_interval(now, share, seed),
        before=None if before is None else _interval(before, share, seed),
        change=None if before is None else _change(before, now, share, seed),
    )


def _array(x: TaskNumbers) -> Floats | None:
    """Return (n,) numbers of the documents whose mean is the value; None where it is no mean of finite numbers."""
    if x.items is None or x.statistic is not None or any(isinstance(item, tuple) for item in x.items):
        return None
    values = np.array(x.items, dtype=np.float64)
    fine = values.size > 0 and np.isfinite(values).all() and np.isclose(values.mean(), x.value, rtol=1e-6, atol=1e-9)
    return values if fine else None


def _is_share(x: TaskNumbers) -> bool:
    """Return whether the documents' numbers lie between 0 and 1 by what they are."""
    values = _array(x)
    if values is None or values.min() < 0 or values.max() > 1:
        return False
    return x.metric.partition(",")[0] in SHARES or bool(np.isin(values, (0, 1)).all())


def _interval(x: TaskNumbers, share: bool, seed: int) -> Interval:
    values = _array(x)
    if values is not None:
        interval = mean_interval(values, bounds=(0, 1) if share else None, seed=seed)
        return interval._replace(estimate=x.value)
    if x.items is None or x.statistic is None:
        return Interval(x.value, np.nan, np.nan)
    return _resampled(x.statistic, x.items, estimate=x.value, seed=seed)


def _change(before: TaskNumbers, now: TaskNumbers, share: bool, seed: int) -> Interval:
    """Return now - before, with the interval of the paired documents where these are the same under both models."""
    estimate = now.value - before.value
    if now.keys != before.keys:  # a task that draws its documents or prompts by itself
        return Interval(estimate, np.nan, np.nan)
    first, second = _array(before), _array(now)
    if first is not None and second is not None:
        interval = mean_interval(second - first, bounds=(-1, 1) if share else None, seed=seed)
        return interval._replace(estimate=estimate)
    if now.statistic is None or now.items is None or before.items is None:
        return Interval(estimate, np.nan, np.nan)
    statistic = now.statistic

    def difference(pairs: list[Any]) -> float:
        return float(statistic([b for _, b in pairs])) - float(statistic([a for a, _ in pairs]))

    return _resampled(difference, list(zip(before.items, now.items, strict=True)), estimate=estimate, seed=seed)


def _resampled(statistic: Any, items: list[Any], *, estimate: float, seed: int) -> Interval:
    """Return a bootstrap interval around an estimate; none where the statistic is not defined on every resample."""
    try:
        interval = aggregate_interval(statistic, items, seed=seed)
    except Exception:  # anything: the statistic is the task's own code
        return Interval(estimate, np.nan, np.nan)
    return interval._replace(estimate=estimate)


def shown(scores: Sequence[TaskScore]) -> list[TaskScore]:
    """Return the scores of what was wanted by name: groups without their tasks, and tasks."""
    return [score for score in scores if score.part_of is None]


def task_notes(run: TaskRun) -> list[str]:
    """Return a sentence where lm-eval has cut texts."""
    if not run.cut:
        return []
    return [
        f"lm-eval cut the beginning of {run.cut} of the {run.requests} texts of the tasks: they are longer than the "
        "model's context."
    ]
