"""Model card of an unlearned model: the numbers behind its verdict, and nothing of the forget texts."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

import numpy as np

from pyunlearn.models.hub import is_repository_name

TAGS = ("machine-unlearning", "pyunlearn")
UNLEARNED = "unlearned"
"""A further tag, where all that was memorized is forgotten."""

_BASIS = {
    "holdout": "text of the same kind that was not trained on",
    "reference model": "a reference model that never saw the texts",
    "unseen texts": "texts that were written for this comparison",
    "self-sampled": "text that the model wrote itself, which cannot show that a text is forgotten",
}


def model_card(model: Any, result: Mapping[str, Any]) -> str:
    """Return the model card of an unlearned model, Markdown with the metadata of the Hugging Face hub in front.

    Args:
        model: the unlearned model.
        result: `Result.to_dict()`, of which the texts are not read.
    """
    settings, notes = result["settings"], "".join(f"- {note}\n" for note in result["notes"])
    base, adapter = _base_model(model, settings), hasattr(model, "peft_config")
    unlearned = result["forgotten"]
    tags = [*([UNLEARNED] if unlearned else []), *TAGS]
    head: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "tags": tags}
    if base is not None and _is_hub_name(base):
        head |= {"base_model": base}
    notes += "\n" if notes else ""
    front = "".join(f"{name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in head.items())
    rows = "".join(f"| {name} | {value} |\n" for name, value in _rows(result))
    limit = ", unless the row *under attack* says so" if result["attack"] else ""
    others = sum(bool(e.get("form")) for e in result["examples"])
    tried = f", the same of {_counted(others, 'other form')} of the texts" if others else ""
    doubt = (
        f"It does not mean\nthat {'other ' if others else ''}paraphrases, translations or knowledge about the text are "
        f"gone, nor that fine-tuning cannot bring it back{limit}."
    )
    shown = base if base is None or _is_hub_name(base) else Path(base).name
    title, source = ("A model", "a language model") if shown is None else (Path(shown).name, f"`{shown}`")
    return f"""---
{front}---

# {title}, after unlearning

Training examples were {"" if unlearned else "to be "}removed from {source} with {_program()}
{settings["pyunlearn"]}, method `{settings["method_used"]}`, weights in {settings["weights"]}. This card holds nothing
of their text.

| | |
|---|---|
{rows}
{notes}*Forgotten* means no more likely than text that was not trained on, and no more of it extracted{tried}. {doubt}
"""


def _program() -> str:
    """Return the name of this package, with a link to its repository where it is installed."""
    try:
        urls = dict(each.split(", ", 1) for each in metadata("pyunlearn").get_all("Project-URL") or ())
    except PackageNotFoundError:
        urls = {}
    return f"[pyunlearn]({urls['Repository']})" if "Repository" in urls else "pyunlearn"


def _rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return name and value of each row of the table."""
    examples, utility = result["examples"], result["utility"]
    verdicts = Counter(e["verdict"] for e in examples).most_common()
    others = sum(bool(e.get("form")) for e in examples)
    size = _counted(len(examples) - others, "text")
    size += f" and {_counted(others, 'other form')} of them" if others else ""
    rows = [
        ("forget set", f"{size}, {_counted(sum(e['tokens'] for e in examples), 'token')}"),
        ("verdicts", ", ".join(f"{count} {verdict}" for verdict, count in verdicts)),
        ("compared with", _BASIS.get(result["evidence"], result["evidence"])),
    ]
    if trained := [(e["exposure_before"], e["exposure_after"]) for e in examples if e["steps"]]:
        before, after = (float(np.mean(each)) for each in zip(*trained, strict=True))
        exposure = f"{before:.2f} bits before, {after:.2f} after ({1 / math.log(2):.2f} of unseen text)"
        rows.append((f"mean exposure of {_counted(len(trained), 'text')} that the run worked on", exposure))
    interval = "" if utility["interval"] is None else ", 95 % interval {:+.1%} to {:+.1%}".format(*utility["interval"])
    cost = (
        f"{utility['nll_before']:.3f} nats a token before, {utility['nll_after']:.3f} after "
        f"({utility['relative_rise']:+.1%}{interval}; at most {utility['budget']:.1%} allowed)"
    )
    rows.append((f"utility: {utility['measured_on']}, {utility['sequences']} texts", cost))
    if result["attack"]:
        rows.append(("under attack", result["attack"]["headline"]))
    return [*rows, ("the run ended", result["stopped"])]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _base_model(model: Any, settings: Mapping[str, Any]) -> str | None:
    """Return the name of the model that was unlearned; of an adapter, of the model under it."""
    configs = list(getattr(model, "peft_config", {}).values())
    name = configs[0].base_model_name_or_path if configs else settings.get("model")
    return None if not name else str(Path(name).name if Path(name).is_absolute() else name)


def _is_hub_name(name: str) -> bool:
    """Return whether a name can only be one on the hub: ORGANIZATION/NAME, and no such path here."""
    return "/" in name and is_repository_name(name) and not Path(name).exists()
