"""The public surface, the one-way order of imports, and the documents that must keep up with them."""

import __future__

import importlib
import importlib.util
import inspect
import pkgutil
import re
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pyunlearn"
PACKAGES = ["pyunlearn"] + [f"pyunlearn.{m.name}" for m in pkgutil.iter_modules([str(PACKAGE)]) if m.ispkg]
INNER = (
    "auditing",
    "benchmarking",
    "cli",
    "comparing",
    "data",
    "models",
    "report",
    "unlearning",
)  # users import pyunlearn instead
FILES = sorted(PACKAGE.rglob("*.py"))


def in_order(names):
    """As ruff (RUF022) sorts them: CONSTANTS, Classes, functions."""
    return sorted(names, key=lambda n: (0 if n.isupper() else 1 if n[0].isupper() else 2, n))


def public(module):
    """Names without an underscore that are neither modules nor what `from __future__ import` leaves."""
    left = (types.ModuleType, __future__._Feature)
    there = {n: getattr(module, n) for n in dir(module)}
    own = (n for n, v in there.items() if not n.startswith("_") and not isinstance(v, left))
    return in_order(n for n in own if n not in ("TYPE_CHECKING", "Any"))


def is_a_module(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("name", PACKAGES)
def test_all_is_exactly_the_sorted_public_names(name):
    """The contents page of a package lists what it offers, and offers what it lists."""
    module = importlib.import_module(name)
    assert module.__all__ == in_order(module.__all__)
    assert module.__all__ == public(module)


@pytest.mark.parametrize("name", ["errors", "data.examples", "data.tokens", "unlearning.in_context"])
def test_all_of_a_module_is_sorted_and_there(name):
    """Modules that say what is public say it truly: everything defined there without an underscore."""
    module = importlib.import_module(f"pyunlearn.{name}")
    assert module.__all__ == in_order(module.__all__)
    own = {n for n in public(module) if getattr(getattr(module, n), "__module__", None) == module.__name__}
    assert own <= set(module.__all__)
    assert all(hasattr(module, n) for n in module.__all__)


@pytest.mark.parametrize("name", PACKAGES)
def test_everything_public_has_a_docstring(name):
    """Each function and class; where a docstring has an Args section, it names each argument."""
    module = importlib.import_module(name)
    for n in module.__all__:
        thing = getattr(module, n)
        if inspect.isfunction(thing) or inspect.isclass(thing):
            assert inspect.getdoc(thing), n
        if inspect.isfunction(thing) and "Args:" in thing.__doc__:
            assert all(re.search(rf"\b{p}\b", thing.__doc__) for p in inspect.signature(thing).parameters), n


# ---------------------------------------------------------------- size


@pytest.mark.parametrize("folder", ["pyunlearn", "csrc", "benchmarks"])
def test_no_file_is_longer_than_400_lines(folder):
    """So that each can be read."""
    kinds = {".py", ".cpp", ".h", ".cu", ".cuh"}
    sizes = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / folder).rglob("*") if path.suffix in kinds
    }  # fmt: skip
    assert sizes
    assert not {path: lines for path, lines in sizes.items() if lines > 400}


@pytest.mark.parametrize("name", ["unlearn", "audit", "compare", "bench"])
def test_no_module_is_hidden_behind_a_function(name):
    """`import pyunlearn.unlearn` is an error, not a function under a module's name."""
    assert callable(getattr(importlib.import_module("pyunlearn"), name))
    assert importlib.util.find_spec(f"pyunlearn.{name}") is None
