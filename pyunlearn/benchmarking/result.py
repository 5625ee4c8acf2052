"""The result of a benchmark: its published columns, and the numbers of each question that they are computed from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyunlearn.metrics import Interval
from pyunlearn.output import plain_json

Numbers = dict[str, dict[str, NDArray[np.float64]]]
"""Set -> measure -> an array with one row for each question."""
ATTACKS = "attacks"
"""Set of the columns under attack, whose measures are the forms of attack."""


class Column(NamedTuple):
    """One published number."""

    set: str
    """The set of questions that it is of; "" for a number over several sets."""
    measure: str
    estimate: float
    low: float
    """Ends of the 95 % interval over questions; NaN where there is none."""
    high: float
    questions: int
    """Number of questions."""

    @property
    def name(self) -> str:
        """Key of the column: "forget_rouge" for the set forget and the measure rouge.

        >>> Column("real authors", "truth ratio", 0.5, 0.4, 0.6, 100).name
        'real_authors_truth_ratio'
        """
        return f"{self.set} {self.measure}".strip().replace(",", "").replace(" ", "_").lower()

    @classmethod
    def of(cls, set: str, measure: str, interval: Interval, questions: int) -> Column:
        """Return the column of an interval."""
        return cls(set, measure, *interval, questions)


@dataclass(frozen=True)
class BenchResult:
    """Numbers of one model in a benchmark: `result["model_utility"].estimate`, or all of `result.columns`."""

    benchmark: str
    """The benchmark's name."""
    columns: dict[str, Column]
    """Name -> the published number, its 95 % interval, and of how many questions it is."""
    sets: dict[str, dict[str, Any]]
    """Set -> its `file`, `questions` that were asked and the `sha256` of these."""
    numbers: Numbers = field(repr=False)
    """Set -> measure -> an array with one row for each question, in the order of the file; of "attacks" the bits of
    each forget text under each form of attack, NaN where it was not tested."""
    rendering: str
    """Description of the form in which the model read the questions."""
    notes: list[str]
    settings: dict[str, Any]
    seconds: float

    def __getitem__(self, name: str) -> Column:
        return self.columns[name]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, ready for JSON; no text of the benchmark or of the model is in it."""
        content: dict[str, Any] = plain_json({**vars(self), "numbers": {}})
        content["numbers"] = plain_json(listed(self.numbers))
        return content


def listed(numbers: Mapping[str, Mapping[str, NDArray[np.float64]]]) -> dict[str, dict[str, Any]]:
    """Return numbers with lists in place of arrays, ready for JSON."""
    return {name: {key: values.tolist() for key, values in measures.items()} for name, measures in numbers.items()}
