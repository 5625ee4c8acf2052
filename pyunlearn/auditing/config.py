"""The settings of an audit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyunlearn.attacks.config import GATE_OPTION
from pyunlearn.data.config import SHOW_TEXT_OPTION, TEMPLATE_OPTION, TRUNCATE_OPTION, TURNS_OPTION
from pyunlearn.models.config import TASK_LIMIT_OPTION, TASKS_OPTION, WORKSPACE_OPTION, require_tasks_for_limit
from pyunlearn.options import Choice, Config, Number, Several, Whole, option
from pyunlearn.unlearning.config import MEAN_OF_NON_MEMBERS, MEMORIZED, SCOPES

METRICS = ("answer_prior", "continuations", "membership")
"""Measures that can be left out of an audit; likelihood, exposure, memorization and the verdicts always stay."""


@dataclass(frozen=True, kw_only=True)
class AuditConfig(Config):
    """The settings of `pyunlearn.audit`.

    >>> AuditConfig(metrics=["membership"]).metrics
    ('membership',)
    """

    metrics: tuple[str, ...] = option(
        METRICS,
        Several(Choice(METRICS), empty=True),
        "Measures in addition to likelihood, exposure and memorization: answer_prior (each answer once more without "
        "its prompt), continuations (greedy decoding, the slow part), membership (attack scores).",
        group="Method",
    )
    budget: int | None = option(
        None,
        Whole(1),
        "Decode at most this many continuations, of the texts that are most likely recited. All texts are read. "
        "Default: all.",
        group="Method",
    )
    scope: str = option(
        "record",
        Choice(SCOPES),
        "What is looked for of each record: record, its text; person, also the same in other words, its paraphrases "
        "where forget records have some, and else rewrites by rule, each with a verdict of its own. Needs a holdout, "
        "with paraphrases too where the forget set has some.",
        group="Method",
    )
    target_exposure: float = option(
        MEAN_OF_NON_MEMBERS,
        Number(0, below=round(MEMORIZED, 2)),
        "A memorized text counts as forgotten at or below this anchored exposure, in bits.",
        group="Method",
    )
    false_discovery_rate: float = option(
        0.05,
        Number(above=0, below=1),
        "Expected share of unseen texts among those called memorized, over the whole forget set (Benjamini-Hochberg).",
        group="Method",
    )
    attacks: tuple[str, ...] | None = option(**GATE_OPTION)
    tasks: tuple[str, ...] | None = option(**TASKS_OPTION)
    task_limit: int | None = option(**TASK_LIMIT_OPTION)
    batch_size: int = option(32, Whole(1), "Texts in one forward pass.", group="Model")
    template: str | Path = option(**TEMPLATE_OPTION)
    turns: str | None = option(**TURNS_OPTION)
    truncate: bool = option(**TRUNCATE_OPTION)
    workspace: int | None = option(**WORKSPACE_OPTION)
    show_text: bool = option(**SHOW_TEXT_OPTION)
    seed: int = option(0, Whole(0), "Seed of sampling and bootstrap: the same seed gives the same audit.")

    def check(self) -> None:
        """Raise ArgumentError for a limit of the tasks' documents without tasks."""
        require_tasks_for_limit(self.tasks, self.task_limit)
