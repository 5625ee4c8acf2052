"""Every public name of pyunlearn.metrics is used by another package or by a documented how-to, whose code runs."""

import ast
import inspect
import re
import typing
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from pyunlearn import metrics

ROOT = Path(__file__).parent.parent
HOW_TO = ROOT / "docs" / "evaluate.md"
OTHERS = sorted(p for p in (ROOT / "pyunlearn").rglob("*.py") if (ROOT / "pyunlearn" / "metrics") not in p.parents)


def python_blocks(page):
    """Each ```python block of a page, with the ```text block that follows it or None."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", text, re.S)


def used(code):
    """The names of pyunlearn.metrics that a piece of code uses: imported from it and mentioned, or `metrics.name`."""
    tree = ast.parse(code)
    imported, mentioned = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyunlearn.metrics"):
            imported.update({alias.asname or alias.name: alias.name for alias in node.names})
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "metrics":
            imported[f"metrics.{node.attr}"] = node.attr
            mentioned.add(f"metrics.{node.attr}")
        elif isinstance(node, ast.Name):
            mentioned.add(node.id)
    return {name for alias, name in imported.items() if alias in mentioned}


def with_results(names):
    """The names and the classes of their results: return annotations of functions, fields of those classes."""
    reached, queue = set(), list(names)
    while queue:
        if (name := queue.pop()) in reached:
            continue
        reached.add(name)
        thing = getattr(metrics, name, None)
        if inspect.isroutine(thing) or inspect.isclass(thing):
            hints = typing.get_type_hints(thing)
            kinds = hints.values() if inspect.isclass(thing) else [hints.get("return")]
            inner = [k for kind in kinds for k in (kind, *typing.get_args(kind)) if inspect.isclass(k)]
            queue += [k.__name__ for k in inner if k.__name__ in metrics.__all__]
    return reached


def unreached(public, code):
    """The public names that none of the pieces of code reaches."""
    return sorted(set(public) - with_results({name for piece in code for name in used(piece)}))


def all_code():
    """The package without its metrics, and the how-to's blocks."""
    return [p.read_text(encoding="utf-8") for p in OTHERS] + [code for code, _ in python_blocks(HOW_TO)]


def test_every_public_metric_is_reached_by_the_package_or_a_how_to():
    """A name that nothing uses is to be used, documented in docs/evaluate.md or deleted."""
    assert not unreached(metrics.__all__, all_code())


def test_an_unused_name_is_noticed():
    """A name that is never mentioned, one that is only imported, and one that only a docstring mentions all count."""
    code = ["from pyunlearn.metrics import auc, verdict\nauc", '"""metrics.rouge_l"""']
    assert unreached(["auc", "Interval", "verdict", "rouge_l", "tpr_at_fpr"], code) == [
        "rouge_l",
        "tpr_at_fpr",
        "verdict",
    ]
    without_page = [p.read_text(encoding="utf-8") for p in OTHERS]
    assert {"extraction_probability", "steps_to_forget"} <= set(unreached(metrics.__all__, without_page))


def test_the_how_to_runs_and_prints_what_it_shows():
    """Block by block in one namespace; each has an output, and prints exactly that."""
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")
    blocks, names = python_blocks(HOW_TO), {}
    assert len(blocks) >= 8
    for code, shown in blocks:
        with redirect_stdout(StringIO()) as printed:
            exec(compile(code, HOW_TO.name, "exec"), names)
        assert printed.getvalue() == shown
