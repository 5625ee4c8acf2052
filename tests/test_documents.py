"""The documents: names and links exist, Python blocks run, commands parse and run, no line is too long."""

import ast
import importlib
import inspect
import json
import re
import shlex
import sys
from dataclasses import replace

import pytest
import tiny
import torch
import typer
from test_public import INNER, PACKAGES, ROOT

import pyunlearn
from pyunlearn.auditing import config, result
from pyunlearn.cli import main as cli

DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "SECURITY.md",
    ROOT / "pyunlearn" / "ops" / "README.md",
]
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md"))
PYTHON = {  # the test file that runs the Python blocks of a document
    "README.md": "test_documents",
    "docs/ops.md": "test_documents",
    "docs/methods.md": "test_documents",
    "docs/representation-methods.md": "test_documents",
    "docs/compare.md": "test_documents",
    "docs/edits.md": "test_edits_documents",
    "docs/in-context.md": "test_edits_documents",
    "docs/find.md": "test_find",
    "docs/bench.md": "test_bench",
    "docs/attacks.md": "test_attacks",
    "docs/large-models.md": "test_models_condition",
    "docs/upload.md": "test_unlearning_card",
    "docs/in-ci.md": "test_how_to",
    "docs/serve.md": "test_how_to",
    "docs/tutorial.md": "test_tutorial",
    "docs/evaluate.md": "test_metrics_reachable",
    "docs/contributing/add-a-method.md": "test_contributing",
    "docs/contributing/add-a-metric.md": "test_contributing",
    "docs/contributing/add-an-op.md": "test_contributing",
    "docs/contributing/add-an-attack.md": "test_attacks_contributing",
    "docs/contributing/add-an-edit.md": "test_edits_contributing",
}
OLD_NAMES = (
    "until",
    "reference_scores",
    "reference_drift",
    "likeliest",
    "on_a_card",
    "pyunlearn.in_context",
    "objection",
)


def name_of(path):
    """Return the path of a document below the root."""
    return path.relative_to(ROOT).as_posix()


def blocks(path, kinds):
    """Return the fenced blocks of a document whose info string is one of the kinds."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [text for kind, text in fenced if kind in kinds]


def commands(path, program="pyunlearn"):
    """Return the words of every command of a program in the shell blocks of a document."""
    lines = "\n".join(blocks(path, ("", "sh", "console"))).replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in re.split(r"&&|\s#\s", line)]
    return [shlex.split(part.removeprefix("$ ")) for part in parts if re.match(rf"(\$ )?{program} ", part)]


COMMANDS = [(name_of(path), words) for path in DOCUMENTS for words in commands(path)]


# ---------------------------------------------------------------- names, links, lines


def test_every_command_and_public_name_is_in_the_documents():
    """README.md or a page of docs/ mentions each command and each public name."""
    pages = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    text = "\n".join(path.read_text(encoding="utf-8") for path in pages)
    outer = [package for package in PACKAGES if package.split(".")[-1] not in INNER]
    names = {n for package in outer for n in importlib.import_module(package).__all__}
    missing = sorted(n for n in names if not re.search(rf"\b{n}\b", text))
    missing += [n for n in typer.main.get_command(cli.program()).commands if f"pyunlearn {n}" not in text]
    assert not missing, f"neither README.md nor docs/ mentions {', '.join(missing)}"


def test_every_option_is_in_the_reference():
    """The reference has the arguments of `unlearn` and `audit` by name, and the fields of their results."""
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    names = [*inspect.signature(pyunlearn.unlearn).parameters, *pyunlearn.ExampleResult.__annotations__]
    names += [*pyunlearn.Utility.__annotations__, *pyunlearn.Result.__annotations__]
    names += [*inspect.signature(pyunlearn.audit).parameters, *config.METRICS]
    for kind in vars(result).values():
        if inspect.isclass(kind) and kind.__module__ == result.__name__:
            names += kind.__annotations__
    assert not [n for n in names if not re.search(rf"\b{n}\b", text)]


def headings(path):
    """Return the anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path):
    """The files and headings that a document links to exist."""
    prose = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", prose):
        page = path.parent / target if target else path
        assert page.exists(), f"{path.name} links to {target}"
        assert not anchor or anchor in headings(page), f"{path.name} links to {target}#{anchor}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_no_line_is_longer_than_120(path):
    """Tables and addresses excepted, which Markdown cannot wrap: the README of a release has long ones."""
    lines = re.sub(r"\]\(https:[^)]*\)", "]", path.read_text(encoding="utf-8")).splitlines()
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if p.name != "CHANGELOG.md"], ids=name_of)
def test_no_old_name_is_left(path):
    """Only the changelog has the names of before the first release, in code."""
    code = " ".join(re.findall(r"`[^`\n]+`", path.read_text(encoding="utf-8")))
    assert not [name for name in OLD_NAMES if re.search(rf"(?<![\w.]){re.escape(name)}\b", code)]


def test_the_readme_is_filled_in():
    """No placeholder is left, and no table has more than six rows."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not re.findall(r"\b[A-Z]{3,}_(?:OUTPUT|TABLE|CARD)\b", text)
    assert max(len(table.splitlines()) for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)) <= 2 + 6


# ---------------------------------------------------------------- Python


def test_every_python_block_is_run_by_a_test():
    """A document with Python blocks is in the list, with a test file that names it."""
    assert {name_of(path) for path in DOCUMENTS if blocks(path, ("python",))} == PYTHON.keys()
    for document, test in PYTHON.items():
        assert document.split("/")[-1] in (ROOT / "tests" / f"{test}.py").read_text(encoding="utf-8")


def run(code, document, names):
    """Run one block."""
    exec(compile(ast.parse(code), document, "exec"), names)


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    """With a tiny model."""
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny.make_tokenizer()
    torch.manual_seed(0)
    model = tiny.tiny_llama(len(tokenizer))
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path / "model")
    model.name_or_path = model.config._name_or_path = str(tmp_path / "model")
    names = {
        "model": model,
        "forget": "the king hides a lamp and a dog sees the sea.",
        "holdout": tiny.sentences(24, 5),
    }
    (code,) = blocks(ROOT / "README.md", ("python",))
    run(code, "README.md", names)
    assert (tmp_path / "model-unlearned" / "model.safetensors").exists()


def test_the_python_of_the_ops_runs():
    """Each block of docs/ops.md runs in order, with tensors under the names that it uses."""
    torch.manual_seed(0)
    names = {
        "F": torch.nn.functional,
        "hidden": torch.randn(5, 8, requires_grad=True),
        "weight": torch.randn(11, 8),
        "targets": torch.randint(11, (5,)),
        "coefficients": torch.randn(5),
        "example_index": torch.tensor([0, 0, 1, 1, 1]),
        "reference": torch.randn(2),
    }
    code = blocks(ROOT / "docs/ops.md", ("python",))
    assert len(code) == 3
    for block in code:
        run(block, "docs/ops.md", names)
    torch.testing.assert_close(names["log_likelihood"], -names["loss"])
    torch.testing.assert_close(names["value"], -(names["coefficients"] * names["loss"]).sum())
    assert names["hidden"].grad.abs().max() > 0


def two_steps(function):
    """Return a public function of a run with at most two steps, its other settings unchanged."""

    def short(*arguments, config=None, **settings):
        if config is not None:
            return function(*arguments, config=replace(config, max_steps=2), **settings)
        return function(*arguments, max_steps=2, progress=False, **settings)

    return short


@pytest.fixture
def short_runs(monkeypatch):
    """Runs of at most two steps."""
    for name in ("unlearn", "compare"):
        monkeypatch.setattr(pyunlearn, name, two_steps(getattr(pyunlearn, name)))


@pytest.mark.parametrize("document", ["docs/methods.md", "docs/representation-methods.md", "docs/compare.md"])
def test_the_python_of_a_page_runs(document, story, short_runs, tmp_path, monkeypatch):
    """Each block runs in order, with a tiny trained model of two layers and its texts."""
    monkeypatch.chdir(tmp_path)
    model = story.fresh()
    model.tokenizer = None
    for each in (model, story.tokenizer):
        each.save_pretrained(tmp_path / "model")
    model.name_or_path = model.config._name_or_path = str(tmp_path / "model")
    names = {
        "pyunlearn": pyunlearn,
        "model": model,
        "forget": story.forget,
        "retain": story.retain,
        "holdout": story.holdout,
    }
    for block in blocks(ROOT / document, ("python",)):
        run(block.replace('"layer": 7', '"layer": 1'), document, names)
    assert {"result", "comparison", "found"} & names.keys()


# ---------------------------------------------------------------- commands


def test_the_two_commands_of_the_readme_are_there():
    """Word for word, and CI runs the second."""
    (first, *_, last) = blocks(ROOT / "README.md", ("sh",))
    assert (first, last) == ('pip install ".[demo]" && pyunlearn demo\n', 'pip install ".[test]" && pytest\n')
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert ci.index("pytest") > ci.index('pip install --quiet ".[test]"')


def test_what_the_documents_install_and_mark_exists():
    """The extras after pip install and the marks after pytest -m are those of pyproject.toml."""
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    marks = [line.split(":")[0] for line in project["tool"]["pytest"]["ini_options"]["markers"]]
    text = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    extras, used = re.findall(r'pip install "(?:pyunlearn|\.)\[(\w+)\]', text), re.findall(r"pytest -m (\w+)", text)
    assert {"demo", "test", "dev"} <= set(extras) <= project["project"]["optional-dependencies"].keys()
    assert {"full", "real_model", "nvcc"} <= set(used) <= set(marks)
    for path in re.findall(
        r"`((?:benchmarks|scripts|tests|csrc|pyunlearn)/[\w/.]+\.\w+)`", (ROOT / "CONTRIBUTING.md").read_text()
    ):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize(("document", "words"), COMMANDS, ids=lambda x: x if isinstance(x, str) else " ".join(x[1:2]))
def test_every_command_in_the_documents_parses(document, words):
    """The command line knows every command and option in a shell block, and accepts its value."""
    command = typer.main.get_command(cli.program()).commands[words[1]]
    with command.make_context(words[1], words[2:]) as context:
        assert context.params


def test_a_wrong_option_in_a_document_is_noticed():
    """Parsing fails for an option that does not exist."""
    command = typer.main.get_command(cli.program()).commands["audit"]
    with pytest.raises(Exception, match="--compare"):
        command.make_context("audit", ["./my-model", "--forget", "secrets.jsonl", "--compare", "./other"])


@pytest.mark.parametrize("document", ["README.md", "docs/methods.md"])
def test_the_commands_of_a_document_run(document, story, call, short_runs, tmp_path):
    """In order, on a tiny model and files under the names that they use; two steps leave the texts exposed."""
    for each in (story.model, story.tokenizer):
        each.save_pretrained(tmp_path / "my-model")
    for name, texts in (("secrets", story.forget), ("keep", story.retain), ("unseen", story.holdout)):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    done = [words for words in commands(ROOT / document) if words[1] in ("audit", "unlearn")]
    assert done
    for words in done:
        code, out, err = call(*words[1:])
        assert (code, re.sub(r"[\d,]+ texts? to forget with .*\n", "", err)) == (1, "")
        assert "still exposed" in out
    assert (tmp_path / "my-model-unlearned" / "result.json").exists()
