"""The records of a corpus: every format row by row, the same texts as `read_examples` reads, and where each begins."""

import json
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from pyunlearn.data import Example, read_examples
from pyunlearn.data.corpus import Corpus, record_text
from pyunlearn.errors import DataError, DependencyError

CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": [{"type": "text", "text": "He."}]}]
FILES = {  # content, and the (row, text) that a corpus reads
    "lines.jsonl": (
        '{"text": "one"}\n\n"two"\r\n{"prompt": "a", "completion": "b"}',
        [(1, "one"), (3, "two"), (4, "a\nb")],
    ),
    "bom.jsonl": ('\ufeff{"text": "a\u2028b"}\n', [(1, "a\u2028b")]),
    "list.json": ('[\n{"text": "one"},\n"two"\n]', [(1, "one"), (2, "two")]),
    "data.json": ('{"data": [{"text": "one"}]}', [(1, "one")]),
    "object.json": ('{"text": "one"}\n\n', [(1, "one")]),
    "lines.json": ('{"text": "one"}\n{"text": "two"}\n', [(1, "one"), (2, "two")]),
    "table.csv": ('text,id\n"a, ""b""\nc",\n\nd,\n', [(2, 'a, "b"\nc\n'), (5, "d\n")]),
    "table.tsv": ("question\tanswer\nwho?\the\n", [(2, "who?\nhe")]),
    "lines.txt": ("\none\r\ntwo\n\n", [(2, "one"), (3, "two")]),
    "paragraphs.txt": ("one\nmore\n \n\ntwo\rthree", [(1, "one\nmore"), (5, "two\nthree")]),
}  # fmt: skip


def read(source):
    """Return (source, row, text) of each record."""
    return [tuple(record) for record in Corpus(source)]


def refusal(source):
    """Return the one sentence with which a corpus is refused, at once or while it is read."""
    with pytest.raises(DataError) as error:
        read(source)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_row_by_row(name, tmp_path):
    """With the line at which each record begins; the words are those of `read_examples`."""
    content, records = FILES[name]
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert read(path) == [(str(path), row, text) for row, text in records]
    examples = read_examples(path, role="forget")
    assert [record_text(e).split() for e in examples] == [text.split() for _, text in records]


def test_a_parquet_file_is_read_in_batches(tmp_path):
    """2500 rows of three row groups, in order; a column of numbers is not read."""
    rows = [{"text": f"text {i}", "id": i} for i in range(2500)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=900)
    corpus = Corpus(tmp_path / "a.parquet")
    assert [(r.row, r.text) for r in corpus] == [(i + 1, f"text {i}") for i in range(2500)]
    assert corpus.position == corpus.size == (tmp_path / "a.parquet").stat().st_size
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"chat": 1}]), tmp_path / "b.parquet")
    assert "has no text" in refusal(tmp_path / "b.parquet")


def test_pyarrow_is_asked_for_before_anything_is_read(tmp_path, monkeypatch):
    """Where it is missing, with the command that installs it."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        DependencyError, match=r"corpus in \.parquet files needs pyarrow, .*: run `pip install pyarrow`"
    ):
        Corpus(tmp_path)


def test_files_and_folders_are_read_in_order(tmp_path):
    """Of a folder those that hold texts, by name; a file that is named twice once."""
    for name in ("b.txt", "a.jsonl", "readme.md", "c.txt"):
        (tmp_path / name).write_text(json.dumps(name))
    names = [f'"{name}"' for name in ("c.txt", "b.txt")]
    a, b, c = (str(tmp_path / name) for name in ("a.jsonl", "b.txt", "c.txt"))
    assert [source for source, _, _ in read(tmp_path)] == [a, b, c]
    assert [text for _, _, text in read([tmp_path / "c.txt", tmp_path])] == [names[0], "a.jsonl", names[1]]
    assert read([a, b])[1][0] == b


def test_the_position_is_that_of_the_bytes(tmp_path):
    """It grows with the files and ends at their size; again in a second iteration."""
    for name in ("a.jsonl", "b.csv"):
        (tmp_path / name).write_text("text\n" * (name == "b.csv") + '"some words"\n' * 5000)
    corpus = Corpus(tmp_path)
    for _ in range(2):
        positions = [corpus.position for _ in corpus]
        assert positions == sorted(positions)
        assert 0 < positions[0] < corpus.size / 4
        assert len(set(positions)) > 10
        assert corpus.position == corpus.size


CALL = {"function": {"name": "note", "arguments": json.dumps({"city": "Köln"})}}


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("a text", "a text"),
        ({"text": "a", "id": 3}, "a"),
        ({"text": None}, ""),
        ({"title": "t", "text": "a", "meta": {"id": 3, "by": ["x", "y"]}}, "a\nt\nx\ny"),
        ({"prompt": "Who?", "response": "He."}, "Who?\nHe."),
        ({"answer": "He.", "question": "Who?", "text": "b"}, "Who?\nHe.\nb"),
        ({"text": None, "content": "a"}, "a"),
        ({"messages": CHAT, "text": "b"}, "Who?\nHe.\nb\nuser\nassistant\ntext"),
        ({"messages": None, "text": "b"}, "b"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [CALL]}]},
         'assistant\nnote\n{"city": "K\\u00f6ln"}\nKöln'),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "a\nb\nhuman\ngpt"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "Who?\nHe.\nuser\nassistant\ntext"),
        ({"question": "Who?", "answer": None}, "Who?"),
        ({"text": 5}, "5"),
        (Example("Who? ", "He."), "Who? He."),
        ({"messages": np.array(CHAT, dtype=object)}, "Who?\nHe.\nuser\nassistant\ntext"),
        ({"text": b"a"}, "a"),
        ({"text": np.int64(5)}, "5"),
        ({"id": 5, "score": 0.5}, None),
        (5, None),
    ],
)  # fmt: skip
def test_all_text_of_a_record_is_read(row, text):
    """Every string, also what other functions pass over or refuse: a corpus is as it is. Turns follow each other."""
    assert record_text(row) == text


def test_every_column_with_text_of_a_parquet_file_is_read(tmp_path):
    """Also those in lists and objects; where there is none, the file is refused, as with two columns of one name."""
    path, rows = tmp_path / "a.parquet", [{"id": 1, "prompt": "Who?", "response": "He.", "tags": [{"n": 1, "by": "x"}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert read(path) == [(str(path), 1, "Who?\nHe.\nx")]
    twice = pyarrow.Table.from_arrays([pyarrow.array(["one"]), pyarrow.array(["two"])], names=["text", "text"])
    pyarrow.parquet.write_table(twice, path)
    assert "has two columns of the same name" in refusal(path)


def test_the_first_line_of_a_table_without_a_header_is_read(tmp_path):
    """Its columns have no usual name, so it may be a text."""
    (tmp_path / "a.csv").write_text("my secret,is\nanother,one\n")
    assert read(tmp_path / "a.csv") == [
        (str(tmp_path / "a.csv"), 1, "my secret\nis"),
        (str(tmp_path / "a.csv"), 2, "another\none"),
    ]


def test_a_corpus_may_be_an_iterable():
    """A generator, of texts and dicts; strings in a list that are no paths are texts."""
    assert read(row for row in ("a", {"text": "b"})) == [("corpus", 1, "a"), ("corpus", 2, "b")]
    assert read(["a.txt b", "c"])[0] == ("corpus", 1, "a.txt b")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'"one"\n{"text": \n', "a.jsonl, line 2, is not JSON: Expecting value at column"),
        ("a.jsonl", b'"one"\n{"id": 2}\n', 'a.jsonl, line 2, has no text: .* found "id"'),
        ("a.jsonl", b'"one"\n"\xff"\n', "a.jsonl is not UTF-8 text: invalid start byte"),
        ("a.json", b"[1", "a.json is not JSON: .* at line 1, column 3"),
        ("a.json", b"5", "a.json must hold a list of objects"),
        ("a.json", b'["one", {"id": 3}]', "a.json, row 2, has no text"),
        ("a.csv", b"text\none\ntwo, three\n", "a.csv, line 3, has 2 fields under 1 columns: quote texts"),
        ("a.csv", b'text\n"one" two\n', "a.csv, line 2, is malformed"),
        ("a.parquet", b"PAR", "a.parquet cannot be read as parquet"),
        ("a.md", b"one", "a.md should end in one of .jsonl, "),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(name, content, message, tmp_path):
    """In one sentence, with the line."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)
    refusal(tmp_path / name)


@pytest.mark.parametrize(
    "source", ["missing.jsonl", "missing", "", "a\0b", 5, None, b"x", {"text": "a"}, Example("", "a")]
)
def test_a_source_that_is_none_is_refused(source):
    """Before anything is read; a string is a path, not a text."""
    with pytest.raises(DataError):
        Corpus(source)


def test_a_folder_without_texts_is_refused(tmp_path):
    """As is the second of two files that is missing."""
    assert "has no file that ends in one of" in refusal(tmp_path)
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(DataError, match=r"b\.txt was not found"):
        Corpus([tmp_path / "a.txt", tmp_path / "b.txt"])
