"""The public surface, the one-way order of imports, and the documents that must keep up with them."""

import __future__

import ast
import importlib
import inspect
import pkgutil
import re
import types
from pathlib import Path

import pytest
import tiny
import torch
import typer

import pyunlearn
from pyunlearn.auditing import config, result
from pyunlearn.cli import main as cli

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pyunlearn"
PACKAGES = ["pyunlearn"] + [f"pyunlearn.{m.name}" for m in pkgutil.iter_modules([str(PACKAGE)]) if m.ispkg]
INNER = ("auditing", "cli", "comparing", "data", "models", "report", "unlearning")  # users import pyunlearn instead
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


# ---------------------------------------------------------------- documents


def documents():
    return "\n".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    )


def test_every_command_and_public_name_is_in_the_documents():
    """Documents cannot rot unseen."""
    text = documents()
    outer = [package for package in PACKAGES if package.split(".")[-1] not in INNER]
    names = {n for package in outer for n in importlib.import_module(package).__all__}
    missing = sorted(n for n in names if not re.search(rf"\b{n}\b", text))
    missing += [n for n in typer.main.get_command(cli.app).commands if f"pyunlearn {n}" not in text]
    assert not missing, f"neither README.md nor docs/ mentions {', '.join(missing)}"


def test_every_option_is_in_the_reference():
    """Arguments of `unlearn` by name, and the fields of what it returns."""
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    names = [*inspect.signature(pyunlearn.unlearn).parameters, *pyunlearn.ExampleResult.__annotations__]
    names += [*pyunlearn.Utility.__annotations__, *pyunlearn.Result.__annotations__]
    names += [*inspect.signature(pyunlearn.audit).parameters, *config.METRICS]
    for kind in vars(result).values():
        if inspect.isclass(kind) and kind.__module__ == result.__name__:
            names += kind.__annotations__
    assert not [n for n in names if not re.search(rf"\b{n}\b", text)]


def test_links_in_the_documents_lead_somewhere():
    """Those to files, from where they stand."""
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_the_readme_is_filled_in():
    """No placeholder is left where output or a table should stand."""
    assert not re.findall(r"\b[A-Z]{3,}_(?:OUTPUT|TABLE|CARD)\b", (ROOT / "README.md").read_text(encoding="utf-8"))


def test_the_readme_s_python_runs(tmp_path, monkeypatch):
    """Block by block, with a tiny model and tensors under the names that it speaks of."""
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny.make_tokenizer()
    torch.manual_seed(0)
    model = tiny.tiny_llama(len(tokenizer))
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path / "model")
    model.name_or_path = model.config._name_or_path = str(tmp_path / "model")
    names = {
        "model": model, "forget": "the king hides a lamp and a dog sees the sea.", "F": torch.nn.functional,
        "hidden": torch.randn(5, 8, requires_grad=True), "weight": torch.randn(11, 8), "targets": torch.randint(11, (5,)),
        "coefficients": torch.randn(5), "example_index": torch.tensor([0, 0, 1, 1, 1]), "reference": torch.randn(2),
    }  # fmt: skip
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(ast.parse(block), "README.md", "exec"), names)
    assert (tmp_path / "model-unlearned" / "model.safetensors").exists()
    torch.testing.assert_close(names["log_likelihood"], -names["loss"])
    torch.testing.assert_close(names["value"], -(names["coefficients"] * names["loss"]).sum())
    assert names["hidden"].grad.abs().max() > 0


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
