"""Tasks of lm-evaluation-harness for a terminal and for the page: a row or a column for each number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from pyunlearn.comparing.result import Comparison
from pyunlearn.errors import printable
from pyunlearn.metrics import Interval
from pyunlearn.probes.tasks import TaskScore, shown
from pyunlearn.report.table import plain_table

_NARROW = {"documents": "docu-\nments", "original": "orig-\ninal"}  # for 80 columns


def task_table(scores: Sequence[TaskScore], settings: Mapping[str, Any]) -> Table:
    """Return a row for each number of an audit's tasks: of the original model where there is one, now, the difference.

    Args:
        scores: `Audit.tasks`.
        settings: `Audit.settings`.
    """
    table = plain_table(task_title(settings))
    table.add_column("task", overflow="fold")
    for name in task_columns(scores):
        table.add_column(_NARROW.get(name, name), justify="right", no_wrap=True)
    for score in shown(scores):
        table.add_row(_text(f"{score.task}\n{score.metric}"), *map(_text, task_cells(score)))
    table.caption = "\n".join(task_captions(scores, "audit.json"))
    return table


def comparison_task_table(comparison: Comparison) -> Table:
    """Return a column for each number of the tasks: the original's, and each method's with its change from that."""
    wanted = shown(comparison.original.tasks)
    more = "" if comparison.equalized else ", or more"
    table = plain_table(f"{task_title(comparison.settings)}; each method at equal utility{more}")
    table.add_column("method", no_wrap=True)
    for score in wanted:
        table.add_column(_text(f"{score.task}\n{score.metric}"), justify="right")
    table.add_row("original", *(_digits(score.now.estimate) for score in wanted), style="dim")
    measured = [(row.method, row.calibrated.tasks) for row in comparison.rows if row.calibrated is not None]
    for method, scores in measured:
        cells = (f"{_digits(x.now.estimate)}\n{'' if x.change is None else _brackets(x.change, '+')}" for x in scores)
        table.add_row(method, *(_text(text) for x, text in zip(scores, cells, strict=True) if x.part_of is None))
    every = [score for _, scores in measured for score in scores]
    table.caption = "\n".join(task_captions(every or comparison.original.tasks, "result.json"))
    return table


def task_title(settings: Mapping[str, Any]) -> str:
    """Return the title of the table: which program computed the numbers, and of which documents."""
    limit, program = settings["task_limit"], f"lm-evaluation-harness {settings['lm_eval']}"
    return f"tasks of {program}" if limit is None else f"{program}: the first documents of each task, {limit} at most"


def task_name(score: TaskScore) -> str:
    """Return task and metric: "wmdp_bio, acc"."""
    return f"{score.task}, {score.metric}"


def task_columns(scores: Sequence[TaskScore]) -> list[str]:
    """Return the headings of `task_cells`."""
    return ["documents", *(["original", "now", "difference"] if _compared(scores) else ["now"])]


def task_cells(score: TaskScore) -> list[str]:
    """Return the cells after the name: documents, the number of each model, their difference, with intervals."""
    every = score.documents == score.available
    cells = [str(score.documents) if every else f"{score.documents} of {score.available}"]
    if score.before is not None:
        cells.append(_digits(score.before.estimate))
    cells.append(_brackets(score.now))
    if score.change is not None:
        cells.append(_brackets(score.change, sign="+"))
    return cells


def task_captions(scores: Sequence[TaskScore], file: str) -> list[str]:
    """Return the lines below the table: what the brackets are, which way is better, and what is in the file alone."""
    lines = ["in brackets: 95 % interval over the documents, each by itself"]
    if _compared(scores):
        lines[0] += "; of a difference, paired: the same documents under both models"
    rows = shown(scores)
    directions = {(score.metric, score.higher_is_better) for score in rows}
    if lower := sorted(metric for metric, higher in directions if higher is False and (metric, True) not in directions):
        lines.append(f"lower is better: {', '.join(lower)}")
    if any(math.isnan(x.low) for score in rows for x in (score.now, score.change) if x is not None):
        lines.append("no brackets: not a mean over documents, too few of them, or not the same under both models")
    if hidden := sorted({score.task for score in scores if score.part_of is not None}):
        lines.append(f"the {len(hidden)} tasks within groups are in {file}")
    return lines


def _compared(scores: Sequence[TaskScore]) -> bool:
    return any(score.change is not None for score in scores)


def _brackets(x: Interval, sign: str = "") -> str:
    """Return a number with its interval, where it has one: 0.812 [0.701, 0.890]."""
    if math.isnan(x.low):
        return _digits(x.estimate, sign)
    return f"{_digits(x.estimate, sign)} [{_digits(x.low, sign)}, {_digits(x.high, sign)}]"


def _digits(x: float, sign: str = "") -> str:
    """Return a number with three decimals, or fewer where it is large."""
    decimals = next((d for limit, d in ((10, 3), (100, 2), (1000, 1)) if abs(x) < limit), 0)
    return f"{x:{sign}.{decimals}f}"


def _text(text: str) -> Text:
    return Text("\n".join(map(printable, text.split("\n"))))
