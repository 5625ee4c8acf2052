"""Results as files and as JSON: model names, versions, plain values, folders written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from pyunlearn.errors import OutputError
from pyunlearn.models.language_model import LanguageModel


def model_name(model: Any) -> str | None:
    """Return the name of a model for a report, without the folder that it lies in, since reports are passed on.

    >>> model_name("/home/user/my-model"), model_name("org/name"), model_name(None)
    ('my-model', 'org/name', None)
    """
    if model is None:
        return None
    if isinstance(model, (str, Path)):
        name = str(model)
    else:
        inner = LanguageModel.of(model, needs_tokenizer=False).inner
        name = str(getattr(inner, "name_or_path", "") or type(inner).__name__)
    return Path(name).name if Path(name).is_absolute() else name


def shown(value: Any) -> Any:
    """Return an argument as JSON shows it: its value, the beginning of a long text, or the name of its type.

    >>> shown(3), shown([1, 2])
    (3, 'list')
    """
    if isinstance(value, (str, Path)):
        text = str(value)
        return text if len(text) <= 200 else text[:200] + "..."
    return value if isinstance(value, (int, float, bool, dict, type(None))) else type(value).__name__


def plain_json(value: Any) -> Any:
    """Return a value as JSON takes it: dataclasses and named tuples become dicts, infinity and NaN None.

    >>> plain_json({"interval": (0.5, float("inf"))})
    {'interval': [0.5, None]}
    """
    if is_dataclass(value):
        return {f.name: plain_json(getattr(value, f.name)) for f in fields(value)}
    if hasattr(value, "_asdict"):
        return {name: plain_json(part) for name, part in value._asdict().items()}
    if isinstance(value, dict):
        return {name: plain_json(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    """Return the versions of the packages that the numbers depend on."""
    from pyunlearn import __version__

    return {"pyunlearn": __version__, "torch": torch.__version__}


def save_folder(directory: str | Path, model: Any, tokenizer: Any, name: str, content: dict[str, Any]) -> Path:
    """Write a model, its tokenizer and one JSON file into an empty or new directory; all of it or nothing.

    Args:
        directory: the folder.
        model: a transformers model.
        tokenizer: the model's, or None.
        name: of the JSON file.
        content: of the JSON file.

    Raises OutputError when the directory is not empty or cannot be written.
    """
    target = check_output(directory)
    mount = target.is_mount()  # cannot be replaced, only filled
    partial = (target / ".partial") if mount else target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        (partial / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if mount:
            for part in sorted(partial.iterdir()):
                part.replace(target / part.name)
        else:
            if target.exists():
                target.rmdir()
            partial.replace(target)
    except OSError as error:
        raise OutputError(f"the result could not be written to {target}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def check_output(directory: str | Path) -> Path:
    """Return the directory as a path, if it is new or empty. Raises OutputError otherwise."""
    path, target = Path(directory), Path(directory).resolve()
    if target.exists() and not target.is_dir():
        raise OutputError(f"the output folder {path} is a file: choose another name")
    if target.is_dir() and any(target.iterdir()):
        raise OutputError(f"the output folder {path} is not empty: choose another, or empty it first")
    return target
