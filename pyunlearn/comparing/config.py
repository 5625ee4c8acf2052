"""The settings of a comparison: those of a run, the same for each method, and how utility is made equal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from pyunlearn.models.config import TASK_LIMIT_OPTION, TASKS_OPTION, require_tasks_for_limit
from pyunlearn.options import Choice, Number, Several, Table, Text, option
from pyunlearn.unlearning.config import LoopConfig, UnlearnConfig

UTILITY_METRICS = ("probability", "extraction_strength", "greedy_match")
"""Names of the metrics that can be made equal, each the mean over texts of a number from 0 to 1, high = retained."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig(LoopConfig):
    """The settings of `pyunlearn.compare`.

    >>> CompareConfig(methods=["ga", "NPO"], max_steps=50).methods
    ('ga', 'npo')
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
        'Options of single methods: method -> its own options, as in {"npo": {"beta": 0.5}}.',
        group="Method",
        optional=True,
        flag="--set",
    )
    tau: float = option(
        0.95,
        Number(above=0, maximum=1),
        "Share of the original's utility that each method has to retain.",
        group="Method",
    )
    metric: str = option(
        "probability",
        Choice(UTILITY_METRICS),
        "The utility: probability, the mean over texts of exp(mean log-likelihood per token), so that 0.95 of it "
        "allows about 0.05 nats; extraction_strength, as in arXiv 2406.09179, for utility text that the model recites; "
        "greedy_match, the share of tokens that are the model's first choice.",
        group="Method",
    )
    tasks: tuple[str, ...] | None = option(**TASKS_OPTION)
    task_limit: int | None = option(**TASK_LIMIT_OPTION)

    def __post_init__(self) -> None:
        names, own = self.methods, self.method_options  # neither case nor repetition of a name matters
        if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
            object.__setattr__(self, "methods", tuple(dict.fromkeys(name.lower() for name in names)))
        if isinstance(own, Mapping) and all(isinstance(name, str) for name in own):
            object.__setattr__(self, "method_options", {name.lower(): options for name, options in own.items()})
        super().__post_init__()

    def check(self) -> None:
        """Raise ArgumentError where two values contradict each other."""
        super().check()
        require_tasks_for_limit(self.tasks, self.task_limit)

    def for_method(self, name: str) -> UnlearnConfig:
        """Return the settings of one method's run: the shared ones, and the method's own options.

        >>> CompareConfig(method_options={"npo": {"beta": 0.5}}, max_steps=50).for_method("npo").method_options
        {'beta': 0.5}
        """
        shared = {f.name: getattr(self, f.name) for f in fields(LoopConfig)}
        return UnlearnConfig(**shared, method=name, method_options=(self.method_options or {}).get(name) or {})
