"""Outcomes of every run, from its trajectory: exposures, steps to forget, distance of the weights from the start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pyunlearn.metrics import (
    NULL_MEAN,
    StepsToForget,
    calibrated_scores,
    counterfactual_memorization,
    generalized_exposure,
    steps_to_forget,
)
from pyunlearn.study.config import StudyConfig
from pyunlearn.study.folder import Folder
from pyunlearn.study.runs import jobs
from pyunlearn.study.sets import ForgetSet, Sets, lengths

CRITERIA = ("anchored raw", "anchored calibrated", "current raw", "current calibrated")
"""Four ways to measure exposure.

anchored, current: non-members scored once under the original model, or under the model as it is at each measurement.
raw, calibrated: scored by NLL per token, or by that minus the mean NLL under subset models that never saw the text.
"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run: T measurements of n examples; exposures in bits."""

    which: ForgetSet
    rate: float
    indices: list[int]
    steps: Any
    """(T,) the step of each measurement."""
    nll: Any
    """(T, n) nats per token."""
    accuracy: Any
    """(T, n) share of tokens that are the first choice."""
    lower: dict[str, Any]
    """criterion -> (T, n) exposure, high = memorized."""
    upper: dict[str, Any]
    """criterion -> (T, n) upper exposure, high = less likely than non-members are."""
    test_nll: Any
    """(T,) nats per token."""
    bleu: Any
    """(T,) NaN where it was not taken."""
    drift: Any
    """(T,) mean rise of the non-members' NLL since the start."""
    from_retrained: Any
    """(T,) mean distance |NLL - NLL under the retrained model| of the forget examples, nats per token."""
    non_members_from_retrained: Any
    """(T,) the same of the non-members."""
    moved: Any
    """(T,) Euclidean distance of the weights from the start."""

    @property
    def rise(self) -> Any:
        """(T,) rise of the test NLL since the start: the price of forgetting."""
        return self.test_nll - self.test_nll[0]

    def forgotten(self, criterion: str, threshold: float = NULL_MEAN) -> StepsToForget:
        """Return (n,) steps until the exposure is at most the threshold; censored where the run ended before."""
        return steps_to_forget(self.lower[criterion], threshold, steps=self.steps)

    def lowest(self, criterion: str, budget: float) -> float:
        """Return the lowest mean exposure reached while the test NLL had risen by no more than the budget."""
        allowed = np.logical_and.accumulate(self.rise <= budget)
        return float(self.lower[criterion].mean(1)[allowed].min())

    def price(self, criterion: str, threshold: float) -> float:
        """Return the rise of the test NLL where the mean exposure is first at most the threshold; else inf."""
        reached = self.lower[criterion].mean(1) <= threshold
        return float(self.rise[reached.argmax()]) if reached.any() else float("inf")


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Scores of every forget example and non-member under the models that a study trains, in the order of `indices`."""

    indices: list[int]
    memorization: Any
    """(N,) counterfactual, nats: mean log-likelihood per token under subset models with it minus that without it."""
    memorization_accuracy: Any
    """(N,) the same difference of the share of tokens that are the first choice."""
    difficulty: Any
    """(N,) mean NLL under the subset models without it, nats per token."""
    retrained: Any
    """(N,) NLL under the model retrained without any forget set."""
    tokens: Any
    """(N,) scored tokens."""

    def at(self, values: Any, indices: list[int]) -> Any:
        """Return the values of some examples."""
        return values[np.searchsorted(self.indices, indices)]


def examples_of(folder: Folder, config: StudyConfig, sets: Sets) -> Examples:
    """Compute memorization and difficulty from the scores of the subset models."""
    scored, masks = sets.scored(), sets.subsets(config)
    scores = [folder.read_arrays(f"scores/subset-{k}.safetensors") for k in range(config.subset_models)]
    inside = np.stack([masks[i] for i in scored], axis=1)  # (K, N)
    nll, accuracy = (np.stack([s[name] for s in scores]) for name in ("nll", "accuracy"))
    # a non-member's mask is a dummy: "in" and "out" are two random halves of the models, none of which saw it
    difficulty = np.where(inside, 0.0, nll).sum(0) / (~inside).sum(0)
    return Examples(
        indices=scored,
        memorization=counterfactual_memorization(inside, -nll),
        memorization_accuracy=counterfactual_memorization(inside, accuracy),
        difficulty=difficulty,
        retrained=folder.read_arrays("scores/retrained.safetensors")["nll"],
        tokens=lengths(sets, scored),
    )


def outcomes_of(folder: Folder, config: StudyConfig, sets: Sets, examples: Examples) -> list[Outcome]:
    """Compute every run's exposures by each criterion."""
    outcomes = []
    for job in jobs(config, sets):
        run = folder.read_arrays(job.file)
        indices, non_members = sets.forget[job.which], sets.non_members[job.which.kind]
        lower, upper = _exposures(run, *(examples.at(examples.difficulty, group) for group in (indices, non_members)))
        distances = [
            np.abs(run[name] - examples.at(examples.retrained, group)).mean(1)
            for name, group in (("nll", indices), ("non_member_nll", non_members))
        ]
        outcomes.append(
            Outcome(
                which=job.which,
                rate=job.rate,
                indices=indices,
                steps=run["steps"],
                nll=run["nll"],
                accuracy=run["accuracy"],
                lower=lower,
                upper=upper,
                test_nll=run["test_nll"],
                bleu=run["bleu"],
                drift=(run["non_member_nll"] - run["non_member_nll"][0]).mean(1),
                from_retrained=distances[0],
                non_members_from_retrained=distances[1],
                moved=run["moved"],
            )
        )
    return outcomes


def _exposures(
    run: dict[str, Any], difficulty: Any, non_member_difficulty: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return criterion -> (T, n) lower and upper exposures of the forget examples, bits."""
    lower, upper = {}, {}
    for criterion in CRITERIA:
        measured = []
        for nll, current in zip(run["nll"], run["non_member_nll"], strict=True):
            against = run["non_member_nll"][0] if criterion.startswith("anchored") else current
            if criterion.endswith("calibrated"):
                nll = calibrated_scores(nll, difficulty)
                against = calibrated_scores(against, non_member_difficulty)
            measured.append(generalized_exposure(nll, against))
        lower[criterion] = np.stack([exposure.lower for exposure in measured])
        upper[criterion] = np.stack([exposure.upper for exposure in measured])
    return lower, upper
