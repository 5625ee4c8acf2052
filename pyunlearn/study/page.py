"""The page of a study: a decision on each claim with effect and interval, what limits them, and their sensitivity."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyunlearn.output import plain_json
from pyunlearn.report.pages import rendered
from pyunlearn.study.claims import CLAIMS, LEAST_STEP, Claim, Variant
from pyunlearn.study.config import OUTSIDE, StudyConfig
from pyunlearn.study.decisions import FEWEST_SEEDS, Decision, interval
from pyunlearn.study.figures import FIGURES, NAMES
from pyunlearn.study.folder import Folder
from pyunlearn.study.outcomes import Examples, Outcome
from pyunlearn.study.plan import FILE
from pyunlearn.study.result import Study
from pyunlearn.study.seeds import CHECKPOINT, TWIN, model_name, scores_file
from pyunlearn.study.sets import NOBODY, ForgetSet, Sets
from pyunlearn.study.tables import decision_row

TONES = {"supported": "good", "contradicted": "bad", "no material difference": "plain", "undecided": "plain"}
_MOST_OUTSIDE = 0.01
"""Share of the training rows above which a kind may be learned, so that it is not out of distribution any more."""


def notes_of(config: StudyConfig, sets: Sets, outcomes: Sequence[Outcome]) -> list[str]:
    """Return what limits the decisions of a study, a sentence each."""
    notes = []
    if config.seeds < FEWEST_SEEDS:
        notes.append(
            f"A study of {config.seeds} seeds decides nothing: {FEWEST_SEEDS} are needed at least, 12 are the plan."
        )
    share = sets.outside_share(config)
    if share > _MOST_OUTSIDE:
        notes.append(
            f"{100 * share:.1f} % of the training rows are out of distribution, more than 1 %: the models may have "
            "learned these kinds. A larger corpus, more epochs or fewer examples lower the share."
        )
    return notes + _notes_of_ends(config, outcomes)


def notes_of_twins(config: StudyConfig, sets: Sets, examples: Examples, outcomes: Sequence[Outcome]) -> list[str]:
    """Return what limits the decisions of a study of twins, a sentence each."""
    notes = [
        f"The units of the tests are {config.seeds} disjoint draws of sets of texts of one pair of models, not models "
        "that were trained independently: the verdicts are about this pair, and another training may differ."
    ]
    if config.seeds < FEWEST_SEEDS:
        notes.append(f"{config.seeds} draws decide nothing: {FEWEST_SEEDS} seeds are needed at least, 12 are the plan.")
    if OUTSIDE not in config.kinds:
        notes.append(
            f'No text of kind "{OUTSIDE}" is used, by the column "kind" of the corpus and the setting kinds: the '
            "claims that compare kinds are not decided."
        )
    mean, low, high = interval(examples.memorization[examples.owner == NOBODY])
    notes.append(
        f"Of the texts of dose 0, the NLL under the twin minus that under the checkpoint is {mean:+.3f} nats "
        f"(95 % interval {low:+.3f} to {high:+.3f}): what is not 0 is no memorization, and moves the level at which a "
        "set counts as forgotten."
    )
    dose = max(config.doses)
    unseen, seen = (
        float(np.mean([examples.at(examples.memorization, sets.forget[ForgetSet("id", d, s)]) for s in seeds]))
        for d, seeds in ((0, [NOBODY]), (dose, range(config.seeds)))
    )
    if not seen > unseen:
        notes.append(
            f"Memorization of the texts of dose {dose} (kind id) is {seen:+.3f} nats on average, and no more than that "
            f"of the texts of dose 0, {unseen:+.3f}: perhaps the pair is swapped, checkpoint and twin, or the doses "
            "are those of another model."
        )
    return notes + _notes_of_ends(config, outcomes)


def _notes_of_ends(config: StudyConfig, outcomes: Sequence[Outcome]) -> list[str]:
    """Return a sentence on the sets that were never forgotten, and on those that were from the start."""
    notes = []
    first = [o for o in outcomes if o.rate == config.unlearning_rates[0] and o.which.kind in ("id", OUTSIDE)]
    ends = [o.forgotten() for o in first]
    never, already = sum(e.censored for e in ends), sum(e.step < LEAST_STEP for e in ends)
    if never:
        notes.append(
            f"{never} of {len(first)} sets were never at the level of retrained models: their seeds have no number "
            "for the claims that compare them. More steps, or a higher learning rate, would give one."
        )
    if already:
        notes.append(
            f"{already} of {len(first)} sets were at the level of retrained models from the start or within half a "
            "step: training had left little trace of them. They count as half a step in logarithms."
        )
    return notes


def why(name: str, decision: Decision) -> str:
    """Return the effect with its interval, and what decided it.

    >>> why("steps", Decision("supported", 1.7, 1.1, 2.3, 0.5, 6e-4, 3e-3, 0.99, 0.32, 6, None))
    '+1.7 (95 % interval +1.1 to +2.3) log2, 6 seeds, p 0.003 after Holm.'
    """
    d, unit = decision, CLAIMS[name].unit
    if not math.isfinite(d.mean):
        return "A seed has no number for it: a set was never forgotten, or training had left no trace of two."
    text = f"{d.mean:+.2g} (95 % interval {d.low:+.2g} to {d.high:+.2g}) {unit}, {d.seeds} seeds"
    if d.outcome == "no material difference":
        return f"{text}, within ±{d.margin:g}: p {d.pvalue_margin:.2g} (TOST)."
    text += f", p {d.pvalue_holm:.2g} after Holm"
    if d.outcome != "undecided":
        return f"{text}."
    if d.seeds < FEWEST_SEEDS:
        return f"{text}; fewer than {FEWEST_SEEDS} seeds decide nothing."
    needed = f"about {d.seeds_needed} seeds" if d.seeds_needed else "more than 1000 seeds"
    return f"{text}; {needed} would decide an effect and a spread like these (power 80 %)."


def write_page(
    study: Study, folder: Folder, sets: Sets, outcomes: Sequence[Outcome], variants: Sequence[Variant]
) -> None:
    """Write index.html, and claims.json with the decisions, the notes and the hash of study.yaml."""
    config = study.config
    claims = {
        "plan": study.plan,
        "notes": study.notes,
        "claims": [_decision(c) for c in study.claims],
        "secondary": [_decision(c) for c in study.secondary],
    }
    folder.text("claims.json", json.dumps(claims, indent=2, ensure_ascii=False) + "\n")
    content = claims | {
        "config": config.to_dict(),
        "file": FILE,
        "tones": TONES,
        "names": NAMES,
        "sets": [_set(config, outcomes, kind, dose) for kind in config.kinds for dose in config.doses],
        "variants": variants,
        "figures": _drawings(folder),
        "models": _models(folder, config),
        "environment": folder.read_json("environment.json"),
        "background": len(sets.background),
        "outside": sets.outside_share(config),
    }
    template = Path(__file__).parent / "templates" / "study.html"
    folder.text("index.html", rendered(template, content, number=_number))


def _decision(claim: Claim) -> dict[str, Any]:
    row = decision_row(claim) | {"why": why(claim.name, claim.decision), "seeds_contrasts": claim.contrasts}
    plain: dict[str, Any] = plain_json(row)
    return plain


def _set(config: StudyConfig, outcomes: Sequence[Outcome], kind: str, dose: int) -> dict[str, Any]:
    """Return means over seeds of the forget sets of one kind and dose, at the learning rate that decides."""
    mine = [o for o in outcomes if (o.rate, *o.which[:2]) == (config.unlearning_rates[0], kind, dose)]
    ends = [o.forgotten() for o in mine]
    return {
        "kind": kind,
        "dose": dose,
        "distance": float(np.mean([o.distance[0].mean() for o in mine])),
        "steps": float(np.mean([e.step for e in ends])),
        "price": float(np.mean([o.rise_at(e.step) for o, e in zip(mine, ends, strict=True)])),
        "already": sum(e.step == 0 for e in ends),
        "never": sum(e.censored for e in ends),
    }


def _drawings(folder: Folder) -> list[tuple[str, str, str]]:
    """Return (name, svg, caption) of each figure, with ids that differ on one page."""
    drawings = []
    for number, (name, caption) in enumerate(FIGURES.items()):
        svg = (folder.path / f"figures/{name}.svg").read_text(encoding="utf-8")
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>f{number}-", svg)
        drawings.append((name, re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S), caption))
    return drawings


def _models(folder: Folder, config: StudyConfig) -> list[dict[str, Any]]:
    """Return name and test NLL of each model, and of those that the study trained the steps and the last loss."""
    if config.twin is not None:
        names = [CHECKPOINT, TWIN]
    else:
        names = [model_name(config, seed) for seed in range(config.seeds)]
    rows = [{"name": name, "test": folder.read_arrays(scores_file(name))["test_nll"]} for name in names]
    for row in rows if config.twin is None else ():
        trained = folder.read_json(f"training/{row['name']}.json")
        row |= {"steps": trained["steps"], "loss": trained["loss_by_epoch"][-1]}
    return rows


def _number(x: float | None, digits: int = 3) -> str:
    return "–" if x is None or not math.isfinite(x) else f"{x:+.{digits}g}"
