"""The paper's claims, each as comparisons with an effect, an interval, a test and a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pyunlearn.metrics import NULL_MEAN
from pyunlearn.study import statistics
from pyunlearn.study.old_config import Config
from pyunlearn.study.outcomes import YARDSTICKS, Examples, Outcome
from pyunlearn.study.statistics import Effect

CLAIMS = {
    "steps": "Out-of-distribution examples need more unlearning steps.",
    "trade-off": "Out-of-distribution examples have the better trade-off of forgetting and performance.",
    "decay": "Unlearning in-distribution examples costs performance quickly.",
    "memorization": "The memorization of an example decides its steps (more memorized, more steps).",
    "difficulty": "The difficulty of an example decides its steps (harder, more steps).",
}
SMALL = {"share": 0.05, "nats": 0.02, "bits": 0.25, "BLEU": 0.5, "correlation": 0.1}
"""Effects within this of none count as none: an interval that lies inside says that the claim is not supported."""

_OF_SETS = ("sign-flip permutation", "sign test of sets")


class Finding(NamedTuple):
    """One comparison. Effects above the null value speak for the claim."""

    claim: str
    comparison: str
    kind: str
    """Which forget sets: out of distribution against in distribution, or those within which examples are ranked."""
    yardstick: str
    """Of exposure; empty where none is used."""
    rate: float
    unit: str
    null: float
    effect: float
    low: float
    high: float
    pvalue: float
    pvalue_holm: float
    """Adjusted for all comparisons of the claim."""
    test: str
    n: int
    """Units compared: examples, pairs of examples or pairs of sets."""
    verdict: str


class Claim(NamedTuple):
    """A claim and what became of it."""

    name: str
    text: str
    verdict: str
    why: str
    findings: list[Finding]


def findings_of(config: Config, examples: Examples, outcomes: Sequence[Outcome]) -> list[Finding]:
    """Every comparison, claim by claim."""
    found: list[Finding] = []
    for claim, make in (("steps", _steps), ("trade-off", _trade_off), ("decay", _decay)):
        rows = [r for kind in config.kinds if kind != "id" for rate in config.unlearning_rates
                for r in make(config, _pairs(outcomes, kind, rate), kind, rate)]  # fmt: skip
        found += _adjusted(claim, rows)
    for claim in ("memorization", "difficulty"):
        values = getattr(examples, claim)
        rows = [r for kind in config.kinds for rate in config.unlearning_rates
                for r in _ranks(config, [o for o in outcomes if o.which.kind == kind and o.rate == rate], examples, values, kind, rate,
                                claim == "memorization")]  # fmt: skip
        found += _adjusted(claim, rows)
    return found


def judged(findings: Sequence[Finding]) -> list[Claim]:
    """One verdict a claim: that of its comparisons where all that decide agree and most decide, else undecided."""
    claims = []
    for name, text in CLAIMS.items():
        mine = [f for f in findings if f.claim == name]
        counts = {v: sum(f.verdict == v for f in mine) for v in ("supported", "not supported", "undecided")}
        yes, no, n = counts["supported"], counts["not supported"], len(mine)
        verdict = "undecided"
        if yes > n / 2 and not no:
            verdict = "supported"
        elif no > n / 2 and not yes:
            verdict = "not supported"
        why = f"{yes} of {n} comparisons support it, {no} speak against it, {counts['undecided']} are undecided"
        if yes and no:
            why += ": it depends on " + (" and ".join(_depends(mine)) or "the comparison")
        claims.append(Claim(name, text, verdict, why + ".", mine))
    return claims


# ---------------------------------------------------------------- comparisons: (comparison, yardstick, unit, null, test, effect)

Row = tuple[
    str, str, float, str, str, float, str, Effect
]  # comparison, kind, rate, yardstick, unit, null, test, effect


def _steps(config: Config, pairs: list[tuple[Outcome, Outcome]], kind: str, rate: float) -> Iterator[Row]:
    for y in YARDSTICKS:
        taken = [(a.forgotten(y), b.forgotten(y)) for a, b in pairs]
        effect = statistics.steps_effect(taken, config.seed)
        yield "same repetitions", kind, rate, y, "share", 0.5, "stratified log-rank", effect
        matched = [m for a, b in _same_draw(pairs) for m in _matched(a, b, y, math.log2(config.references + 1))]
        effect = statistics.matched_effect(matched, config.seed)
        yield "equal starting exposure", kind, rate, y, "share", 0.5, "sign test of matched examples", effect


def _trade_off(config: Config, pairs: list[tuple[Outcome, Outcome]], kind: str, rate: float) -> Iterator[Row]:
    test = _OF_SETS[0]
    for y in YARDSTICKS:
        lowest = [[o.lowest(y, config.budget) for o in side] for side in zip(*pairs, strict=True)]
        effect = statistics.difference(lowest[1], lowest[0], config.seed)
        yield "lowest exposure at equal utility budget", kind, rate, y, "bits", 0.0, test, effect
        alike = _nearest(pairs, y)
        left = [[o.lowest(y, config.budget) for o in side] for side in zip(*alike, strict=True)] or [[], []]
        effect = statistics.difference(left[1], left[0], config.seed)
        yield "the same, equal starting exposure", kind, rate, y, "bits", 0.0, test, effect
        begun = [
            p for p in pairs if min(o.lower[y][0].mean() for o in p) > NULL_MEAN
        ]  # else the price is 0 by the start alone
        price = [[o.price(y, NULL_MEAN) for o in side] for side in zip(*begun, strict=True)] or [[], []]
        yield (
            "lower price where exposure reaches that of unseen text",
            kind,
            rate,
            y,
            "share",
            0.5,
            _OF_SETS[1],
            statistics.wins(*price),
        )


def _decay(config: Config, pairs: list[tuple[Outcome, Outcome]], kind: str, rate: float) -> Iterator[Row]:
    test = _OF_SETS[0]
    common = [min(len(a.steps), len(b.steps)) for a, b in pairs]
    for name, at in (("half the steps", 0.5), ("all steps", 1.0)):
        rises = [
            [o.rise[max(1, round(at * (n - 1)))] for o, n in zip(side, common, strict=True)]
            for side in zip(*pairs, strict=True)
        ]
        effect = statistics.difference(rises[1], rises[0], config.seed)
        yield f"rise of the test NLL at equal steps, {name}", kind, rate, "", "nats", 0.0, test, effect
    falls = [[_fall(o, n) for o, n in zip(side, common, strict=True)] for side in zip(*pairs, strict=True)]
    if np.isfinite(falls).all():
        effect = statistics.difference(falls[1], falls[0], config.seed)
        yield "fall of BLEU at equal steps", kind, rate, "", "BLEU", 0.0, test, effect


def _ranks(
    config: Config, outcomes: list[Outcome], examples: Examples, values: Any, kind: str, rate: float, between: bool
) -> Iterator[Row]:
    for y in YARDSTICKS:
        sets = [(examples.at(values, o.places), o.forgotten(y)) for o in outcomes]
        effect = statistics.rank_correlation(sets, config.seed)
        yield "rank correlation within sets", kind, rate, y, "correlation", 0.0, "permutation within sets", effect
        few, many = min(config.repetitions), max(config.repetitions)
        if between and few < many:
            by = {(o.which.repetitions, o.which.draw): o.forgotten(y) for o in outcomes}
            strata = [(by[few, d], by[many, d]) for d in range(config.draws)]
            effect = statistics.steps_effect(strata, config.seed)
            yield f"{many} repetitions against {few}", kind, rate, y, "share", 0.5, "stratified log-rank", effect


# ---------------------------------------------------------------- pairs


def _pairs(outcomes: Sequence[Outcome], kind: str, rate: float) -> list[tuple[Outcome, Outcome]]:
    """In distribution, out of distribution: of the same draw and repetitions."""
    by = {o.which: o for o in outcomes if o.rate == rate}
    return [(o, by[w._replace(kind=kind)]) for w, o in by.items() if w.kind == "id"]


def _same_draw(pairs: list[tuple[Outcome, Outcome]]) -> list[tuple[list[Outcome], list[Outcome]]]:
    draws = sorted({a.which.draw for a, _ in pairs})
    return [tuple([p[side] for p in pairs if p[0].which.draw == d] for side in (0, 1)) for d in draws]  # type: ignore[misc]


def _matched(
    first: list[Outcome], second: list[Outcome], yardstick: str, top: float, within: float = 0.5
) -> list[tuple[float, bool, float, bool]]:
    """Each in-distribution example with the out-of-distribution one whose exposure at the start is nearest, at most half a bit away; each
    is used once. Examples that begin as forgotten are left out, and those at the ceiling, where starts cannot be told apart."""
    sides = []
    for outcomes in (first, second):
        taken = [o.forgotten(yardstick) for o in outcomes]
        start = np.concatenate([o.lower[yardstick][0] for o in outcomes])
        steps, censored = (np.concatenate([getattr(t, name) for t in taken]) for name in ("steps", "censored"))
        sides.append(
            [(s, k, bool(c)) for s, k, c in zip(start, steps, censored, strict=True) if k > 0 and s < top - 1e-9]
        )
    found, free = [], sorted(sides[1])
    for start, taken_steps, cut in sorted(sides[0]):
        near = min(range(len(free)), key=lambda j: abs(free[j][0] - start), default=None)
        if near is not None and abs(free[near][0] - start) <= within:
            _, other, other_cut = free.pop(near)
            found.append((float(taken_steps), cut, float(other), other_cut))
    return found


def _nearest(
    pairs: list[tuple[Outcome, Outcome]], yardstick: str, within: float = 1.0
) -> list[tuple[Outcome, Outcome]]:
    """Sets of one draw whose mean exposures at the start are at most a bit apart, whatever their repetitions; each is used once."""
    found = []
    for first, second in _same_draw(pairs):
        gaps = sorted(
            (abs(a.lower[yardstick][0].mean() - b.lower[yardstick][0].mean()), i, j)
            for i, a in enumerate(first) for j, b in enumerate(second)
        )  # fmt: skip
        used: set[tuple[int, int]] = set()
        for gap, i, j in gaps:
            if gap <= within and (0, i) not in used and (1, j) not in used:
                used |= {(0, i), (1, j)}
                found.append((first[i], second[j]))
    return found


def _fall(o: Outcome, measurements: int) -> float:
    """Of BLEU, from the start to the last time it was taken within so many measurements."""
    taken = [b for b in o.bleu[:measurements].tolist() if math.isfinite(b)]
    return float(taken[0] - taken[-1]) if len(taken) > 1 else float("nan")


# ---------------------------------------------------------------- verdicts


def _adjusted(claim: str, rows: Sequence[Row]) -> list[Finding]:
    adjusted = statistics.holm([effect.pvalue for *_, effect in rows])
    return [
        Finding(
            claim,
            comparison,
            kind,
            y,
            rate,
            unit,
            null,
            *effect[:4],
            p,
            test,
            effect.n,
            _verdict(effect, unit, null, test),
        )
        for (comparison, kind, rate, y, unit, null, test, effect), p in zip(rows, adjusted, strict=True)
    ]


def _verdict(e: Effect, unit: str, null: float, test: str) -> str:
    """supported: the interval lies above the null and p < 0.05; not supported: below it so, or nowhere far enough above it to matter.

    Of fewer than 6 pairs of sets, or 20 examples, nothing is said: intervals of so few are too narrow.
    """
    if not math.isfinite(e.low) or e.n < (6 if test in _OF_SETS else 20):
        return "undecided"
    if e.low > null and e.pvalue < 0.05:
        return "supported"
    if (e.high < null and e.pvalue < 0.05) or e.high < null + SMALL[unit]:
        return "not supported"
    return "undecided"


def _depends(findings: Sequence[Finding]) -> list[str]:
    """What the verdict changes with, everything else being equal."""
    fields: dict[str, Callable[[Finding], Any]] = {
        "the yardstick": lambda f: f.yardstick, "the kind of forget set": lambda f: f.kind, "the learning rate": lambda f: f.rate,
        "the comparison": lambda f: f.comparison,
    }  # fmt: skip
    found = []
    for name, value in fields.items():
        groups: dict[Any, set[str]] = {}
        for f in findings:
            rest = tuple(v(f) for n, v in fields.items() if n != name)
            groups.setdefault(rest, set()).add(f.verdict)
        if (
            any({"supported", "not supported"} <= verdicts for verdicts in groups.values())
            and len({value(f) for f in findings}) > 1
        ):
            found.append(name)
    return found
