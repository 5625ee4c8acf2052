"""The page of a study: a verdict on each claim, the comparisons behind it, figures and numbers, in one file."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyunlearn.metrics import (
    NULL_MEAN,
    SIGNIFICANT,
    exposure_null_test,
    exposure_two_sample_test,
    generalized_exposure,
    median_steps,
)
from pyunlearn.report.pages import rendered
from pyunlearn.study.claims import SMALL, Claim
from pyunlearn.study.config import StudyConfig
from pyunlearn.study.figures import FIGURES, NAMES, retrained_exposures
from pyunlearn.study.folder import Folder
from pyunlearn.study.outcomes import Examples, Outcome
from pyunlearn.study.reference_models import names
from pyunlearn.study.sets import Sets

TONES = {"supported": "good", "not supported": "bad", "undecided": "plain"}


def write_page(
    folder: Folder,
    config: StudyConfig,
    sets: Sets,
    examples: Examples,
    outcomes: Sequence[Outcome],
    claims: Sequence[Claim],
) -> None:
    """Write index.html, and claims.json with the verdicts."""
    content = {
        "config": config.to_dict(),
        "claims": claims,
        "tones": TONES,
        "small": SMALL,
        "names": NAMES,
        "figures": _drawings(folder),
        "models": _models(folder, config),
        "nulls": _nulls(config, sets, examples),
        "runs": [_run(o, sets, examples) for o in outcomes],
        "environment": folder.read_json("environment.json"),
        "background": len(sets.background),
    }
    template = Path(__file__).parent / "templates" / "study.html"
    folder.text("index.html", rendered(template, content, number=_number))
    folder.json("claims.json", [{"claim": c.name, "text": c.text, "verdict": c.verdict, "why": c.why} for c in claims])


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
    rows = []
    for name in names(config):
        scores, trained = folder.read_arrays(f"scores/{name}.safetensors"), folder.read_json(f"training/{name}.json")
        measured = {"test_nll": float(scores["test_nll"]), "bleu": float(scores["bleu"])}
        rows.append({"name": name, "steps": trained["steps"], **measured})
    return rows


def _nulls(config: StudyConfig, sets: Sets, examples: Examples) -> list[dict[str, Any]]:
    """Test that the forget examples are like non-members to the model retrained without them, as they must be."""
    rows = []
    for kind in config.kinds:
        test = exposure_null_test(retrained_exposures(sets, examples, kind), config.non_members)
        rows.append({"kind": kind, "mean": test.mean, "statistic": test.statistic, "pvalue": test.pvalue, "n": test.n})
    return rows


def _run(o: Outcome, sets: Sets, examples: Examples) -> dict[str, Any]:
    """Return a run's row: its start, and where its mean anchored exposure is first that of unseen text, or its end."""
    lower, current = o.lower["anchored raw"], o.lower["current raw"]
    below = lower.mean(1) <= NULL_MEAN
    at = int(below.argmax()) if below.any() else len(o.steps) - 1
    raw, calibrated = o.forgotten("anchored raw"), o.forgotten("anchored calibrated")
    retrained = generalized_exposure(
        examples.at(examples.retrained, o.indices),
        examples.at(examples.retrained, sets.non_members[o.which.kind]),
    ).lower
    distance = exposure_two_sample_test(current[at], retrained, draws=500)
    bleu = [b for b in o.bleu[: at + 1].tolist() if math.isfinite(b)]
    return {
        "which": o.which,
        "rate": o.rate,
        "start": float(lower[0].mean()),
        "nll": float(o.nll[0].mean()),
        "median": median_steps(*raw),
        "median_calibrated": median_steps(*calibrated),
        "censored": float(raw.censored.mean()),
        "reached": bool(below.any()),
        "step": int(o.steps[at]),
        "anchored": float(lower[at].mean()),
        "current": float(current[at].mean()),
        "over": float((o.upper["anchored raw"][at] >= SIGNIFICANT).mean()),
        "rise": float(o.rise[at]),
        "bleu": bleu[0] - bleu[-1] if len(bleu) > 1 else float("nan"),
        "drift": float(o.drift[at]),
        "away": float(o.from_retrained[at]),
        "non_members_away": float(o.non_members_from_retrained[at]),
        "distance": distance.statistic,
        "pvalue": distance.pvalue,
    }


def _number(x: Any, digits: int = 2) -> str:
    if x is None or (isinstance(x, float) and math.isnan(x)):
        return "–"
    if isinstance(x, float) and math.isinf(x):
        return "never"
    return f"{np.round(x, digits) + 0.0:.{digits}f}"
