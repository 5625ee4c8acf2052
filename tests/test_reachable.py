"""Every public name is reached: by the package itself, or by code in a document or an example."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("comparing", "data", "edits", "methods", "metrics", "models", "ops", "probes", "report", "study")
FILES = [f for f in (ROOT / "pyunlearn").rglob("*.py") if f.name != "__init__.py"]
CODE = {f: f.read_text(encoding="utf-8") for f in FILES}
DOCUMENTS = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
EXAMPLES = "\n".join(
    [
        *(
            block
            for f in DOCUMENTS
            for block in re.findall(r"```python\n(.*?)```", f.read_text(encoding="utf-8"), re.S)
        ),
        *(f.read_text(encoding="utf-8") for f in (ROOT / "examples").glob("*.py")),
    ]
)


def reached(name, code, examples):
    """Return whether a name occurs in code besides its definition and its docstring's own examples, or in examples."""
    word = re.compile(rf"\b{name}\b")
    if word.search(examples):
        return True
    for text in code.values():
        lines = [
            line for line in text.splitlines() if word.search(line) and not line.lstrip().startswith((">>>", "..."))
        ]
        if any(not re.match(rf"\s*(def|class) {name}\b|\s*{name}\b.*=", line) for line in lines):
            return True
    return False


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_reached(package):
    """From a command, another function, or a documented how-to."""
    names = importlib.import_module(f"pyunlearn.{package}").__all__
    assert [name for name in names if not reached(name, CODE, EXAMPLES)] == []


def test_a_name_that_only_defines_itself_is_seen():
    """A definition and its doctest reach nothing; a call does."""
    code = {"a": 'def lonely(x):\n    """Return x.\n\n    >>> lonely(1)\n    """'}
    assert not reached("lonely", code, "")
    assert reached("lonely", code | {"b": "y = lonely(2)"}, "")
    assert reached("lonely", code, "print(lonely(3))")
