"""The table of edits by name: where each function is, what it needs, and its options parsed from text."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pyunlearn.edits.config import EditConfig
from pyunlearn.errors import ArgumentError, nearest

if TYPE_CHECKING:  # loaded at first use: the names can be listed without torch
    from pyunlearn.edits.base import EditResult

_SHARED = ("model", "forget", "retain", "tokenizer", "progress", "config", *EditConfig.options())


class Edit(NamedTuple):
    """An edit: its function, what it needs in addition to model and forget, and its source.

    `name`    of the function in `pyunlearn.edits`
    `module`  of the file of the function in pyunlearn/edits
    `needs`   the optional arguments without which it cannot work
    `source`  the papers
    """

    name: str
    module: str
    needs: tuple[str, ...]
    source: str

    @property
    def function(self) -> Callable[..., EditResult]:
        """Function in `pyunlearn.edits` that makes the edit; imported at first use."""
        function: Callable[..., EditResult] = getattr(
            importlib.import_module(f"pyunlearn.edits.{self.module}"), self.name
        )
        return function

    @property
    def options(self) -> dict[str, Any]:
        """Options of this edit alone, as name -> default; None for a required one."""
        parameters = inspect.signature(self.function).parameters
        return {
            name: None if p.default is inspect.Parameter.empty else p.default
            for name, p in parameters.items()
            if name not in _SHARED
        }


_ROWS = (
    Edit("ekfac_step", "ekfac", ("retain",), "arXiv 2308.03296"),
    Edit("first_order_influence", "influence", (), "arXiv 2108.11577"),
    Edit("fisher_step", "fisher", ("retain",), "arXiv 2304.04934"),
    Edit("lunar", "lunar", ("retain",), "arXiv 2502.07218"),
    Edit("prune", "prune", (), "arXiv 2304.04934, 2306.11695"),
    Edit("second_order_influence", "influence", ("retain",), "arXiv 2108.11577"),
    Edit("selective_synaptic_dampening", "dampening", ("retain",), "arXiv 2308.07707"),
    Edit("task_vector", "task_vector", ("fine_tuned",), "arXiv 2212.04089"),
    Edit("woodfisher_step", "woodfisher", ("retain",), "arXiv 2004.14340"),
    Edit("zero_shot_smoothing", "smoothing", (), "arXiv 2402.01401"),
)

EDITS = {row.name: row for row in _ROWS}
"""name -> Edit. To add an edit, add a row above: docs/contributing/add-an-edit.md."""


def edit_named(name: str) -> Edit:
    """Return the edit of that name, written with - or _. Raises ArgumentError for an unknown name.

    >>> edit_named("fisher-step").source
    'arXiv 2304.04934'
    """
    known = name.replace("-", "_") if isinstance(name, str) else str(name)
    if known not in EDITS:
        raise ArgumentError(f"unknown edit {name!r}: {nearest(known, EDITS)}")
    return EDITS[known]


def parse_edit_options(edit: Edit, words: Sequence[str]) -> dict[str, Any]:
    """Return the options in name=value words, each in the type of the function's annotation.

    Words for an option that is no number, truth value or string are paths, for the function to read.

    >>> parse_edit_options(EDITS["fisher_step"], ["rate=0.02", "training-texts=none"])
    {'rate': 0.02, 'training_texts': None}

    Raises ArgumentError for an option that the edit does not have, a value of another type, or a required option that
    is missing.
    """
    options: dict[str, Any] = {}
    annotations = edit.function.__annotations__
    for word in words:
        name, equals, value = word.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise ArgumentError(f"an option is set as name=value, got {word!r}")
        if name not in edit.options:
            raise ArgumentError(f"{edit.name} has no option {name!r}: {nearest(name, edit.options)}")
        options[name] = _parse(f"{edit.name}'s {name}", annotations[name], value.strip())
    for name in edit.needs:
        if name not in (*_SHARED, *options):
            raise ArgumentError(f"{edit.name} needs {name}: set {name}=...")
    return options


def _parse(what: str, annotation: str, word: str) -> Any:
    """Return a word as a value of an annotated type; `what` names the option in the message of an ArgumentError."""
    kind = annotation.removesuffix(" | None")
    if word.lower() == "none" and kind != annotation:
        return None
    if kind == "bool":
        if word.lower() not in ("true", "false"):
            raise ArgumentError(f"{what} must be true or false, got {word!r}")
        return word.lower() == "true"
    if kind in ("int", "float"):
        try:
            return int(word) if kind == "int" else float(word)
        except ValueError:
            whole = "whole " if kind == "int" else ""
            raise ArgumentError(f"{what} must be a {whole}number, got {word!r}") from None
    return word if kind == "str" else Path(word)
