"""The claims of Baluta et al. 2024 as comparisons, each with an effect, an interval, a test and a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pyunlearn.metrics import NULL_MEAN
from pyunlearn.study import statistics
from pyunlearn.study.config import StudyConfig
from pyunlearn.study.outcomes import CRITERIA, Examples, Outcome
from pyunlearn.study.statistics import Effect

CLAIMS = {
    "steps": "Out-of-distribution examples need more unlearning steps.",
    "trade-off": "Out-of-distribution examples have the better trade-off of forgetting and performance.",
    "decay": "Unlearning in-distribution examples costs performance quickly.",
    "memorization": "The memorization of an example decides its steps (more memorized, more steps).",
    "difficulty": "The difficulty of an example decides its steps (harder, more steps).",
}
SMALL = {"share": 0.05, "nats": 0.02, "bits": 0.25, "BLEU": 0.5, "correlation": 0.1}
"""Unit -> distance from no effect that does not matter: an interval below it means that the claim is not supported."""

_OF_SETS = ("sign-flip permutation", "sign test of sets")


class Finding(NamedTuple):
    """One comparison. Effects above the null value speak for the claim."""

    claim: str
    comparison: str
    kind: str
    """The kind of forget set: compared with in distribution, or the one within which examples are ranked."""
    criterion: str
    """The criterion of exposure; empty where none is used."""
    rate: float
    unit: str
    null: float
    effect: float
    low: float
    high: float
    pvalue: float
    pvalue_holm: float
    """The p-value adjusted for all comparisons of the claim."""
    test: str
    n: int
    """Units compared: examples, pairs of examples or pairs of sets."""
    verdict: str


class Claim(NamedTuple):
    """A claim and the verdict on it."""

    name: str
    text: str
    verdict: str
    why: str
    findings: list[Finding]


class Comparison(NamedTuple):
    """A comparison before the p-values of its claim are adjusted; the fields are those of `Finding`."""

    comparison: str
    kind: str
    rate: float
    criterion: str
    unit: str
    null: float
    test: str
    effect: Effect


Pairs = list[tuple[Outcome, Outcome]]  # in distribution, out of distribution


def findings_of(config: StudyConfig, examples: Examples, outcomes: Sequence[Outcome]) -> list[Finding]:
    """Make every comparison, claim by claim."""
    findings: list[Finding] = []
    for claim, compare in (("steps", _steps), ("trade-off", _trade_off), ("decay", _decay)):
        comparisons = [
            comparison
            for kind in config.kinds
            if kind != "id"
            for rate in config.unlearning_rates
            for comparison in compare(config, _pairs(outcomes, kind, rate), kind, rate)
        ]
        findings += _adjusted(claim, comparisons)
    for claim in ("memorization", "difficulty"):
        comparisons = [
            comparison
            for kind in config.kinds
            for rate in config.unlearning_rates
            for comparison in _ranks(config, outcomes, examples, claim, kind, rate)
        ]
        findings += _adjusted(claim, comparisons)
    return findings


def judged(findings: Sequence[Finding]) -> list[Claim]:
    """Return one verdict per claim: that of most comparisons, if none says the opposite, else undecided."""
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


# ---------------------------------------------------------------- comparisons


def _steps(config: StudyConfig, pairs: Pairs, kind: str, rate: float) -> Iterator[Comparison]:
    top = math.log2(config.non_members + 1)
    for c in CRITERIA:
        steps = [(a.forgotten(c), b.forgotten(c)) for a, b in pairs]
        effect = statistics.steps_effect(steps)
        yield Comparison("same repetitions", kind, rate, c, "share", 0.5, "stratified log-rank", effect)
        matched = [m for a, b in _same_draw(pairs) for m in _matched(a, b, c, top)]
        effect = statistics.matched_effect(matched, config.seed)
        test = "sign test of matched examples"
        yield Comparison("equal starting exposure", kind, rate, c, "share", 0.5, test, effect)


def _trade_off(config: StudyConfig, pairs: Pairs, kind: str, rate: float) -> Iterator[Comparison]:
    def lower_exposure(pairs: Pairs, criterion: str) -> Effect:
        lowest = _sides(pairs, lambda o: o.lowest(criterion, config.budget))
        return statistics.difference(lowest[1], lowest[0], config.seed)

    for c in CRITERIA:
        name = "lowest exposure at equal utility budget"
        yield Comparison(name, kind, rate, c, "bits", 0.0, _OF_SETS[0], lower_exposure(pairs, c))
        effect = lower_exposure(_nearest(pairs, c), c)
        yield Comparison("the same, equal starting exposure", kind, rate, c, "bits", 0.0, _OF_SETS[0], effect)
        # a set that starts below the threshold would have a price of 0
        above = [pair for pair in pairs if min(o.lower[c][0].mean() for o in pair) > NULL_MEAN]
        prices = _sides(above, lambda o, c=c: o.price(c, NULL_MEAN))  # type: ignore[misc]
        name = "lower price where exposure reaches that of unseen text"
        yield Comparison(name, kind, rate, c, "share", 0.5, _OF_SETS[1], statistics.wins(*prices))


def _decay(config: StudyConfig, pairs: Pairs, kind: str, rate: float) -> Iterator[Comparison]:
    common = [min(len(a.steps), len(b.steps)) for a, b in pairs]
    for name, share in (("half the steps", 0.5), ("all steps", 1.0)):
        rises = [
            [o.rise[max(1, round(share * (n - 1)))] for o, n in zip(side, common, strict=True)]
            for side in zip(*pairs, strict=True)
        ]
        effect = statistics.difference(rises[1], rises[0], config.seed)
        name = f"rise of the test NLL at equal steps, {name}"
        yield Comparison(name, kind, rate, "", "nats", 0.0, _OF_SETS[0], effect)
    falls = [[_fall(o, n) for o, n in zip(side, common, strict=True)] for side in zip(*pairs, strict=True)]
    if np.isfinite(falls).all():
        effect = statistics.difference(falls[1], falls[0], config.seed)
        yield Comparison("fall of BLEU at equal steps", kind, rate, "", "BLEU", 0.0, _OF_SETS[0], effect)


def _ranks(
    config: StudyConfig, outcomes: Sequence[Outcome], examples: Examples, claim: str, kind: str, rate: float
) -> Iterator[Comparison]:
    mine = [o for o in outcomes if o.which.kind == kind and o.rate == rate]
    values = getattr(examples, claim)
    few, many = min(config.repetitions), max(config.repetitions)
    for c in CRITERIA:
        sets = [(examples.at(values, o.indices), o.forgotten(c)) for o in mine]
        effect = statistics.rank_correlation(sets, config.seed)
        test = "permutation within sets"
        yield Comparison("rank correlation within sets", kind, rate, c, "correlation", 0.0, test, effect)
        if claim == "memorization" and few < many:
            steps = {(o.which.repetitions, o.which.draw): o.forgotten(c) for o in mine}
            strata = [(steps[few, d], steps[many, d]) for d in range(config.draws)]
            effect = statistics.steps_effect(strata)
            name = f"{many} repetitions against {few}"
            yield Comparison(name, kind, rate, c, "share", 0.5, "stratified log-rank", effect)


# ---------------------------------------------------------------- pairs


def _pairs(outcomes: Sequence[Outcome], kind: str, rate: float) -> Pairs:
    """Return (in distribution, out of distribution) runs of the same draw and repetitions."""
    by_set = {o.which: o for o in outcomes if o.rate == rate}
    return [(o, by_set[w._replace(kind=kind)]) for w, o in by_set.items() if w.kind == "id"]


def _sides(pairs: Pairs, value: Callable[[Outcome], float]) -> list[list[float]]:
    """Return the values of the first and of the second of each pair."""
    return [[value(pair[side]) for pair in pairs] for side in (0, 1)]


def _same_draw(pairs: Pairs) -> list[tuple[list[Outcome], list[Outcome]]]:
    draws = sorted({a.which.draw for a, _ in pairs})
    return [([a for a, _ in pairs if a.which.draw == d], [b for a, b in pairs if a.which.draw == d]) for d in draws]


def _matched(
    first: list[Outcome], second: list[Outcome], criterion: str, top: float, within: float = 0.5
) -> list[tuple[float, bool, float, bool]]:
    """Match each in-distribution example with the out-of-distribution one whose exposure at the start is nearest.

    Matches are at most half a bit apart, and each example is used once. Examples that begin as forgotten are left out,
    and those at the ceiling `top`, where starts cannot be told apart. Returns (steps, censored) of both.
    """
    sides = []
    for outcomes in (first, second):
        results = [o.forgotten(criterion) for o in outcomes]
        start = np.concatenate([o.lower[criterion][0] for o in outcomes])
        steps, censored = (np.concatenate([getattr(r, name) for r in results]) for name in ("steps", "censored"))
        sides.append(
            [(s, k, bool(c)) for s, k, c in zip(start, steps, censored, strict=True) if k > 0 and s < top - 1e-9]
        )
    matches, free = [], sorted(sides[1])
    for start, own_steps, own_censored in sorted(sides[0]):
        near = min(range(len(free)), key=lambda j: abs(free[j][0] - start), default=None)
        if near is not None and abs(free[near][0] - start) <= within:
            _, other_steps, other_censored = free.pop(near)
            matches.append((float(own_steps), own_censored, float(other_steps), other_censored))
    return matches


def _nearest(pairs: Pairs, criterion: str, within: float = 1.0) -> Pairs:
    """Pair forget sets of one draw whose mean exposures at the start differ by a bit at most; each set is used once."""
    nearest = []
    for first, second in _same_draw(pairs):
        gaps = sorted(
            (abs(a.lower[criterion][0].mean() - b.lower[criterion][0].mean()), i, j)
            for i, a in enumerate(first)
            for j, b in enumerate(second)
        )
        used: set[tuple[int, int]] = set()
        for gap, i, j in gaps:
            if gap <= within and (0, i) not in used and (1, j) not in used:
                used |= {(0, i), (1, j)}
                nearest.append((first[i], second[j]))
    return nearest


def _fall(o: Outcome, measurements: int) -> float:
    """Return the fall of BLEU from the start to its last value among the first `measurements`."""
    values = [b for b in o.bleu[:measurements].tolist() if math.isfinite(b)]
    return float(values[0] - values[-1]) if len(values) > 1 else float("nan")


# ---------------------------------------------------------------- verdicts


def _adjusted(claim: str, comparisons: Sequence[Comparison]) -> list[Finding]:
    """Return the findings of a claim, with p-values adjusted for their number."""
    adjusted = statistics.holm([c.effect.pvalue for c in comparisons])
    return [
        Finding(
            claim=claim,
            comparison=c.comparison,
            kind=c.kind,
            criterion=c.criterion,
            rate=c.rate,
            unit=c.unit,
            null=c.null,
            effect=c.effect.effect,
            low=c.effect.low,
            high=c.effect.high,
            pvalue=c.effect.pvalue,
            pvalue_holm=pvalue,
            test=c.test,
            n=c.effect.n,
            verdict=_verdict(c.effect, c.unit, c.null, c.test),
        )
        for c, pvalue in zip(comparisons, adjusted, strict=True)
    ]


def _verdict(e: Effect, unit: str, null: float, test: str) -> str:
    """Return supported where the interval lies above the null and p < 0.05.

    Not supported where it lies below in the same way, or nowhere far enough above to matter. With fewer than 6 pairs of
    sets, or 20 examples, always undecided: their intervals are too narrow.
    """
    if not math.isfinite(e.low) or e.n < (6 if test in _OF_SETS else 20):
        return "undecided"
    if e.low > null and e.pvalue < 0.05:
        return "supported"
    if (e.high < null and e.pvalue < 0.05) or e.high < null + SMALL[unit]:
        return "not supported"
    return "undecided"


def _depends(findings: Sequence[Finding]) -> list[str]:
    """Return the properties with which the verdict changes, everything else being equal."""
    properties: dict[str, Callable[[Finding], Any]] = {
        "the criterion": lambda f: f.criterion,
        "the kind of forget set": lambda f: f.kind,
        "the learning rate": lambda f: f.rate,
        "the comparison": lambda f: f.comparison,
    }
    names = []
    for name, value in properties.items():
        groups: dict[Any, set[str]] = {}
        for f in findings:
            rest = tuple(v(f) for n, v in properties.items() if n != name)
            groups.setdefault(rest, set()).add(f.verdict)
        both = any({"supported", "not supported"} <= verdicts for verdicts in groups.values())
        if both and len({value(f) for f in findings}) > 1:
            names.append(name)
    return names
