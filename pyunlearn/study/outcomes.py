"""From trajectories to exposures, steps to forget and distances: every number that claims and figures are made of."""

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
from pyunlearn.study.folder import Folder
from pyunlearn.study.old_config import Config
from pyunlearn.study.reference_models import names
from pyunlearn.study.runs import jobs
from pyunlearn.study.sets import ForgetSet, Sets, lengths

YARDSTICKS = ("anchored raw", "anchored calibrated", "current raw", "current calibrated")
"""Where the references are scored: under the original model, once, or under the model as it is now; and what: NLL a token, or NLL less the
mean NLL under subset models that never saw the text."""


@dataclass(frozen=True)
class Outcome:
    """One run. T measurements, n examples; exposures in bits."""

    which: ForgetSet
    rate: float
    places: list[int]
    steps: Any
    """(T,)"""
    nll: Any
    """(T, n) nats a token."""
    accuracy: Any
    """(T, n) share of tokens that are the first choice."""
    lower: dict[str, Any]
    """yardstick -> (T, n) exposure, high = memorized."""
    upper: dict[str, Any]
    """yardstick -> (T, n) the other side, high = driven below unseen text."""
    test_nll: Any
    """(T,)"""
    bleu: Any
    """(T,) NaN where it was not taken."""
    drift: Any
    """(T,) mean rise of the references' NLL since the start."""
    from_retrained: Any
    """(T,) mean distance |NLL - NLL under the retrained model| of the forget examples, nats a token."""
    references_from_retrained: Any
    """(T,) the same of the references."""
    moved: Any
    """(T,) distance of the weights from where they began."""

    @property
    def rise(self) -> Any:
        """(T,) rise of the test NLL: the price."""
        return self.test_nll - self.test_nll[0]

    def forgotten(self, yardstick: str, threshold: float = NULL_MEAN) -> StepsToForget:
        """(n,) steps until the exposure is at most the threshold; censored where the run ended before."""
        return steps_to_forget(self.lower[yardstick], threshold, steps=self.steps)

    def lowest(self, yardstick: str, budget: float) -> float:
        """Lowest mean exposure reached while the test NLL had risen by no more than the budget."""
        allowed = np.logical_and.accumulate(self.rise <= budget)
        return float(self.lower[yardstick].mean(1)[allowed].min())

    def price(self, yardstick: str, threshold: float) -> float:
        """Rise of the test NLL where the mean exposure first is at most the threshold; inf if it never is."""
        there = self.lower[yardstick].mean(1) <= threshold
        return float(self.rise[there.argmax()]) if there.any() else float("inf")


@dataclass(frozen=True)
class Examples:
    """What the reference models say of every watched example, in the order of `places`."""

    places: list[int]
    memorization: Any
    """(N,) counterfactual, in nats: mean log-likelihood a token under subset models with it less that under those without."""
    memorization_accuracy: Any
    """(N,) the same of first choices."""
    difficulty: Any
    """(N,) mean NLL under the subset models without it, nats a token."""
    retrained: Any
    """(N,) NLL under the model retrained without any forget set."""
    tokens: Any

    def at(self, values: Any, places: list[int]) -> Any:
        """The values of some places."""
        return values[np.searchsorted(self.places, places)]


def examples_of(folder: Folder, config: Config, sets: Sets) -> Examples:
    """Memorization and difficulty from the scores of the subset models."""
    watched, masks = sets.watched(), sets.subsets(config)
    scores = [folder.read_arrays(f"scores/subset-{k}.npz") for k in range(config.subset_models)]
    inside = np.stack([masks[i] for i in watched], axis=1)
    nll, accuracy = (np.stack([s[name] for s in scores]) for name in ("nll", "accuracy"))
    # of a reference the mask is a dummy: "in" and "out" are two random halves of the models, none of which saw it
    out = np.where(inside, 0.0, nll).sum(0) / (~inside).sum(0)
    return Examples(
        watched, counterfactual_memorization(inside, -nll), counterfactual_memorization(inside, accuracy), out,
        folder.read_arrays("scores/retrained.npz")["nll"], lengths(sets, watched),
    )  # fmt: skip


def outcomes_of(folder: Folder, config: Config, sets: Sets, examples: Examples) -> list[Outcome]:
    """Every run, with its exposures under each yardstick."""
    found = []
    for job in jobs(config, sets):
        run = folder.read_arrays(job.file)
        places, unseen = sets.forget[job.which], sets.references[job.which.kind]
        ease, reference_ease = examples.at(examples.difficulty, places), examples.at(examples.difficulty, unseen)
        lower, upper = {}, {}
        for yardstick in YARDSTICKS:
            rows = []
            for nll, now in zip(run["nll"], run["reference_nll"], strict=True):
                against = run["reference_nll"][0] if yardstick.startswith("anchored") else now
                if yardstick.endswith("calibrated"):
                    rows.append(
                        generalized_exposure(calibrated_scores(nll, ease), calibrated_scores(against, reference_ease))
                    )
                else:
                    rows.append(generalized_exposure(nll, against))
            lower[yardstick], upper[yardstick] = (
                np.stack([getattr(r, side) for r in rows]) for side in ("lower", "upper")
            )
        away = [
            np.abs(run[name] - examples.at(examples.retrained, group)).mean(1)
            for name, group in (("nll", places), ("reference_nll", unseen))
        ]
        found.append(Outcome(
            job.which, job.rate, places, run["steps"], run["nll"], run["accuracy"], lower, upper, run["test_nll"], run["bleu"],
            (run["reference_nll"] - run["reference_nll"][0]).mean(1), away[0], away[1], run["moved"],
        ))  # fmt: skip
    return found


def tables(
    folder: Folder, config: Config, sets: Sets, examples: Examples, outcomes: list[Outcome], tokenizer: Any
) -> None:
    """examples, models, steps (a row for each measurement of a run) and example_steps (one for each example in it), as CSV and Parquet."""
    owner = {i: which for which, places in sets.forget.items() for i in places}
    kind_of = {i: kind for kind, places in sets.references.items() for i in places}
    mains = [folder.read_arrays(f"scores/main-{d}.npz")["nll"] for d in range(config.draws)]
    rows = []
    for at, place in enumerate(examples.places):
        which = owner.get(place)
        rows.append({
            "example": place, "kind": which.kind if which else kind_of[place], "role": "forget" if which else "reference",
            "repetitions": which.repetitions if which else 0, "draw": which.draw if which else None, "tokens": int(examples.tokens[at]),
            "nll_trained": float(mains[which.draw][at]) if which else None, "nll_retrained": float(examples.retrained[at]),
            "difficulty": float(examples.difficulty[at]), "memorization": float(examples.memorization[at]) if which else None,
            "memorization_accuracy": float(examples.memorization_accuracy[at]) if which else None,
            "completion": tokenizer.decode(sets.tokens[place].scored, skip_special_tokens=True),
        })  # fmt: skip
    folder.table("examples", rows)
    folder.table("models", [
        {"model": name, **{k: float(v) for k, v in folder.read_arrays(f"scores/{name}.npz").items() if v.ndim == 0}} for name in names(config)
    ])  # fmt: skip
    steps: list[dict[str, Any]] = []
    each: list[dict[str, Any]] = []
    for o in outcomes:
        run = {"kind": o.which.kind, "repetitions": o.which.repetitions, "draw": o.which.draw, "rate": o.rate}
        for t, step in enumerate(o.steps.tolist()):
            row = run | {
                "step": step,
                "test_nll": float(o.test_nll[t]),
                "bleu": float(o.bleu[t]) if np.isfinite(o.bleu[t]) else None,
            }
            row |= {
                "nll": float(o.nll[t].mean()),
                "accuracy": float(o.accuracy[t].mean()),
                "reference_drift": float(o.drift[t]),
            }
            row |= {
                "from_retrained": float(o.from_retrained[t]),
                "references_from_retrained": float(o.references_from_retrained[t]),
            }
            row |= {"moved": float(o.moved[t])}
            for y in YARDSTICKS:
                row |= {
                    f"{y} exposure": float(o.lower[y][t].mean()),
                    f"{y} upper exposure": float(o.upper[y][t].mean()),
                }
            steps.append(row)
            for i, place in enumerate(o.places):
                one = run | {
                    "step": step,
                    "example": place,
                    "nll": float(o.nll[t, i]),
                    "accuracy": float(o.accuracy[t, i]),
                }
                each.append(one | {f"{y} exposure": round(float(o.lower[y][t, i]), 4) for y in YARDSTICKS}
                            | {f"{y} upper exposure": round(float(o.upper[y][t, i]), 4) for y in YARDSTICKS})  # fmt: skip
    folder.table("steps", steps)
    folder.table("example_steps", each)
    forgetting = []
    for o in outcomes:
        for y in YARDSTICKS:
            taken = o.forgotten(y)
            for i, place in enumerate(o.places):
                forgetting.append({
                    "kind": o.which.kind, "repetitions": o.which.repetitions, "draw": o.which.draw, "rate": o.rate, "yardstick": y, "example": place,
                    "start_exposure": float(o.lower[y][0, i]), "steps": int(taken.steps[i]), "censored": bool(taken.censored[i]),
                })  # fmt: skip
    folder.table("steps_to_forget", forgetting)
