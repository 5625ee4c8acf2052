"""One yardstick for every method: the texts, the references under the original model, and the metric that is held equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyunlearn import metrics
from pyunlearn.comparing.result import Standing
from pyunlearn.data import Tokens
from pyunlearn.errors import ArgumentError, ModelError
from pyunlearn.metrics import bootstrap_interval, verdict
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.probes import TeacherForced, teacher_forced
from pyunlearn.unlearning.result import VERDICTS

Floats = NDArray[np.float64]


def _extraction_strengths(forced: TeacherForced) -> Floats:
    return np.array([metrics.extraction_strength(part) for part in forced.each(forced.rank == 0)])


UTILITY_METRICS: dict[str, Callable[[TeacherForced], Floats]] = {
    "probability": lambda forced: np.exp(forced.mean_log_likelihood),
    "extraction_strength": _extraction_strengths,
    "greedy_match": lambda forced: forced.greedy_match,
}
"""name -> the metric of each text, 0 to 1, high = kept. probability: exp of the mean log-likelihood a token. extraction_strength: the share of it that is
recited, as in the source of the calibration. greedy_match: the share of its tokens that are the model's first choice."""


class Yardstick:
    """Measures a model, whatever weights it holds at the moment."""

    def __init__(
        self, model: Any, tokenizer: Any, forget: list[Tokens], utility: list[Tokens], references: list[Tokens], *, metric: str, until: float,
        batch_size: int, workspace: int | None, seed: int,
    ) -> None:  # fmt: skip
        self.lm, self.batch_size = LanguageModel.of(model, tokenizer, workspace=workspace), batch_size
        self.tokens = {"forget": forget, "utility": utility, "references": references}
        self.device = next(model.parameters()).device
        self.metric, self.until, self.seed = UTILITY_METRICS[metric], until, seed
        forced = {role: self._forced(tokens) for role, tokens in self.tokens.items()}
        self.scores = {role: -found.mean_log_likelihood for role, found in forced.items()}
        if not all(np.isfinite(scores).all() for scores in self.scores.values()):
            raise ModelError("the model gives NaN or Inf for the texts as it is: nothing can be compared with it")
        self.original = self._standing(forced)
        if self.original.utility <= 0:
            raise ArgumentError(
                f'metric {metric!r} is 0 under the original model, so no share of it can be kept: take metric="probability"'
            )

    def utility(self) -> float:
        """The metric that is held equal, on its text."""
        return float(self.metric(self._forced(self.tokens["utility"])).mean())

    def measure(self) -> Standing:
        """Everything."""
        return self._standing({role: self._forced(tokens) for role, tokens in self.tokens.items()})

    def _forced(self, tokens: Sequence[Tokens]) -> TeacherForced:
        return teacher_forced(self.lm, tokens, batch_size=self.batch_size)

    def _standing(self, forced: dict[str, TeacherForced]) -> Standing:
        forget, utility = forced["forget"], forced["utility"]
        found = verdict(self.scores["forget"], -forget.mean_log_likelihood, self.scores["references"], until=self.until)
        names = found.verdict.tolist()
        exposures = found.after.lower
        forget_nll, exposure, extracted, utility_nll = (
            bootstrap_interval(x, seed=self.seed)
            for x in (
                -forget.mean_log_likelihood,
                exposures,
                _extraction_strengths(forget),
                -utility.mean_log_likelihood,
            )
        )
        return Standing(
            forget_nll, exposure, exposures.tolist(), {v: names.count(v) for v in VERDICTS}, extracted, utility_nll,
            float(self.metric(utility).mean()), float(-forced["references"].mean_log_likelihood.mean()),
        )  # fmt: skip
