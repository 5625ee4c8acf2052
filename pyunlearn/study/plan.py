"""study.yaml: what a study will do and how it decides, written and hashed before any model is trained or read."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pyunlearn.errors import OutputError
from pyunlearn.study.claims import CLAIMS, LEAST_STEP, decided_claims
from pyunlearn.study.config import OUTSIDE, StudyConfig
from pyunlearn.study.decisions import FEWEST_SEEDS, LEVEL
from pyunlearn.study.folder import Folder
from pyunlearn.study.outcomes import CRITERIA, FIRST, RETRAINED
from pyunlearn.study.runs import DESTROYED, measured_steps

FILE = "study.yaml"
_UNITS = {
    "unit": "seed: one model with its own initial weights, order of the data and forget sets",
    "retrained models of a set": "the models of the other seeds, none of which saw it",
    "split of these": "first, third, ... calibrate; second, fourth, ... measure difficulty and memorization",
}
_UNITS_OF_TWINS = {
    "unit": "seed: a draw of disjoint forget sets from the texts of one pair of models, not a model of its own",
    "retrained model of a set": "the twin, which saw none of the texts: it calibrates, and measures difficulty and "
    "memorization",
    "non-members": "texts of dose 0",
}
FREE = ("show_text", "processes")
"""Settings that change no number, and may differ when a study is resumed."""


def write_plan(folder: Folder, config: StudyConfig, data: dict[str, Any]) -> str:
    """Write study.yaml, unless it is there, and return the first 16 digits of its SHA-256.

    Args:
        folder: of the study.
        config: its settings.
        data: the digests of the corpora, and the numbers of examples made of them.

    Raises OutputError where the file in the folder says something else, or is gone though models or scores are there.
    """
    claims = decided_claims(config)
    settings = {name: value for name, value in config.to_dict().items() if name not in FREE}
    content = _yaml(
        {
            "question": "Is text in distribution harder to unlearn than text out of distribution, and at what price?",
            "paper": "arXiv 2411.04388",
            "settings": settings,
            "data": data,
            "design": {
                **(_UNITS if config.twin is None else _UNITS_OF_TWINS),
                "forgotten": f"first interpolated step where the set's mean NLL reaches the {CRITERIA[RETRAINED]}",
                "least step in logarithms": LEAST_STEP,
                "a seed with a set that is never forgotten, or with two that left no trace": "no number: undecided",
                "speed": f"mean rise of the NLL to the step at which the set is forgotten, {FIRST} at most; of an "
                "example at least 1/16 of its set's mean",
                "measured at steps": measured_steps(config.steps),
                "a run ends": f"after the last of these, or where the test NLL has risen by {DESTROYED:g} nats",
                "learning rate that decides": config.unlearning_rates[0],
                "kind that decides": OUTSIDE if OUTSIDE in config.kinds else "none: no claim compares kinds",
            },
            "estimands": {name: CLAIMS[name]._asdict() for name in claims},
            "decision": {
                "test": f"two-sided one-sample t over seeds, Holm over {len(claims)} claims; TOST against the margin",
                "level": LEVEL,
                "no material difference": "both one-sided tests against the margin are significant",
                "supported or contradicted": "otherwise, where the two-sided test is significant after Holm",
                "fewest seeds": FEWEST_SEEDS,
                "further kinds": "decided apart, Holm over the three claims that compare kinds",
                "other criteria, doses and rates": "shown as sensitivity, without a vote",
            },
        }
    )
    if not folder.has(FILE):
        if folder.has("models") or folder.has("scores"):
            raise OutputError(
                f"{folder.path / FILE} is gone, and models were trained or read after it: put it back, or choose "
                "another folder"
            )
        folder.text(FILE, content)
    elif (folder.path / FILE).read_text(encoding="utf-8") != content:
        raise OutputError(
            f"{folder.path / FILE} is not what this study would write: it was changed, or written by another version "
            "of pyunlearn; choose another folder"
        )
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _yaml(content: dict[str, Any], indent: str = "") -> str:
    """Return nested dicts as YAML: every other value is written as JSON, which YAML reads."""
    lines = []
    for key, value in content.items():
        if isinstance(value, dict):
            lines.append(f"{indent}{key}:\n{_yaml(value, indent + '  ')}")
        else:
            lines.append(f"{indent}{key}: {json.dumps(value, ensure_ascii=False)}\n")
    return "".join(lines)
