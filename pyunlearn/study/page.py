"""The page of a study: five decisions with effect and interval, what limits them, and their sensitivity."""

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
from pyunlearn.study.claims import CLAIMS, LEAST_STEP, OUTSIDE, Claim, Variant
from pyunlearn.study.config import StudyConfig
from pyunlearn.study.decisions import FEWEST_SEEDS, Decision
from pyunlearn.study.figures import FIGURES, NAMES
from pyunlearn.study.folder import Folder
from pyunlearn.study.outcomes import Outcome
from pyunlearn.study.plan import FILE
from pyunlearn.study.result import Study
from pyunlearn.study.seeds import model_name
from pyunlearn.study.sets import Sets
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
        "models": [_model(folder, seed) for seed in range(config.seeds)],
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


def _model(folder: Folder, seed: int) -> dict[str, Any]:
    name = model_name(seed)
    trained, scores = folder.read_json(f"training/{name}.json"), folder.read_arrays(f"scores/{name}.safetensors")
    return {"name": name, "steps": trained["steps"], "loss": trained["loss_by_epoch"][-1], "test": scores["test_nll"]}


def _number(x: float | None, digits: int = 3) -> str:
    return "–" if x is None or not math.isfinite(x) else f"{x:+.{digits}g}"
