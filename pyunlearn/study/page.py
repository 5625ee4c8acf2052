"""The page of a study: a verdict on each claim, the comparisons behind it, figures and numbers. Nothing is fetched."""

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
from pyunlearn.study.figures import FIGURES, NAMES, retrained_exposures
from pyunlearn.study.folder import Folder
from pyunlearn.study.old_config import Config
from pyunlearn.study.outcomes import Examples, Outcome
from pyunlearn.study.reference_models import names
from pyunlearn.study.sets import Sets

TONES = {"supported": "good", "not supported": "bad", "undecided": "plain"}


def write_page(
    folder: Folder, config: Config, sets: Sets, examples: Examples, outcomes: Sequence[Outcome], claims: Sequence[Claim]
) -> None:
    """index.html, and claims.json with the verdicts."""
    content = {
        "config": config.to_json(), "claims": claims, "tones": TONES, "small": SMALL, "names": NAMES, "figures": _drawings(folder),
        "models": _models(folder, config), "nulls": _nulls(config, sets, examples), "runs": [_run(o, sets, examples) for o in outcomes],
        "environment": folder.read_json("environment.json"), "background": len(sets.background),
    }  # fmt: skip
    template = Path(__file__).parent / "templates" / "study.html"
    folder.text("index.html", rendered(template, content, number=_number))
    folder.json("claims.json", [{"claim": c.name, "text": c.text, "verdict": c.verdict, "why": c.why} for c in claims])


def _drawings(folder: Folder) -> list[tuple[str, str, str]]:
    """(name, svg, caption). The drawings' ids must differ on one page."""
    found = []
    for number, (name, caption) in enumerate(FIGURES.items()):
        svg = (folder.path / f"figures/{name}.svg").read_text(encoding="utf-8")
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>f{number}-", svg)
        found.append((name, re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S), caption))
    return found


def _models(folder: Folder, config: Config) -> list[dict[str, Any]]:
    found = []
    for name in names(config):
        scores, trained = folder.read_arrays(f"scores/{name}.npz"), folder.read_json(f"training/{name}.json")
        found.append(
            {
                "name": name,
                "steps": trained["steps"],
                "test_nll": float(scores["test_nll"]),
                "bleu": float(scores["bleu"]),
            }
        )
    return found


def _nulls(config: Config, sets: Sets, examples: Examples) -> list[dict[str, Any]]:
    """Whether the model retrained without them finds the forget examples like the references, as it must."""
    found = []
    for kind in config.kinds:
        test = exposure_null_test(retrained_exposures(sets, examples, kind), config.references)
        found.append({"kind": kind, "mean": test.mean, "statistic": test.statistic, "pvalue": test.pvalue, "n": test.n})
    return found


def _run(o: Outcome, sets: Sets, examples: Examples) -> dict[str, Any]:
    """A run in a row: where it began, and where its mean anchored exposure first was that of unseen text, or at its end."""
    lower, now = o.lower["anchored raw"], o.lower["current raw"]
    there = lower.mean(1) <= NULL_MEAN
    at = int(there.argmax()) if there.any() else len(o.steps) - 1
    taken, calibrated = o.forgotten("anchored raw"), o.forgotten("anchored calibrated")
    unseen = sets.references[o.which.kind]
    retrained = generalized_exposure(
        examples.at(examples.retrained, o.places), examples.at(examples.retrained, unseen)
    ).lower
    two = exposure_two_sample_test(now[at], retrained, draws=500)
    bleu = [b for b in o.bleu[: at + 1].tolist() if math.isfinite(b)]
    return {
        "which": o.which, "rate": o.rate, "start": float(lower[0].mean()), "nll": float(o.nll[0].mean()), "median": median_steps(*taken),
        "median_calibrated": median_steps(*calibrated), "censored": float(taken.censored.mean()), "reached": bool(there.any()), "step": int(o.steps[at]),
        "anchored": float(lower[at].mean()), "current": float(now[at].mean()), "over": float((o.upper["anchored raw"][at] >= SIGNIFICANT).mean()),
        "rise": float(o.rise[at]), "bleu": bleu[0] - bleu[-1] if len(bleu) > 1 else float("nan"), "drift": float(o.drift[at]),
        "away": float(o.from_retrained[at]), "references_away": float(o.references_from_retrained[at]), "distance": two.statistic, "pvalue": two.pvalue,
    }  # fmt: skip


def _number(x: Any, digits: int = 2) -> str:
    if x is None or (isinstance(x, float) and math.isnan(x)):
        return "–"
    if isinstance(x, float) and math.isinf(x):
        return "never"
    return f"{np.round(x, digits) + 0.0:.{digits}f}"
