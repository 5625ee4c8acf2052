"""What the caller gave: texts made ready for a model, and how a result speaks of model, settings and versions."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from pyunlearn.errors import OutputError
from pyunlearn.models.language_model import LanguageModel


def model_name(model: Any) -> str | None:
    """How a report calls a model: not where it lies on this machine, for reports are passed on."""
    if model is None:
        return None
    inner = None if isinstance(model, (str, Path)) else LanguageModel.of(model, needs_tokenizer=False).inner
    where = str(model) if inner is None else str(getattr(inner, "name_or_path", "") or type(inner).__name__)
    return Path(where).name if Path(where).is_absolute() else where


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    from pyunlearn import __version__

    return {"pyunlearn": __version__, "torch": torch.__version__}


def save_folder(directory: str | Path, model: Any, tokenizer: Any, name: str, content: dict[str, Any]) -> Path:
    """Writes a model, its tokenizer and one JSON file into an empty or new directory; all of it or nothing.

    Raises OutputError when the directory holds something already or cannot be written.
    """
    target = check_output(directory)
    mount = target.is_mount()  # cannot be replaced, only filled
    beside = (target / ".partial") if mount else target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        beside.mkdir(parents=True)
        model.save_pretrained(beside)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        (beside / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if mount:
            for part in sorted(beside.iterdir()):
                part.replace(target / part.name)
        else:
            if target.exists():
                target.rmdir()
            beside.replace(target)
    except OSError as error:
        raise OutputError(f"the result could not be written to {target}: {error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def check_output(directory: str | Path) -> Path:
    """The directory as a path, if it is new or empty. Raises OutputError otherwise."""
    given, target = Path(directory), Path(directory).resolve()
    if target.exists() and not target.is_dir():
        raise OutputError(f"the output folder {given} is a file: choose another name")
    if target.is_dir() and any(target.iterdir()):
        raise OutputError(f"the output folder {given} is not empty: choose another, or empty it first")
    return target
