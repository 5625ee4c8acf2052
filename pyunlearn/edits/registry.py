"""The edits by name: what each needs, its options, and how one is made from words, as on the command line."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pyunlearn import models
from pyunlearn.data import read_examples
from pyunlearn.edits.base import EditResult
from pyunlearn.edits.dampening import selective_synaptic_dampening
from pyunlearn.edits.ekfac import ekfac_step
from pyunlearn.edits.fisher import fisher_step
from pyunlearn.edits.influence import first_order_influence, second_order_influence
from pyunlearn.edits.lunar import lunar
from pyunlearn.edits.prune import prune
from pyunlearn.edits.smoothing import zero_shot_smoothing
from pyunlearn.edits.task_vector import task_vector
from pyunlearn.edits.woodfisher import woodfisher_step
from pyunlearn.errors import ArgumentError, nearest

_SHARED = ("model", "forget", "retain", "tokenizer", "batch_size", "truncate", "workspace", "seed", "progress")


class Edit(NamedTuple):
    """An edit: the function of `pyunlearn.edits` that bears its name, and what must be given besides model and forget."""

    function: Callable[..., EditResult]
    needs: tuple[str, ...]
    source: str

    @property
    def options(self) -> dict[str, Any]:
        """name -> default, of its own options; for one that must be given, None."""
        every = inspect.signature(self.function).parameters
        return {
            n: None if p.default is inspect.Parameter.empty else p.default for n, p in every.items() if n not in _SHARED
        }


EDITS = {
    edit.function.__name__: edit
    for edit in (
        Edit(ekfac_step, ("retain",), "arXiv 2308.03296"),
        Edit(first_order_influence, (), "arXiv 2108.11577"),
        Edit(fisher_step, ("retain",), "arXiv 2304.04934"),
        Edit(lunar, ("retain",), "arXiv 2502.07218"),
        Edit(prune, (), "arXiv 2304.04934, 2306.11695"),
        Edit(second_order_influence, ("retain",), "arXiv 2108.11577"),
        Edit(selective_synaptic_dampening, ("retain",), "arXiv 2308.07707"),
        Edit(task_vector, ("fine_tuned",), "arXiv 2212.04089"),
        Edit(woodfisher_step, ("retain",), "arXiv 2004.14340"),
        Edit(zero_shot_smoothing, (), "arXiv 2402.01401"),
    )
}


def edit_named(name: str) -> Edit:
    """The edit of that name, with - or _. Raises ArgumentError for another."""
    known = name.replace("-", "_")
    if known not in EDITS:
        raise ArgumentError(f"unknown edit {name!r}: {nearest(known, EDITS)}")
    edit = EDITS[known]

    @functools.wraps(edit.function)
    def function(*given: Any, config: Any, **options: Any) -> EditResult:
        return edit.function(*given, **vars(config), **options)

    return edit._replace(function=function)


def parse_edit_options(edit: Edit, words: Sequence[str]) -> dict[str, Any]:
    """name=value words as options, each in its type. Raises ArgumentError for one that the edit does not have, or that is missing."""
    name, found = edit.function.__name__, {}
    for word in words:
        key, equals, value = word.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            raise ArgumentError(f"an option is set as name=value, got {word!r}")
        if key not in edit.options:
            raise ArgumentError(f"{name} has no option {key!r}: {nearest(key, edit.options)}")
        found[key] = _value(f"{name}'s {key}", edit.function.__annotations__[key], value.strip())
    for key in edit.needs:
        if key not in (*_SHARED, *found):
            raise ArgumentError(f"{name} needs {key}: set {key}=...")
    if "fine_tuned" in found:
        found["fine_tuned"], _ = models.load(found["fine_tuned"])
    if "corrected" in found:
        found["corrected"] = Path(found["corrected"])
    if isinstance(found.get("unanswerable"), str):
        asked = read_examples(Path(found["unanswerable"]), role="unanswerable")
        found["unanswerable"] = [e.messages[0].content if e.messages else e.completion for e in asked]
    return found


def _value(what: str, annotation: str, word: str) -> Any:
    if "bool" in annotation:
        if word.lower() not in ("true", "false"):
            raise ArgumentError(f"{what} must be true or false, got {word!r}")
        return word.lower() == "true"
    if word.lower() == "none" and "None" in annotation:
        return None
    if "int" in annotation or "float" in annotation:
        try:
            return (int if "int" in annotation else float)(word)
        except ValueError:
            raise ArgumentError(
                f"{what} must be a {'whole ' if 'int' in annotation else ''}number, got {word!r}"
            ) from None
    return word


options_of = parse_edit_options
