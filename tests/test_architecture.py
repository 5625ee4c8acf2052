"""The one-way order of the packages: every import is walked, wherever it stands in a file."""

import ast
import graphlib
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
ORDER = [
    "errors",
    "options",
    "progress",
    "data",
    "ops",
    "models",
    "output",
    "metrics",
    "methods",
    "probes",
    "edits",
    "attacks",
    "unlearning",
    "auditing",
    "comparing",
    "benchmarking",
    "report",
    "study",
    "cli",
    "__main__",
]  # what stands further right may import what stands further left, and never the other way round
VERSION = "pyunlearn.__version__"
FILES = sorted((ROOT / "pyunlearn").rglob("*.py"))


def dotted(path, root=ROOT):
    """The name of the module in a file."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path, modules):
    """(line, module) of every import of ours: at the top, inside functions, under TYPE_CHECKING.

    A name that is imported from a package counts as an import of the package's own file, unless it is a module itself.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name.split(".")[0] == "pyunlearn")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import, where all others are absolute"
            if node.module.split(".")[0] == "pyunlearn":
                for alias in node.names:
                    deeper = f"{node.module}.{alias.name}"
                    extra = deeper in modules or deeper in (VERSION, "pyunlearn._C")
                    yield node.lineno, deeper if extra else node.module


def arrows_back(path, modules, root=ROOT):
    """Sentences about the imports of one file that point from left to right."""
    name = dotted(path, root)
    if name == "pyunlearn":
        return []
    room = name.split(".")[1]
    assert room in ORDER, f"give {room} its place in ORDER"
    wrong = []
    for line, target in imports(path, modules):
        if target == VERSION:
            continue
        to = target.split(".")[1] if "." in target else "pyunlearn"
        if to == "_C":
            fine = name == "pyunlearn.ops._backend"
        elif to == "pyunlearn":  # the whole face: for the command line alone
            fine = room == "cli"
        else:
            fine = to == room or (ORDER.index(to) < ORDER.index(room))
        if not fine:
            wrong.append(f"{path}:{line}: {name} imports {target}")
    return wrong


def circle(files, modules, root=ROOT):
    """The modules of a circle of imports, or None. To import a file of a package is not to import its __init__."""
    names = {dotted(f, root): f for f in files}
    graph = {n: {t for _, t in imports(f, modules) if t in names and t != n} for n, f in names.items()}
    graph.pop("pyunlearn", None)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


MODULES = {dotted(f) for f in FILES}


def test_imports_point_one_way():
    """No file imports a package that stands further right; only ops/_backend.py imports the extension."""
    assert [arrow for path in FILES for arrow in arrows_back(path, MODULES)] == []


def test_no_circle():
    """No module imports itself by way of others, inside the packages too."""
    assert circle(FILES, MODULES) is None


def test_every_package_has_its_place():
    """ORDER names exactly what is there."""
    there = {p.stem for p in (ROOT / "pyunlearn").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert there - {"__init__"} == set(ORDER)


def test_the_root_is_a_short_list():
    """22 entries at most, so that `ls` is a table of contents."""
    entries = [p for p in (ROOT / "pyunlearn").iterdir() if p.name != "__pycache__" and p.suffix != ".so"]
    assert len(entries) <= 22


def test_transformers_is_imported_in_models_alone():
    """Everything that knows transformers is in one place."""
    outside = [path for path in FILES if path.relative_to(ROOT).parts[1] != "models"]
    pattern = re.compile(r"^\s*(?:from|import) transformers\b", re.M)
    assert [path for path in outside if pattern.search(path.read_text(encoding="utf-8"))] == []


def test_only_ops_and_metrics_have_private_files():
    """What is public is said once, by each package's __all__."""
    private = [path for path in FILES if path.name.startswith("_") and not path.name.startswith("__")]
    assert [path for path in private if path.relative_to(ROOT).parts[1] not in ("ops", "metrics")] == []


def test_the_walk_sees_arrows_back_and_circles(tmp_path):
    """Of every kind: at the top, inside a function, under TYPE_CHECKING, `from` and plain."""
    data = tmp_path / "pyunlearn" / "data"
    data.mkdir(parents=True)
    path = data / "tokens.py"
    modules = {"pyunlearn", "pyunlearn.errors", "pyunlearn.unlearning.api", "pyunlearn.models", "pyunlearn.data.tokens"}
    path.write_text("from pyunlearn.errors import DataError\nfrom pyunlearn import __version__\n")
    assert not arrows_back(path, modules, tmp_path)
    for arrow in (
        "import pyunlearn.models",
        "from pyunlearn import models",
        "from pyunlearn.models import load",
        "if TYPE_CHECKING:\n    from pyunlearn.unlearning.api import unlearn",
        "def f():\n    from pyunlearn.unlearning.api import unlearn",
        "from pyunlearn import _C",
        "import pyunlearn",
        "from pyunlearn import unlearn",
    ):
        path.write_text(arrow)
        assert arrows_back(path, modules, tmp_path), arrow
    other = data / "batching.py"
    path.write_text("def f():\n    from pyunlearn.data.batching import collate\n")
    other.write_text("if TYPE_CHECKING:\n    from pyunlearn.data.tokens import Tokens\n")
    modules = {"pyunlearn.data.tokens", "pyunlearn.data.batching"}
    assert circle([path, other], modules, tmp_path)
