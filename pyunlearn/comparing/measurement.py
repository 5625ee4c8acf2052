"""One evaluation for every method: the same texts and non-members, and the utility metric that is made equal."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pyunlearn import metrics
from pyunlearn.comparing.config import CompareConfig
from pyunlearn.comparing.result import Measurement
from pyunlearn.data import Example, Tokens
from pyunlearn.errors import ArgumentError, ModelError, TrainingError
from pyunlearn.metrics import discoveries, generalized_exposure, mean_exposure_interval, mean_interval, verdict
from pyunlearn.metrics.verdict import anchor_after
from pyunlearn.models.harness import HarnessTasks, TaskRun
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.probes import TeacherForced, teacher_forced
from pyunlearn.probes.non_members import NonMembers, capped, evidence_notes
from pyunlearn.probes.recitation import recitations
from pyunlearn.probes.tasks import TaskScore, task_scores
from pyunlearn.progress import Progress
from pyunlearn.unlearning.result import VERDICTS

Floats = NDArray[np.float64]


def _extraction_strengths(forced: TeacherForced) -> Floats:
    return np.array([metrics.extraction_strength(part) for part in forced.each(forced.rank == 0)])


METRICS: dict[str, Callable[[TeacherForced], Floats]] = {
    "probability": lambda forced: np.exp(forced.mean_log_likelihood),
    "extraction_strength": _extraction_strengths,
    "greedy_match": lambda forced: forced.greedy_match,
}
"""Each of `UTILITY_METRICS` -> its function: the n texts of one pass to (n,) utilities, 0 to 1, high = retained."""


class Criterion:
    """Measures one model, with the weights that it has at the moment, on fixed texts.

    Args:
        lm: the model, now with its original weights.
        examples: the texts to forget.
        forget: the same as tokens.
        utility: the texts that must keep working.
        non_members: texts that were never trained on.
        config: the settings of the comparison.
        tasks: tasks of lm-evaluation-harness, run on the original and on what is compared; None: none.
        bar: the progress bar of the original's measurement.

    Raises ModelError where a log-likelihood is not finite or a task ends with an error; ArgumentError where the utility
    is 0.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        examples: list[Example],
        forget: list[Tokens],
        utility: list[Tokens],
        non_members: NonMembers,
        config: CompareConfig,
        tasks: HarnessTasks | None = None,
        bar: Progress | None = None,
    ) -> None:
        self.lm, self.config, self.tasks, self.examples = lm, config, tasks, examples
        self.task_run = self._run_tasks(bar, "the original model")
        self.non_members = non_members
        self.tokens = {"forget": forget, "utility": utility, "non_members": non_members.tokens}
        passes = self._passes()
        self.scores = {role: -one.mean_log_likelihood for role, one in passes.items()}  # (n,) nats per token
        if not all(np.isfinite(scores).all() for scores in self.scores.values()):
            raise ModelError("the model gives NaN or Inf for the texts as it is: nothing can be compared with it")
        self.before = self.scores["forget"] - non_members.forget.nll
        self.unseen = self.scores["non_members"] - non_members.own.nll
        before = generalized_exposure(self.before, self.unseen).lower
        self.memorized, _ = discoveries(before, rate=config.false_discovery_rate)
        self.non_member_extracted = passes["non_members"].greedy_match - non_members.own.greedy_match
        self.original = self._measurement(passes, self._task_scores(self.task_run))
        if self.original.utility <= 0:
            raise ArgumentError(
                f"metric {config.metric!r} is 0 under the original model, so no share of it can be retained: "
                'take metric="probability"'
            )

    @property
    def notes(self) -> list[str]:
        """Sentences on what the non-members cannot show of the forget texts."""
        names = [name for name, count in self.original.verdicts.items() for _ in range(count)]
        return evidence_notes(self.non_members, names, rate=self.config.false_discovery_rate)

    def utility(self) -> float:
        """Return the metric that is made equal, the mean over the utility texts."""
        return float(METRICS[self.config.metric](self._pass(self.tokens["utility"])).mean())

    def measure(self, bar: Progress | None = None) -> Measurement:
        """Measure the model as it is now: the numbers of its row in the comparison.

        With a progress bar, the tasks are run on it too, and compared with the original document by document. Raises
        TrainingError where one fails: on the original it ran, so the method is not refused.
        """
        try:
            run = None if bar is None else self._run_tasks(bar, "the mixture")
        except ModelError as error:
            raise TrainingError(str(error)) from error
        return self._measurement(self._passes(), self._task_scores(run, self.task_run))

    def _task_scores(self, run: TaskRun | None, original: TaskRun | None = None) -> list[TaskScore]:
        return [] if run is None else task_scores(run, original, seed=self.config.seed)

    def _run_tasks(self, bar: Progress | None, who: str) -> TaskRun | None:
        if self.tasks is None or bar is None:
            return None
        return self.tasks.run(self.lm, batch_size=self.config.batch_size, bar=bar, who=who)

    def _passes(self) -> dict[str, TeacherForced]:
        return {role: self._pass(tokens) for role, tokens in self.tokens.items()}

    def _pass(self, tokens: list[Tokens]) -> TeacherForced:
        return teacher_forced(self.lm, tokens, batch_size=2 * self.config.batch_size)

    def _measurement(self, passes: dict[str, TeacherForced], tasks: list[TaskScore]) -> Measurement:
        forget, utility = passes["forget"], passes["utility"]
        expected, own = self.non_members.forget, self.non_members.own
        scores = -forget.mean_log_likelihood - expected.nll
        anchor = anchor_after(self.unseen, -passes["non_members"].mean_log_likelihood - own.nll)
        reached = self.memorized & (generalized_exposure(scores, anchor).lower <= self.config.target_exposure)
        result = verdict(
            self.before,
            scores,
            self.unseen,
            non_member_scores_after=anchor,
            recited=recitations(self.lm, self.examples, self.tokens["forget"], np.flatnonzero(reached)),
            extracted=forget.greedy_match - expected.greedy_match,
            non_member_extracted=self.non_member_extracted,
            target_exposure=self.config.target_exposure,
            false_discovery_rate=self.config.false_discovery_rate,
        )
        verdicts, exposures = capped(result.verdict, self.non_members.grade), result.after.lower
        seed, m = self.config.seed, len(self.scores["non_members"])
        return Measurement(
            forget_nll=mean_interval(-forget.mean_log_likelihood),
            exposure=mean_exposure_interval(exposures, m, seed=seed),
            exposures=exposures.tolist(),
            verdicts={name: verdicts.count(name) for name in VERDICTS},
            extraction_strength=mean_interval(_extraction_strengths(forget), bounds=(0, 1), seed=seed),
            utility_nll=mean_interval(-utility.mean_log_likelihood),
            utility=float(METRICS[self.config.metric](utility).mean()),
            non_members_nll=float(-passes["non_members"].mean_log_likelihood.mean()),
            tasks=tasks,
        )
