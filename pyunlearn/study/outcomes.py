"""Outcomes of every run: how far a forget set is from the models that never saw it, and what each step costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pyunlearn.metrics import NULL_MEAN, calibrated_scores, counterfactual_memorization, generalized_exposure
from pyunlearn.study.config import StudyConfig
from pyunlearn.study.folder import Folder
from pyunlearn.study.runs import jobs
from pyunlearn.study.seeds import TWIN, model_name, scores_file
from pyunlearn.study.sets import NOBODY, ForgetSet, Sets

FIRST = 4
"""Steps over which a speed is measured, at most."""
RETRAINED = "retrained"
CRITERIA = {
    RETRAINED: "mean NLL of the retrained models",
    "anchored NLL": "mean NLL of non-members before unlearning",
    "anchored exposure": "1.44 bits of exposure among non-members before unlearning",
    "current exposure": "1.44 bits of exposure among non-members at the same step",
    "anchored calibrated exposure": "1.44 bits of exposure of NLL minus that of retrained models, before unlearning",
    "current calibrated exposure": "1.44 bits of exposure of NLL minus that of retrained models, at the same step",
}
"""When a forget set counts as forgotten. The first decides; the others are shown as sensitivity."""


class Crossing(NamedTuple):
    """The interpolated step at which a set is first forgotten."""

    step: float
    """0 where it was forgotten from the start; the last measured step where it never was."""
    censored: bool
    """The run ended first."""


def crossing(steps: Any, gap: Any) -> Crossing:
    """Return the first interpolated step at which the gap (T,), below 0 before that, is 0.

    >>> crossing([0, 2, 4], [-3.0, -1.0, 1.0])
    Crossing(step=3.0, censored=False)
    """
    forgotten = np.asarray(gap) >= 0
    if not forgotten.any():
        return Crossing(float(steps[-1]), True)
    at = int(forgotten.argmax())
    if at == 0:
        return Crossing(float(steps[0]), False)
    before, after = gap[at - 1], gap[at]
    return Crossing(float(steps[at - 1] + (steps[at] - steps[at - 1]) * before / (before - after)), False)


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The forget examples of all seeds, scored by every model, in the order of `indices`.

    The models of the other seeds never saw an example. Every second one of them calibrates its scores; the rest measure
    its difficulty and memorization, so that the noise of one is not in the other. In setup twins the model of every
    seed is the checkpoint, and the twin does both.
    """

    indices: list[int]
    owner: Any
    """(N,) the seed that trains on it, or NOBODY."""
    nll: Any
    """(S, N) nats per token, under the model of each seed."""
    calibration: Any
    """(N,) mean NLL under the calibrating models."""
    difficulty: Any
    """(N,) mean NLL under the measuring models."""
    memorization: Any
    """(N,) counterfactual, nats: difficulty minus the NLL under the model that trained on it."""

    def at(self, values: Any, indices: Sequence[int]) -> Any:
        """Return the values (..., N) of some examples."""
        return values[..., np.searchsorted(self.indices, indices)]

    def calibration_without(self, seed: int, indices: Sequence[int]) -> Any:
        """Return (m,) the calibration of other seeds' examples, or of nobody's, without the model of `seed`."""
        models, position = len(self.nll), np.searchsorted(self.indices, indices)

        def mean(p: int) -> Any:
            others = [self.nll[k, p] for k in calibrating(models, int(self.owner[p])) if k != seed]
            return np.mean(others or [np.nan])

        return np.array([self.calibration[p] if self.owner[p] == NOBODY else mean(p) for p in position])


def calibrating(models: int, owner: int) -> list[int]:
    """Return the models that calibrate the examples of a seed: every second one that never saw them."""
    return [k for k in range(models) if k != owner][::2]


def measuring(models: int, owner: int) -> list[int]:
    """Return the models that measure difficulty and memorization: the rest of those that never saw the examples."""
    return [k for k in range(models) if k != owner][1::2]


def examples_of(folder: Folder, config: StudyConfig, sets: Sets) -> Examples:
    """Read the scores of all models."""
    indices, owners = sets.scored(), sets.owners()
    owner = np.array([owners[i].seed for i in indices])
    nll = np.stack([folder.read_arrays(scores_file(model_name(config, s)))["nll"] for s in range(config.seeds)])
    if config.twin is None:
        calibration, difficulty, memorization = _by_other_seeds(nll, owner)
    else:
        calibration = difficulty = folder.read_arrays(scores_file(TWIN))["nll"]
        memorization = difficulty - nll[0]
    return Examples(
        indices=indices,
        owner=owner,
        nll=nll,
        calibration=calibration,
        difficulty=difficulty,
        memorization=memorization,
    )


def _by_other_seeds(nll: Any, owner: Any) -> Any:
    """Return calibration, difficulty and memorization, each (N,), of examples by the models of the other seeds."""
    calibration, difficulty, memorization = np.zeros((3, len(owner)))
    for seed in range(len(nll)):
        mine, others = owner == seed, measuring(len(nll), seed)
        calibration[mine] = nll[calibrating(len(nll), seed)][:, mine].mean(0)
        difficulty[mine] = nll[others][:, mine].mean(0)
        scores = -nll[[seed, *others]][:, mine]
        included = np.zeros(scores.shape, dtype=bool)
        included[0] = True
        memorization[mine] = counterfactual_memorization(included, scores)
    return calibration, difficulty, memorization


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run: T measurements of n forget examples."""

    which: ForgetSet
    rate: float
    indices: list[int]
    steps: Any
    """(T,) the step of each measurement."""
    nll: Any
    """(T, n) nats per token."""
    distance: Any
    """(T, n) NLL minus the mean NLL of the calibrating models, nats per token: 0 on average under retraining."""
    rise: Any
    """(T,) rise of the test NLL since the start, nats per token: the price of forgetting."""
    gaps: dict[str, Any]
    """criterion -> (T,) below 0 before the set is forgotten."""

    def forgotten(self, criterion: str = RETRAINED) -> Crossing:
        """Return the step at which the set is first forgotten."""
        return crossing(self.steps, self.gaps[criterion])

    def rise_at(self, step: float) -> float:
        """Return the interpolated rise of the test NLL; that of the last measurement where the run ended before."""
        return float(np.interp(step, self.steps, self.rise))

    @property
    def first_steps(self) -> int:
        """Steps to where the set is forgotten, but one at least and four at most."""
        return min(FIRST, max(1, math.ceil(self.forgotten().step)))

    def speed(self, steps: int | None = None) -> Any:
        """Return (n,) the mean rise of each example's NLL over the first steps, nats a step.

        Args:
            steps: number of steps, default `first_steps`. Speeds of several runs are compared over the same steps: the
                mean rise a step depends on their number, unless the rise is a straight line.
        """
        end = int((self.steps <= (steps or self.first_steps)).sum()) - 1
        return (self.nll[end] - self.nll[0]) / max(1, self.steps[end])


def outcomes_of(folder: Folder, config: StudyConfig, sets: Sets, examples: Examples) -> list[Outcome]:
    """Read every trajectory."""
    outcomes = []
    for seed in range(config.seeds):
        for job in jobs(config, sets, seed):
            run, indices = folder.read_arrays(job.file), sets.forget[job.which]
            non_members = sets.non_members(job.which.kind, seed, config.non_members)
            distance = np.array(
                [calibrated_scores(row, examples.at(examples.calibration, indices)) for row in run["nll"]]
            )
            others = run["non_member_nll"] - examples.calibration_without(seed, non_members)  # NaN with too few seeds
            outcomes.append(
                Outcome(
                    which=job.which,
                    rate=job.rate,
                    indices=indices,
                    steps=run["steps"],
                    nll=run["nll"],
                    distance=distance,
                    rise=run["test_nll"] - run["test_nll"][0],
                    gaps=_gaps(run["nll"], run["non_member_nll"], distance, others),
                )
            )
    return outcomes


def _gaps(nll: Any, non_member_nll: Any, distance: Any, non_member_distance: Any) -> dict[str, Any]:
    """Return criterion -> (T,) below 0 before a set is forgotten; without usable non-members, never forgotten."""

    def exposure(scores: Any, against: Any, current: bool) -> Any:
        usable = np.isfinite(against).all(0)
        if not usable.any():
            return np.full(len(scores), -np.inf)
        rows = against[:, usable] if current else np.broadcast_to(against[0, usable], (len(scores), usable.sum()))
        return NULL_MEAN - np.array(
            [generalized_exposure(s, a).lower.mean() for s, a in zip(scores, rows, strict=True)]
        )

    return {
        RETRAINED: distance.mean(1),
        "anchored NLL": nll.mean(1) - non_member_nll[0].mean(),
        "anchored exposure": exposure(nll, non_member_nll, False),
        "current exposure": exposure(nll, non_member_nll, True),
        "anchored calibrated exposure": exposure(distance, non_member_distance, False),
        "current calibrated exposure": exposure(distance, non_member_distance, True),
    }
