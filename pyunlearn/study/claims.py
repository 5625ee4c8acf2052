"""The claims of Baluta et al. 2024, one number per seed for each, and the sensitivity of these numbers.

The estimands and their margins are fixed here; study.yaml repeats them before anything is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from pyunlearn.study.config import OUTSIDE, StudyConfig
from pyunlearn.study.decisions import Decision, decide, interval
from pyunlearn.study.outcomes import CRITERIA, RETRAINED, Examples, Outcome

LEAST_STEP = 0.5
"""Steps below this count as this in logarithms: a set may be forgotten from the start."""
LEAST_SPEED = 1e-6
"""Nats a step; slower sets count as this fast in logarithms."""


class Estimand(NamedTuple):
    """The number that is computed in each seed; above 0 it speaks for the claim."""

    claim: str
    """The claim in words."""
    contrast: str
    """What is computed in each seed."""
    unit: str
    margin: float
    """Distance from 0 that does not matter."""


CLAIMS = {
    "steps": Estimand(
        "Out-of-distribution examples need more unlearning steps.",
        "log2 of the steps of canaries over those of in-distribution examples, mean over doses",
        "log2",
        0.32,
    ),
    "trade-off": Estimand(
        "Out-of-distribution examples cost less performance when they are forgotten.",
        "rise of the test NLL where the in-distribution set is forgotten, minus that where the canaries are, mean over "
        "doses",
        "nats",
        0.01,
    ),
    "decay": Estimand(
        "Unlearning in-distribution examples costs performance faster.",
        "rise of the test NLL in-distribution minus canaries, at the step where the canaries are forgotten, mean over "
        "doses",
        "nats",
        0.02,
    ),
    "memorization": Estimand(
        "The memorization of an example decides its steps (more memorized, more steps for the same distance).",
        "slope of log2 of the first steps a nat (1 / speed) on log2 of the dose, over the same steps for every dose, "
        "in distribution",
        "log2 a doubling",
        0.1,
    ),
    "difficulty": Estimand(
        "The difficulty of an example decides its steps (harder, more steps for the same distance).",
        "slope of log2 of the first steps a nat (1 / speed) on difficulty, within doses, in distribution",
        "log2 a standard deviation",
        0.1,
    ),
}
_OF_KINDS = ("steps", "trade-off", "decay")
Runs = dict[tuple[str, int], Outcome]  # (kind, dose) -> the run of one seed at one rate


class Claim(NamedTuple):
    """A claim and what the seeds say about it."""

    name: str
    kind: str
    """The kind of forget set that is compared with in-distribution ones; id where only these are used."""
    contrasts: list[float]
    """One number per seed."""
    decision: Decision


class Variant(NamedTuple):
    """The same contrast measured in another way. It never votes."""

    claim: str
    variant: str
    unit: str
    mean: float
    low: float
    high: float
    agree: float | None
    """Share of these seeds on the side of the primary mean; None for what arithmetic alone gives."""
    seeds: int
    """Seeds that have a number: no set that is compared was never forgotten."""


def decided_claims(config: StudyConfig) -> list[str]:
    """Return the claims that a study decides: all five, or without canaries those that compare no kinds."""
    return [name for name in CLAIMS if OUTSIDE in config.kinds or name not in _OF_KINDS]


def primary_claims(config: StudyConfig, examples: Examples, outcomes: Sequence[Outcome]) -> list[Claim]:
    """Decide the claims of `decided_claims`, together."""
    return _decided({name: _per_seed(config, examples, outcomes, name) for name in decided_claims(config)}, OUTSIDE)


def secondary_claims(config: StudyConfig, examples: Examples, outcomes: Sequence[Outcome]) -> list[Claim]:
    """Decide the claims that compare kinds for each further kind, adjusted for their number within the kind."""
    claims = []
    for kind in config.kinds:
        if kind not in ("id", OUTSIDE):
            contrasts = {name: _per_seed(config, examples, outcomes, name, kind=kind) for name in _OF_KINDS}
            claims += _decided(contrasts, kind)
    return claims


def variants(
    config: StudyConfig, examples: Examples, outcomes: Sequence[Outcome], claims: Sequence[Claim]
) -> list[Variant]:
    """Measure every claim by other criteria, doses, rates and kinds."""
    rows = []
    signs = {claim.name: np.sign(claim.decision.mean) for claim in claims}

    def add(claim: str, variant: str, unit: str, values: list[float], *, votes: bool = True) -> None:
        known = [value for value in values if np.isfinite(value)]
        agree = float(np.mean(np.sign(known) == signs[claim])) if known and votes else None
        rows.append(Variant(claim, variant, unit, *interval(known or [np.nan]), agree, len(known)))

    for name in decided_claims(config):

        def measure(variant: str, name: str = name, **changes: Any) -> None:
            add(name, variant, CLAIMS[name].unit, _per_seed(config, examples, outcomes, name, **changes))

        if name in _OF_KINDS:
            for criterion, text in CRITERIA.items():
                if criterion != RETRAINED:
                    measure(f"forgotten at {text}", criterion=criterion)
        if name != "memorization":
            for dose in config.doses:
                measure(f"dose {dose} alone", doses=(dose,))
        for rate in config.unlearning_rates[1:]:
            measure(f"learning rate {rate:g}", rate=rate)
        if name in _OF_KINDS:
            measure("doses whose distances at the start are nearest", matched=True)
        else:
            for kind in config.kinds:
                if kind != "id":
                    measure(f"{kind} sets", kind=kind)
    for claim, variant, unit, value in _ARITHMETIC:
        values = [value(examples, runs) for runs in _by_seed(config, outcomes)]
        add(claim, variant, unit, values, votes=not variant.startswith("arithmetic"))
    return rows


# ---------------------------------------------------------------- one number per seed


def _decided(contrasts: dict[str, list[float]], kind: str) -> list[Claim]:
    decisions = decide(contrasts, {name: CLAIMS[name].margin for name in contrasts})
    return [Claim(n, kind if n in _OF_KINDS else "id", contrasts[n], decisions[n]) for n in contrasts]


def _by_seed(config: StudyConfig, outcomes: Sequence[Outcome], rate: float | None = None) -> list[Runs]:
    """Return the runs of each seed at one rate, by default the first."""
    rate = config.unlearning_rates[0] if rate is None else rate
    seeds: list[Runs] = [{} for _ in range(config.seeds)]
    for o in outcomes:
        if o.rate == rate:
            seeds[o.which.seed][o.which.kind, o.which.dose] = o
    return seeds


def _per_seed(
    config: StudyConfig,
    examples: Examples,
    outcomes: Sequence[Outcome],
    name: str,
    *,
    kind: str | None = None,
    criterion: str = RETRAINED,
    rate: float | None = None,
    doses: tuple[int, ...] | None = None,
    matched: bool = False,
) -> list[float]:
    """Return the contrast of a claim in each seed; NaN where the runs do not tell it.

    That is where a set that is compared was never forgotten, or where neither of two had left a trace.
    """
    doses, values = doses or config.doses, []
    for runs in _by_seed(config, outcomes, rate):
        if name == "memorization":
            values.append(_slowness(doses, [runs[kind or "id", d] for d in doses]))
        elif name == "difficulty":
            values.append(_difficulty(examples, [runs[kind or "id", d] for d in doses]))
        else:
            pairs = [(_partner(runs, d, kind or OUTSIDE, matched), runs[kind or OUTSIDE, d]) for d in doses]
            values.append(float(np.mean([_of_pair(name, *pair, criterion) for pair in pairs])))
    return values


def _of_pair(name: str, inside: Outcome, outside: Outcome, criterion: str) -> float:
    """Return a claim's contrast between two sets, or NaN."""
    ends = [o.forgotten(criterion) for o in (inside, outside)]
    needed = ends[1:] if name == "decay" else ends  # decay looks at the step at which the other set is forgotten
    if any(e.censored for e in needed) or all(e.step < LEAST_STEP for e in ends):
        return float("nan")
    return _PAIRS[name](inside, outside, criterion)


def _partner(runs: Runs, dose: int, kind: str, matched: bool) -> Outcome:
    """Return the in-distribution run of the same dose, or that whose distance at the start is nearest."""
    if not matched:
        return runs["id", dose]
    start = runs[kind, dose].distance[0].mean()
    inside = [o for (k, _), o in runs.items() if k == "id"]
    return min(inside, key=lambda o: abs(o.distance[0].mean() - start))


def _steps(o: Outcome, criterion: str = RETRAINED) -> float:
    return max(LEAST_STEP, o.forgotten(criterion).step)


def _slowness(doses: Sequence[int], runs: Sequence[Outcome]) -> float:
    """Return the slope of log2 of the steps a nat on log2 dose, over the first steps of the set that takes fewest."""
    steps = min(o.first_steps for o in runs)
    return _slope([(d, 1 / max(LEAST_SPEED, float(o.speed(steps).mean()))) for d, o in zip(doses, runs, strict=True)])


def _more_steps(inside: Outcome, outside: Outcome, criterion: str) -> float:
    return float(np.log2(_steps(outside, criterion) / _steps(inside, criterion)))


def _lower_price(inside: Outcome, outside: Outcome, criterion: str) -> float:
    first, second = (o.rise_at(o.forgotten(criterion).step) for o in (inside, outside))
    return first - second


def _faster_decay(inside: Outcome, outside: Outcome, criterion: str) -> float:
    step = outside.forgotten(criterion).step
    return inside.rise_at(step) - outside.rise_at(step)


_PAIRS: dict[str, Callable[[Outcome, Outcome, str], float]] = {
    "steps": _more_steps,
    "trade-off": _lower_price,
    "decay": _faster_decay,
}


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the slope of log2 y on log2 x."""
    x, y = np.log2(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0])


def _difficulty(examples: Examples, runs: Sequence[Outcome]) -> float:
    """Return the slope of -log2 speed on difficulty, each dose with its own level, a standard deviation within doses.

    Speeds below 1/16 of their set's mean count as that.
    """
    products = squares = count = 0.0
    for o in runs:
        speed = o.speed()
        floor = max(float(speed.mean()) / 16, 1e-9)
        slowness, x = -np.log2(np.maximum(speed, floor)), examples.at(examples.difficulty, o.indices)
        products += float(((x - x.mean()) * slowness).sum())
        squares += float(((x - x.mean()) ** 2).sum())
        count += len(x)
    return products / (squares * count) ** 0.5 if squares else float("nan")


# ---------------------------------------------------------------- what arithmetic alone gives


def _distance_slope(_: Examples, runs: Runs) -> float:
    """Return the slope of log2 of the nats to go on log2 dose: that of the steps if every dose had the same speed."""
    points = [(dose, max(1e-3, -float(o.distance[0].mean()))) for (kind, dose), o in runs.items() if kind == "id"]
    return _slope(points)


def _steps_slope(_: Examples, runs: Runs) -> float:
    """Return the slope of log2 of the steps on log2 dose."""
    return _slope([(dose, _steps(o)) for (kind, dose), o in runs.items() if kind == "id"])


def _raw_correlation(examples: Examples, runs: Runs, one_speed: bool = False) -> float:
    """Return the mean rank correlation of difficulty with the steps to the set's mean retrained NLL by raw scores.

    Args:
        examples: the forget examples.
        runs: of one seed.
        one_speed: every example rises at the mean speed of its set, so that difficulty has no influence on it.
    """
    correlations = []
    for (kind, _), o in runs.items():
        if kind == "id":
            level = examples.at(examples.calibration, o.indices).mean()
            speed = np.maximum(o.speed(), max(float(o.speed().mean()) / 16, 1e-9))
            steps = np.maximum(0, level - o.nll[0]) / (speed.mean() if one_speed else speed)
            difficulty = examples.at(examples.difficulty, o.indices)
            related = np.ptp(steps) > 0 and np.ptp(difficulty) > 0
            correlations.append(float(stats.spearmanr(difficulty, steps).statistic) if related else 0.0)
    return float(np.mean(correlations))


_ARITHMETIC: list[tuple[str, str, str, Callable[[Examples, Runs], float]]] = [
    ("memorization", "steps in all, from unlike starts", "log2 a doubling", _steps_slope),
    (
        "memorization",
        "arithmetic: the same from the distances at the start, at one speed",
        "log2 a doubling",
        _distance_slope,
    ),
    ("difficulty", "rank correlation with raw steps", "correlation", _raw_correlation),
    (
        "difficulty",
        "arithmetic: the same at one speed, so without any influence of difficulty on it",
        "correlation",
        lambda examples, runs: _raw_correlation(examples, runs, one_speed=True),
    ),
]
