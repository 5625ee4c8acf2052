"""The worked examples of docs/contributing: their code runs, and the package takes their rows."""

import doctest
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

import pyunlearn
from pyunlearn import methods, metrics, ops
from pyunlearn.errors import ArgumentError
from pyunlearn.methods import METHODS, Method
from pyunlearn.ops import _backend, _kernels, reference

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "contributing"


def blocks(page, kind="python"):
    """Return the blocks of one kind of a page."""
    return re.findall(rf"```{kind}\n(.*?)```", (PAGES / page).read_text(encoding="utf-8"), re.DOTALL)


def run(code, page, names):
    """Run a block with these names, and return all names."""
    exec(compile(code, page, "exec"), names)
    return names


def functions_of(names):
    """Return the test functions among the names."""
    return {name: value for name, value in names.items() if name.startswith("test_") and inspect.isfunction(value)}


@pytest.fixture
def in_package(tmp_path, monkeypatch):
    """Write a module into a package for the length of a test."""

    def write(package, name, source):
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
        module = f"{package.__name__}.{name}"
        monkeypatch.delitem(sys.modules, module, raising=False)
        __import__(module)
        return sys.modules[module]

    return write


@pytest.mark.parametrize("page", sorted(PAGES.glob("add-*.md")), ids=lambda path: path.stem)
def test_an_example_is_a_page(page):
    """100 lines at most, none longer than 120 characters."""
    lines = page.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 120


# ---------------------------------------------------------------- a method


@pytest.fixture
def method(in_package, monkeypatch):
    """The example's method, registered, with the names of its test block."""
    source, row, test = blocks("add-a-method.md")
    loss = in_package(methods, "margin", source).margin
    new = eval(row, {"Method": Method, "margin": loss})
    monkeypatch.setitem(METHODS, new.name, new)
    return new, run(test, "add-a-method.md", {"pytest": pytest, "torch": torch, "pyunlearn": pyunlearn, "margin": loss})


def test_the_example_s_method_passes_its_test_and_forgets(method, story):
    """The formula on numbers, then a run on a tiny trained model with the registry's row alone."""
    tests = functions_of(method[1])
    assert tests.keys() == {"test_margin_is_its_formula", "test_margin_forgets"}
    tests["test_margin_is_its_formula"]()
    tests["test_margin_forgets"](story)


def test_the_example_s_method_is_described_as_it_is(method, call):
    """The row of the document agrees with the registry and with `pyunlearn methods`; its option is checked."""
    new, _ = method
    row, formula = blocks("add-a-method.md", "text")[0].splitlines()
    name, needs, passes, source, _ = (cell.strip() for cell in row.strip("|").split("|"))
    assert (name, needs, int(passes), source) == (f"`{new.name}`", ", ".join(new.needs), new.passes, new.source)
    assert formula.startswith(f"- `{new.name}`: ")
    assert new.options == {"delta": 2.0}
    (listed,) = (m for m in json.loads(call("methods", "--json")[1])["methods"] if m["name"] == new.name)
    assert (listed["source"], listed["options"]) == (source, new.options)
    new.check({"delta": 3})
    with pytest.raises(ArgumentError, match="delta"):
        new.check({"delta": -1.0})


# ---------------------------------------------------------------- a metric


def test_the_example_s_metric_passes_its_test(in_package):
    """The block's laws and values, and the example in the docstring."""
    source, test = blocks("add-a-metric.md")
    module = in_package(metrics, "edit_similarity", source)
    assert doctest.testmod(module) == (0, 1)
    names = {"given": hypothesis.given, "st": hypothesis.strategies, "edit_similarity": module.edit_similarity}
    tests = functions_of(run(test, "add-a-metric.md", names))
    assert len(tests) == 2
    for each in tests.values():
        each()
    with pytest.raises(ArgumentError, match="truth must have at least one token"):
        module.edit_similarity("abc", "")


def test_the_example_s_metric_is_documented_like_the_others(in_package):
    """Its docstring has the sections that the tests ask of every metric, its row the columns of its table."""
    text = inspect.getdoc(in_package(metrics, "edit_similarity", blocks("add-a-metric.md")[0]).edit_similarity)
    assert all(f"{section}:\n" in text for section in ("Args", "Returns", "Raises", "Example", "See Also"))
    row = blocks("add-a-metric.md", "text")[0].strip()
    table = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").split("## Memorization and extraction")[1]
    assert row.count("|") == table.split("\n\n")[1].splitlines()[0].count("|")


# ---------------------------------------------------------------- an op


@pytest.fixture(scope="module")
def op():
    """(the public function, the code of its test): registered once, since torch keeps it for the whole process."""
    definition, kernel, source, test = blocks("add-an-op.md")
    with pytest.MonkeyPatch.context() as patch:
        for module, code in ((reference, definition), (_kernels, kernel)):
            new = run(code, "add-an-op.md", dict(vars(module)))["squared_norm"]
            patch.setattr(module, "squared_norm", new, raising=False)
        patch.setattr(_backend, "squared_norm", _backend._chosen(_kernels.squared_norm), raising=False)
        names = dict(vars(sys.modules[f"{ops.__name__}.log_likelihood"])) | {"ArgumentError": ArgumentError}
        yield run(source, "add-an-op.md", names)["squared_norm"], test


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_example_s_op_passes_its_test(op, dtype, monkeypatch):
    """On the reference backend, which needs no build; wrong shapes are refused."""
    monkeypatch.setattr(_backend, "on_cpu", lambda: _backend.Choice("reference", "chosen by the test"))
    function, test = op
    names = {"pytest": pytest, "torch": torch, "squared_norm": function, "reference": reference}
    (body,) = functions_of(run(test, "add-an-op.md", names)).values()
    body("cpu", "reference", dtype)
    with pytest.raises(ArgumentError, match="shape"):
        function(torch.zeros(3))


def sources(folder):
    """Write the example's C++ and CUDA files and its binding into a copy of the sources; return the folder."""
    shutil.copytree(ROOT / "csrc", folder)
    (cpp,), (cuda,) = blocks("add-an-op.md", "cpp"), blocks("add-an-op.md", "cuda")
    parts = re.split(r"^// (csrc/.*)\n", cpp, flags=re.MULTILINE)[1:]  # each file follows a comment with its path
    code = {**dict(zip(parts[::2], parts[1::2], strict=True)), "csrc/cuda/squared_norm.cu": cuda}
    text = (folder / "bindings.cpp").read_text(encoding="utf-8")
    registration = re.search(r"`(m\.def\(.*?;)`", (PAGES / "add-an-op.md").read_text(encoding="utf-8"))[1]
    text = text.replace("LogitPair logit_pair(", f"{code['csrc/bindings.cpp']}\nLogitPair logit_pair(", 1)
    text = text.replace('  m.def("statistics"', f'  {registration}\n  m.def("statistics"', 1)
    code["csrc/bindings.cpp"] = f'#include "squared_norm.h"\n{text}'
    for path, content in code.items():
        (folder / path.removeprefix("csrc/")).write_text(content, encoding="utf-8")
    return folder


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_the_example_s_cpu_kernel_compiles(tmp_path):
    """Without a warning, in its place among the sources."""
    folder = sources(tmp_path / "csrc")
    command = ["g++", "-std=c++17", "-Wall", "-Werror", "-fsyntax-only", str(folder / "cpu" / "squared_norm.cpp")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.nvcc
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
def test_the_example_s_cuda_kernel_compiles(tmp_path):
    """For the oldest GPU that is supported."""
    folder = sources(tmp_path / "csrc")
    command = ["nvcc", "-std=c++17", "-arch=sm_80", "-c", str(folder / "cuda" / "squared_norm.cu")]
    done = subprocess.run([*command, "-o", str(tmp_path / "x.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
