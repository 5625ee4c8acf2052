"""What a release consists of: one version, one address, one list of Python versions, workflows without dead names."""

import ast
import importlib
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
import yaml

import pyunlearn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
index_readme = importlib.import_module("index_readme")
toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

PYPROJECT = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
FOLDERS = ("pyunlearn", "docs", "examples", "benchmarks", ".github")
FILES = [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.*"))]
TEXTS = [path for path in FILES if path.suffix in (".py", ".md", ".sh", ".yml")]


def workflow(path):
    """Return a workflow; YAML reads its key `on` as true."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def source(path):
    """Return a text with relative links, as in the repository: those of an sdist's README are absolute."""
    return path.read_text(encoding="utf-8").replace(
        f"{PROJECT['urls']['Repository']}/blob/v{pyunlearn.__version__}/", ""
    )


def steps(path):
    """Return every step of a workflow."""
    return [step for job in workflow(path)["jobs"].values() for step in job.get("steps", [])]


# ---------------------------------------------------------------- version, address, Python


def test_the_version_stands_in_one_place():
    """The build reads it from pyunlearn/__init__.py, and the installed metadata have it."""
    assert "version" not in PROJECT
    assert PROJECT["dynamic"] == ["version"]
    assert PYPROJECT["tool"]["scikit-build"]["metadata"]["version"]["input"] == "pyunlearn/__init__.py"
    assert index_readme.version() == pyunlearn.__version__ == importlib.metadata.version("pyunlearn")
    assert "version" not in yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_the_address_of_the_repository_is_that_of_the_project_urls():
    """CITATION.cff and the site repeat it, and no other file has it."""
    home = PROJECT["urls"]["Repository"]
    assert index_readme.repository() == home
    assert all(url.startswith(home) for url in PROJECT["urls"].values())
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["repository-code"] == home
    assert f"repo_url: {home}\n" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert not [str(path) for path in TEXTS if "github.com/pyunlearn" in source(path)]


def test_the_python_versions_agree():
    """Classifiers, the matrix of the tests and the wheels name the same versions; the tools check the oldest."""
    versions = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    matrix = workflow(ROOT / ".github" / "workflows" / "tests.yml")["jobs"]["tests"]["strategy"]["matrix"]
    assert matrix["python"] == versions
    assert {leg["python"] for leg in matrix["include"]} <= set(versions)
    wheels = PYPROJECT["tool"]["cibuildwheel"]["build"]
    assert wheels == [f"cp{version.replace('.', '')}-*" for version in versions]
    assert PROJECT["requires-python"] == f">={versions[0]}"
    assert PYPROJECT["tool"]["mypy"]["python_version"] == versions[0]
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py{versions[0].replace('.', '')}"


# ---------------------------------------------------------------- workflows


@pytest.mark.parametrize("path", [*WORKFLOWS, *FORMS, ROOT / ".github" / "dependabot.yml"], ids=lambda p: p.name)
def test_the_yaml_parses(path):
    """Each file is a mapping."""
    assert isinstance(workflow(path), dict)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_a_workflow_names_what_exists(path):
    """The files, extras and marks in its commands exist, each action has a version, and it can only read by default."""
    text = path.read_text(encoding="utf-8")
    assert workflow(path)["permissions"] == {"contents": "read"}
    for step in steps(path):
        assert re.search(r"@(v\d+|release/v\d+|[0-9a-f]{40})$", step["uses"]) if "uses" in step else step["run"]
    for name in re.findall(r"(?<![\w/])((?:scripts|tests|csrc|pyunlearn|\.ci|\.github)/[\w/.]+)", text):
        assert (ROOT / name).exists(), name
    assert set(re.findall(r"\.\[(\w+)\]", text)) <= PROJECT["optional-dependencies"].keys()
    marks = {line.split(":")[0] for line in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    assert set(re.findall(r"\w+", " ".join(re.findall(r'pytest .*-m "?([\w ]+)', text)))) - {"or", "not"} <= marks
    assert set(re.findall(r"define\.(\w+)=", text)) <= set(
        re.findall(r"^set\((\w+)", (ROOT / "CMakeLists.txt").read_text(encoding="utf-8"), re.MULTILINE)
    )


def test_only_the_upload_may_write():
    """One job may identify itself to the package index, one may add files to the release."""
    rights = {
        (path.name, name): job["permissions"]
        for path in WORKFLOWS
        for name, job in workflow(path)["jobs"].items()
        if "permissions" in job
    }
    assert rights == {
        ("publish.yml", "index"): {"id-token": "write"},
        ("publish.yml", "cuda"): {"contents": "write"},
    }


def test_every_wheel_is_tested_with_its_extension():
    """The test of a wheel imports the extension, and its test file exists."""
    compiled, tests = PYPROJECT["tool"]["cibuildwheel"]["test-command"]
    assert "from pyunlearn import _C" in compiled
    for name in re.findall(r"\{project\}/(\S+)", tests):
        assert (ROOT / name).exists(), name
    required = {line.split(">=")[0] for line in PYPROJECT["tool"]["cibuildwheel"]["test-requires"]}
    assert required <= {line.split(">=")[0] for line in PROJECT["optional-dependencies"]["test"]}


# ---------------------------------------------------------------- sdist, README, messages


def test_the_sdist_leaves_nothing_out():
    """Documents, their images, CI and tests are in it, so that links lead somewhere and tests pass from it."""
    assert "sdist" not in PYPROJECT["tool"]["scikit-build"]


def test_the_readme_of_the_index_has_absolute_links_to_files_that_exist():
    """Each relative link becomes the address of the same file at the release's tag; other links stay."""
    text = source(ROOT / "README.md")
    home, links = "https://example.org/o/r", r"\]\(([^)]*)\)"
    converted = index_readme.absolute(text, home, "v1")
    assert len(re.findall(links, converted)) == len(re.findall(links, text))
    paths = re.findall(rf"\]\({home}/(?:blob|raw)/v1/([^)]*)\)", converted)
    assert len(paths) >= 10
    assert not [path for path in paths if not (ROOT / path.split("#")[0]).exists()]
    assert not re.findall(r"\]\((?!https://|#)", converted)
    assert index_readme.absolute(converted, home, "v2") == converted


def test_images_and_anchors_of_the_readme():
    """An image becomes the raw file, and an anchor of the same page stays."""
    before = "[a](b.md#c), ![d](e.svg), [f](#g), [h](https://i.org)"
    after = "[a](https://h/o/r/blob/v1/b.md#c), ![d](https://h/o/r/raw/v1/e.svg), [f](#g), [h](https://i.org)"
    assert index_readme.absolute(before, "https://h/o/r", "v1") == after


def test_no_text_installs_a_package_that_nobody_has_released():
    """Messages and documents install from the checkout, or other packages by their names."""
    wrong = re.compile(r"pyunlearn\[\w+\]|pip install (-\S+ )*[\"']?pyunlearn\b")
    assert not [str(path) for path in TEXTS if wrong.search(path.read_text(encoding="utf-8"))]


def test_messages_install_packages_of_an_extra():
    """Each package that a message about a missing one names is a requirement of some extra."""
    extras = " ".join(line for lines in PROJECT["optional-dependencies"].values() for line in lines)
    names = set()
    for path in (ROOT / "pyunlearn").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "missing_packages":
                names |= {a.value for a in node.args[1:] if isinstance(a, ast.Constant)}
    assert {"matplotlib", "sacrebleu", "rouge-score", "pyarrow"} <= names
    assert not [name for name in names if not re.search(rf"(?<![\w-]){name}(?![\w-])", extras)]
