"""Whatever a file or an argument holds, the answer is a result or one sentence of ours, without control characters."""

import contextlib
import datetime
import inspect
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import test_arguments
import tiny
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import pyunlearn
from pyunlearn.attacks.config import AttackConfig
from pyunlearn.auditing.config import AuditConfig
from pyunlearn.cli.options import assignments, texts
from pyunlearn.comparing.config import CompareConfig
from pyunlearn.data import read_examples
from pyunlearn.data.corpus import Corpus, record_text
from pyunlearn.data.files import SUFFIXES
from pyunlearn.data.find import FindConfig
from pyunlearn.edits.config import EditConfig
from pyunlearn.errors import PyunlearnError
from pyunlearn.methods import METHODS, resolve
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.options import read_settings
from pyunlearn.study.config import StudyConfig
from pyunlearn.unlearning.config import UnlearnConfig

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\ud800-\udfff]")
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
NAMES = st.sampled_from(["text", "prompt", "completion", "question", "answer", "messages", "forget", "winner", "role"])
NAMES |= st.sampled_from(["paraphrases", "content", "data", "\x1b[2J"]) | st.text(max_size=5)
JSON = st.recursive(SCALARS, lambda x: st.lists(x, max_size=4) | st.dictionaries(NAMES, x, max_size=4), max_leaves=12)
HARD = st.sampled_from(
    ["x" * 300, "x" * 300 + ".json", "~nobody/x.txt", "~\0.txt", "\ud800.txt", "/dev/null", "a/../.."]
)
GIANTS = st.sampled_from([2**63, 10**309, -(10**400), 10**5000])  # more than a float, or than Python prints
JUNK = JSON | HARD | GIANTS | st.binary(max_size=10) | st.complex_numbers() | st.builds(object)
JUNK |= st.tuples(st.text(max_size=3))
FEW = settings(max_examples=60)  # of the slower ones


def sentence_or(function, *arguments, **options):
    """The value of a call, or None where it raises an error of ours, whose message a terminal can show."""
    try:
        return function(*arguments, **options)
    except PyunlearnError as error:
        message = str(error)
    assert not CONTROL.search(message), message
    assert len(message) > 10
    return None


def read_all(path):
    """Read a file in each of the ways that there are."""
    examples = sentence_or(read_examples, path, role="forget")
    assert examples is None or len(examples) > 0
    corpus = sentence_or(Corpus, path)
    sentence_or(lambda: [record.text for record in corpus or ()])
    sentence_or(read_settings, path, UnlearnConfig.options())


@given(st.sampled_from(SUFFIXES), st.binary(max_size=200) | st.text(max_size=200).map(lambda x: x.encode("utf-16")))
def test_any_bytes_are_a_file_or_a_sentence(tmp_path, suffix, content):
    """Under each suffix."""
    (tmp_path / f"a{suffix}").write_bytes(content)
    read_all(tmp_path / f"a{suffix}")


@given(st.sampled_from([".json", ".jsonl"]), st.lists(JSON, min_size=1, max_size=4), st.integers(0, 3))
def test_any_json_is_a_file_or_a_sentence(tmp_path, suffix, rows, form):
    """Of any depth and type, also cut in the middle."""
    lines = [json.dumps(row) for row in rows]
    whole = [f"[{','.join(lines)}]", "\n".join(lines), lines[0], "\n".join(lines)[: -1 - len(lines[0]) // 2]][form]
    (tmp_path / f"a{suffix}").write_text(whole)
    read_all(tmp_path / f"a{suffix}")


@given(st.sampled_from([".csv", ".tsv", ".txt"]), st.text(alphabet='ab,"\t\n\r\x00\x1b;té\u2028', max_size=60))
def test_any_table_is_a_file_or_a_sentence(tmp_path, suffix, content):
    """Quotes, separators and line ends in any order."""
    header = "text,prompt\n" if content.startswith("a") else ""
    (tmp_path / f"a{suffix}").write_bytes((header + content).encode())
    read_all(tmp_path / f"a{suffix}")


@FEW
@given(st.data())
def test_a_damaged_parquet_file_is_a_sentence(tmp_path, data):
    """Bytes changed anywhere, or the end cut off."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    whole = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["one", None, "three\x1b"], "n": [1.5, 2.5, 3.5]}), whole)
    content = bytearray(whole.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "a.parquet").write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    read_all(tmp_path / "a.parquet")


def test_a_column_s_name_that_is_not_utf_8_is_a_sentence(tmp_path):
    """As damage can make it: found by 100,000 cases of the tests above."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["one"], "name": ["two"]}), tmp_path / "a.parquet", store_schema=False)
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content.replace(b"name", b"\x80ame"))
    for read in (lambda: read_examples(tmp_path / "a.parquet", role="forget"), lambda: list(Corpus(tmp_path))):
        with pytest.raises(PyunlearnError, match="not UTF-8"):
            read()


def test_what_python_cannot_hold_is_a_sentence(tmp_path):
    """Parquet's durations and dates reach further than Python's; depths and numbers, further than a parser."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    values = pyarrow.array([2**62], pyarrow.int64())
    for number, kind in enumerate((pyarrow.duration("s"), pyarrow.date64())):
        path = tmp_path / f"{number}.parquet"
        parquet.write_table(pyarrow.table({"text": ["a"], "x": values.cast(kind, safe=False)}), path)
        with pytest.raises(PyunlearnError, match="leave out columns of dates and durations"):
            read_examples(path, role="forget")
    for name, content in (
        ("deep.json", "[" * 100_000),
        ("long.json", "7" * 100_000),
        ("deep.jsonl", '{"a":' * 100_000),
    ):
        (tmp_path / name).write_text(content)
        read_all(tmp_path / name)
    nested = "a"
    for _ in range(20_000):
        nested = [nested]
    assert record_text({"text": nested}) is None
    assert sentence_or(read_examples, [{"text": nested}], role="forget") is None


@given(st.text(max_size=60) | st.sampled_from(["[" * 100_000, '{"a":' * 100_000, "7" * 10_000]))
def test_standard_input_is_texts_or_a_sentence(monkeypatch, content):
    """Its form is recognized from its content."""
    monkeypatch.setattr("sys.stdin", io.StringIO(content))
    sentence_or(texts, Path("-"), "forget")
    sentence_or(assignments, [f"beta={content}"])


CONFIGS: list[Any] = [UnlearnConfig, AuditConfig, AttackConfig, CompareConfig, EditConfig, FindConfig, StudyConfig]


@settings(max_examples=200)
@given(st.sampled_from([(config, name) for config in CONFIGS for name in config.options()]), JUNK)
def test_every_option_takes_a_value_or_a_sentence(case, value):
    """Of every command and function, in Python and as a word of the command line."""
    config, name = case
    sentence_or(config.of, None, {name: value}, "fuzz")
    word = "9" * 5000 if value == 10**5000 else str(value)
    sentence_or(config.options()[name].parsed, name, word)


@given(st.sampled_from(sorted(METHODS)), NAMES | st.sampled_from(["beta", "alternates", "layer"]), JUNK)
def test_every_option_of_a_method_takes_a_value_or_a_sentence(method, name, value):
    """Its own options, known and unknown."""
    sentence_or(resolve, method, "auto", True, {name: value}, True)


class Checked(Exception):
    """The function is about to read the model: all of its arguments passed."""


@pytest.fixture(scope="module")
def model():
    """An untrained model, for no case comes to its weights."""
    tokenizer = tiny.make_tokenizer()
    torch.manual_seed(0)
    return tiny.tiny_llama(len(tokenizer)), tokenizer


@settings(max_examples=150)
@given(st.sampled_from([case.values for case in test_arguments.CASES]), JUNK)
def test_every_argument_takes_a_value_or_a_sentence(model, tmp_path, monkeypatch, case, value):
    """Of every public function that takes a model, up to the point where the model is read; nothing is written."""
    name, argument = case
    assume(not (argument == "resume" and value is True))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LanguageModel, "of", classmethod(lambda *_, **__: (_ for _ in ()).throw(Checked)))
    function = test_arguments.FUNCTIONS[name]
    parameters = inspect.signature(function).parameters
    right = dict(zip(("model", "tokenizer"), model, strict=True))
    right |= {"forget": test_arguments.TEXTS, "retain": test_arguments.TEXTS, "fine_tuned": model[0], "rate": 0.1}
    right = {k: v for k, v in right.items() if k in parameters}
    with contextlib.suppress(Checked):
        sentence_or(function, **right | {argument: value})
    assert list(tmp_path.iterdir()) == []


@given(st.text(max_size=8).map(lambda x: x + ".txt") | HARD)
def test_any_name_of_a_file_is_a_file_or_a_sentence(name):
    """Also one that no file system allows."""
    for source in (name, Path(name)):
        sentence_or(read_examples, source, role="forget")
        sentence_or(pyunlearn.find_copies, ["a"], source, progress=False)
        sentence_or(UnlearnConfig.of, source, {}, "unlearn")


def test_dates_and_other_objects_are_refused():
    """A row of a dataset can hold any object."""
    for value in (datetime.date(2020, 1, 1), {1, 2}, object(), b"a", 1 + 2j):
        assert sentence_or(read_examples, [{"text": value}], role="forget") is None
        assert sentence_or(pyunlearn.find_copies, value, ["a"], progress=False) is None
