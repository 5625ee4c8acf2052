"""The settings of a comparison: those of a run, the same for each method, and how utility is made equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyunlearn.options import Choice, Number, Several, Table, Text, option
from pyunlearn.unlearning.config import LoopConfig

UTILITY_METRICS = ("probability", "extraction_strength")


@dataclass(frozen=True, kw_only=True)
class CompareConfig(LoopConfig):
    """The settings of `pyunlearn.compare`.

    >>> CompareConfig(methods=["ga", "npo"], max_steps=50).tau
    0.95
    """

    methods: tuple[str, ...] | None = option(
        None,
        Several(Text('the name of a method, such as "ga"')),
        "The methods to compare, as `pyunlearn methods` lists them, and those with a retain loss (npo+nll, graddiff). "
        "Default: all.",
        group="Method",
    )
    method_options: Any = option(
        {},
        Table(),
        "Options of single methods: method -> its own options.",
        group="Method",
        optional=True,
        flag="--set",
    )
    tau: float = option(
        0.95,
        Number(above=0, maximum=1),
        "Share of the original's utility that each method has to keep.",
        group="Method",
    )
    metric: str = option(
        "probability",
        Choice(UTILITY_METRICS),
        "The utility: probability, the mean over texts of exp(mean log-likelihood a token); extraction_strength, the "
        "source's, for utility text that the model recites.",
        group="Method",
    )
