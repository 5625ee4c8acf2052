"""Table of the benchmarks: what each reads, measures and publishes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from pyunlearn.benchmarking import muse, rwku, tofu, wmdp
from pyunlearn.benchmarking.config import BenchConfig
from pyunlearn.benchmarking.files import Questions
from pyunlearn.benchmarking.measurer import Measurer
from pyunlearn.benchmarking.result import Column, Numbers


class Measure(Protocol):
    """Interface of the function that reads the questions with a model."""

    def __call__(
        self, measurer: Measurer, sets: Mapping[str, Questions], config: BenchConfig, *, retrained: bool = False
    ) -> Numbers:
        """Return set -> measure -> numbers of each question; of a retrained model those alone that are compared."""


class Benchmark(NamedTuple):
    """One benchmark."""

    files: Callable[[BenchConfig], list[str]]
    """Names of its files, without their suffixes."""
    read: Callable[[Path, BenchConfig], dict[str, Questions]]
    """The folder of its files -> the questions of each set."""
    measure: Measure
    columns: Callable[[Numbers, Numbers | None, BenchConfig], list[Column]]
    """The model's numbers and the retrained model's -> the published columns."""
    notes: Callable[[Numbers, Numbers | None], list[str]]
    """The same -> sentences on what the columns cannot show."""
    compared: Mapping[str, tuple[str, ...]]
    """Sets that are compared with a retrained model -> their numbers that are; empty where none is used."""
    rendering: Callable[[Measurer], str]
    """Description of the form in which a model reads the questions."""
    attacked: Callable[[Mapping[str, Questions]], dict[str, list[dict[str, str]]]] | None = None
    """The questions of each set -> role -> rows, of `pyunlearn.attack`; None where nothing can be attacked."""
    inside: str = ""
    """Folder of the data set on the hub that has the files."""
    needs_rouge: bool = True
    """True where it needs the package rouge-score."""


BENCHMARKS = {
    "tofu": Benchmark(
        tofu.files,
        tofu.read,
        tofu.measure,
        tofu.columns,
        tofu.notes,
        tofu.COMPARED,
        lambda m: m.form,
        tofu.attacked,
    ),
    "wmdp": Benchmark(
        wmdp.files, wmdp.read, wmdp.measure, wmdp.columns, wmdp.notes, {}, lambda _: wmdp.RENDERING, needs_rouge=False
    ),
    "muse": Benchmark(
        muse.files,
        muse.read,
        muse.measure,
        muse.columns,
        muse.notes,
        muse.COMPARED,
        lambda _: muse.RENDERING,
        muse.attacked,
    ),
    "rwku": Benchmark(
        rwku.files,
        rwku.read,
        rwku.measure,
        rwku.columns,
        rwku.notes,
        {},
        rwku.rendering,
        inside="All",  # next to a folder for each person
        needs_rouge=False,
    ),
}
