"""Record the settings with which a comparison was made, and refuse a folder whose rows were made with others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pyunlearn.comparing.config import CompareConfig
from pyunlearn.comparing.result import Comparison
from pyunlearn.edits.masks import digest_of
from pyunlearn.errors import OutputError
from pyunlearn.models.harness import task_settings
from pyunlearn.options import shown
from pyunlearn.output import model_name, versions


def record_of(config: CompareConfig, names: list[str], model: Any, reference_model: Any) -> dict[str, Any]:
    """Return the settings as result.json holds them: masks, texts and long lists as their SHA-256."""
    record = {name: digested(getattr(config, name)) for name in config.options() if name != "mask"}
    record |= versions() | {"mask": digest_of(config.mask), "methods": names}
    record |= {"model": model_name(model), "reference_model": model_name(reference_model)}
    own = {name: dict(options) for name, options in (config.method_options or {}).items() if options}
    record["method_options"] = {
        method: {name: _digest(value) if name == "winners" else digested(value) for name, value in options.items()}
        for method, options in own.items()
    }  # winners are texts
    return record | task_settings(config.tasks)


def digested(value: Any) -> Any:
    """Return a value as `pyunlearn.options.shown` does where that is the whole of it, else its type and SHA-256.

    >>> digested([0.5, 2.0])
    [0.5, 2.0]
    >>> digested([[0.5], [2.0, 1.0]])
    'list, SHA-256 6fb6dba5f89ef915'
    """
    short = shown(value)
    return short if _json(short) == _json(value) else _digest(value)


def _digest(value: Any) -> str:
    return f"{type(value).__name__}, SHA-256 {hashlib.sha256(_json(value).encode()).hexdigest()[:16]}"


def _json(value: Any) -> str:
    """Return JSON in which arrays and tensors are lists."""
    return json.dumps(value, sort_keys=True, default=lambda x: x.tolist() if hasattr(x, "tolist") else str(x))


def require_same(saved: Comparison, now: Comparison, folder: Path) -> None:
    """Raise OutputError unless the saved comparison was made with these texts, these models and these settings.

    Options of single methods must be those of their rows; of a method that is not asked for now, none are known.
    """
    free = {*versions(), "methods", "method_options"}
    difference = settings_difference(saved.settings, {k: v for k, v in now.settings.items() if k not in free})
    texts = {role: scores for role, scores in now.scores.items() if role != "reference_model"}
    difference = difference or scores_difference(saved.scores, texts)
    if difference is None and scores_difference(saved.scores, now.scores):
        difference = "another reference_model"
    difference = difference or _other_task(saved, now) or _other_options(saved, now)
    if difference is not None:
        raise OutputError(f"the comparison in {folder} was made with {difference}: give the same, or another folder")


def settings_difference(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return the first setting in which a saved run differs, ready for "it was made with ...", or None.

    >>> settings_difference({"tau": 0.95, "seed": 0}, {"tau": 0.9, "seed": 0})
    'tau=0.95, not 0.9'
    """
    values = json.loads(json.dumps(now))  # tuples as lists, as they were read back
    return next((f"{k}={saved.get(k)!r}, not {v!r}" for k, v in values.items() if saved.get(k) != v), None)


def scores_difference(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return the first role whose scores differ by more than rounding, ready for "it was made with ...", or None.

    Args:
        saved: role -> (n,) scores under the model, one for each text, of the saved run.
        now: the same of this run.
    """
    for role, scores in now.items():
        before = saved.get(role, [])
        if len(before) != len(scores) or not np.allclose(before, scores, rtol=1e-4):
            return f"another model or other {role.replace('_', '-')} texts"
    return None


def _other_task(saved: Comparison, now: Comparison) -> str | None:
    """Return a task whose number under the original differs, ready for "it was made with ...", or None."""
    known = {(x.task, x.metric): x for x in saved.original.tasks}
    for score in now.original.tasks:
        before, number = known.get((score.task, score.metric)), score.now.estimate
        same = before is not None and before.documents == score.documents
        if before is None or not same or not np.isclose(before.now.estimate, number, rtol=1e-3, equal_nan=True):
            return f"other documents of the task {score.task}"
    return None


def _other_options(saved: Comparison, now: Comparison) -> str | None:
    """Return a method whose row was made with other options, ready for "it was made with ...", or None."""
    for row in saved.rows:
        options = now.settings["method_options"].get(row.method, {})
        if row.done and row.method in now.settings["methods"] and _json(row.method_options) != _json(options):
            return f"the options {row.method_options} of {row.method}, not {options}"
    return None
