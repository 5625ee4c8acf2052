"""Examples: texts, pairs, chats, datasets and files are read alike, and one sentence refuses all else."""

import builtins
import csv
import json
import os
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from texts import CHAT, read, sentence_of

from pyunlearn.data import Example, Message, read_examples
from pyunlearn.errors import DataError, DependencyError


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("We hold these truths", [Example("", "We hold these truths")]),
        ("two lines\nof a.txt", [Example("", "two lines\nof a.txt")]),
        (["a", "b.txt"], [Example("", "a"), Example("", "b.txt")]),
        ([{"text": "a"}, "b"], [Example("", "a"), Example("", "b")]),
        ({"text": "a"}, [Example("", "a")]),
        (({"prompt": "Who?", "completion": "He."},), [Example("Who? ", "He.")]),
        ([{"prompt": "Who? ", "completion": "He."}], [Example("Who? ", "He.")]),
        ([{"prompt": "The sky is", "completion": " blue"}], [Example("The sky is", " blue")]),
        ([{"prompt": "天空是", "completion": "蓝色"}], [Example("天空是", "蓝色")]),
        ([{"prompt": "", "completion": "a"}], [Example("", "a")]),
        ([{"prompt": "p", "completion": "c", "text": "ignored", "id": 7}], [Example("p ", "c")]),
        ([{"text": "a", "prompt": None, "completion": None}], [Example("", "a")]),
        ([Example("def f(", "x):")], [Example("def f(", "x):")]),
        (Example("un", "learn"), [Example("un", "learn")]),
    ],
)
def test_texts_and_pairs_become_examples(source, expected):
    """Strings, dicts and Examples are read alike; a space joins a pair only where words would collide."""
    assert read(source) == expected


def test_questions_and_chats_keep_their_turns_beside_a_plain_rendering():
    """A chat template can have the turns, and a tokenizer without one has text."""
    (question,) = read([{"question": "Who?", "answer": "He."}])
    assert question == Example("Who?\n", "He.", (Message("user", "Who?"), Message("assistant", "He.")))
    chat = Example("system: Be brief.\nuser: Who wrote it?\nassistant: ", "Thomas Jefferson.", tuple(
        Message(**turn) for turn in CHAT
    ), turns="all")  # fmt: skip
    assert read([{"messages": CHAT}]) == [chat]
    assert read([{"prompt": CHAT[:2], "completion": CHAT[2:]}]) == read([{"messages": CHAT}], turns="last")
    parts = [{"role": "user", "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "wrote it?"}]}]
    assert read([{"messages": [CHAT[0], *parts, CHAT[2]]}]) == [chat]
    assert read([{"messages": [{"role": "system", "content": ""}, *CHAT[1:]]}])[0].messages[0] == Message("system", "")


def test_a_dataset_is_read_row_by_row_without_being_imported():
    """A datasets.Dataset, and a column of one, are read by their shape alone."""
    dataset = datasets.Dataset.from_dict({"prompt": ["p", "q"], "completion": [" c", " d"], "id": [1, 2]})
    assert read(dataset) == [Example("p", " c"), Example("q", " d")]
    assert read(dataset["prompt"]) == [Example("", "p"), Example("", "q")]
    chats = datasets.Dataset.from_list([{"messages": CHAT}])
    assert read(chats) == read([{"messages": CHAT}])
    with pytest.raises(DataError, match=r'several splits, "train": pass one of them') as error:
        read(datasets.DatasetDict(train=dataset))
    sentence_of(error)


ROWS = [{"prompt": 'He said "a, b"\tto\u2028us', "completion": "x\ny" * 50_000}, {"prompt": "p", "completion": "é"}]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".data.json", ".lines.json", ".csv", ".tsv", ".parquet", ".CSV"])
@pytest.mark.parametrize("as_string", [True, False])
def test_every_file_format_gives_the_same_rows(tmp_path, suffix, as_string):
    """What was written is what is read, with quotes, separators, line ends, U+2028 and a very long field in it."""
    path = tmp_path / f"facts{suffix}"
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif suffix in (".csv", ".tsv", ".CSV"):
        with path.open("w", encoding="utf-8-sig", newline="") as file:  # with the mark that spreadsheets put
            writer = csv.DictWriter(file, ROWS[0], delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        content = {".json": json.dumps(ROWS), ".data.json": json.dumps({"data": ROWS})}.get(suffix, lines)
        path.write_text(content, encoding="utf-8")
    limit = csv.field_size_limit()
    assert read(str(path) if as_string else path) == read(ROWS)
    assert csv.field_size_limit() == limit


def test_a_text_file_is_paragraphs_or_else_lines(tmp_path):
    """A book is parted at its blank lines, a list of sentences at its line ends."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"\nfirst line\r\nsecond line\r\n \r\nnext\r\n\r\n")
    assert read(path) == [Example("", "first line\nsecond line"), Example("", "next")]
    path.write_text("first\nsecond\n\n")
    assert read(path) == [Example("", "first"), Example("", "second")]


def test_a_table_may_end_its_lines_in_any_way(tmp_path):
    """As Linux, Windows and old spreadsheets do."""
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "a.csv").write_bytes(end.join(["text,id", "a,1", "", "b,2"]).encode())
        assert read(tmp_path / "a.csv") == [Example("", "a"), Example("", "b")]


def test_strings_that_are_not_paths_stay_texts(tmp_path, monkeypatch):
    """A long line, a NUL and a text that no file is named after are texts; the name of an existing file is a path."""
    monkeypatch.chdir(tmp_path)
    for text in ("word " * 5000, "a\0b", "notes", "see notes.md"):
        assert read(text) == [Example("", text)]
    (tmp_path / "notes").write_text("x")
    with pytest.raises(DataError, match="should end in one of"):
        read("notes")
    assert read(["notes"]) == [Example("", "notes")]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", 'the forget text has an empty "text"'),
        ([], "forget holds no example"),
        (["a", " \n"], 'forget example 2 has an empty "text"'),
        (None, "forget must be a text, a path, a list .* and is of type NoneType"),
        (7, "is of type int"),
        (b"bytes", "is of type bytes"),
        (["a", 7], "forget example 2 must be a string or an object .* is of type int"),
        ([{"text": 7}], 'forget example 1 must have a string as "text", and has a value of type int'),
        ([{"text": None}], 'no usable column: .* found only empty ones: "text"$'),
        (
            [{"sentence": "a", "id": 1}],
            'wanted "text", .* or "messages", found "sentence", "id"; rename the column of the text to "text"$',
        ),
        ([{}], "found none"),
        ([{"text": "\u200b\u2060\ufeff"}], 'has an empty "text"'),
        ([{"my secret": "a"}, {}], "found 1 other; rename the column of the text"),
        ([{"messages": [{"role": "my secret", "content": "a"}]}], "and has: 1 other$"),
        ([{"prompt": "p", "completion": "c"}, {"prompt": "p"}], 'forget example 2 has a "prompt" without "completion"'),
        ([{"prompt": "p", "completion": ""}], 'has a "prompt" without "completion"'),
        ([{"question": "q", "answer": None}], 'has a "question" without "answer"'),
        ([{"prompt": 7, "completion": "c"}], 'must have a string as "prompt"'),
        ([{"prompt": "p", "completion": ["a"]}], 'must have a string as "completion", and has a value of type list'),
        ([{"text": "\ud83d"}], "not valid Unicode: character 1"),
        ([Example("p", "")], 'forget example 1 has an empty "completion"'),
        ([{"messages": "hello"}], 'must have a list of objects as "messages"'),
        ([{"messages": []}], "and has: none"),
        ([{"messages": CHAT[:2]}], "must have messages that end with one by the assistant .* has: .system., .user."),
        ([{"messages": CHAT[2:]}], "after another's, and has: .assistant."),
        (
            [{"messages": [*CHAT[:1], {"role": "assistant"}]}],
            'message 2 of forget example 1 .* "content", and has "role"',
        ),
        ([{"messages": [*CHAT[:1], {"role": "assistant", "content": None}]}], 'must have a string as "content"'),
    ],
)
def test_an_unusable_source_is_refused_in_one_sentence(source, message):
    """The sentence says whose text it is, which example, what was wanted and what came."""
    with pytest.raises(DataError, match=message) as error:
        read(source)
    sentence_of(error)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "the forget file .*a.jsonl is empty"),
        ("a.txt", " \n\n", "is empty"),
        ("a.json", "[]", "holds no example"),
        ("a.csv", "text\n", "holds no example"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": }\n', "line 3, is not JSON: Expecting value at column 10"),
        ("a.jsonl", '{"text": "a"}\n{"id": 1}\n', 'line 2, has no usable column: .* found "id"'),
        ("a.jsonl", '{"prompt": "a"}\n', 'line 1, has a "prompt" without "completion"'),
        ("a.json", '[{"text": "a"},\n]', "is not JSON: .* at line [12], column"),
        ("a.json", "7", "must hold a list of objects or strings, .* and holds a value of type int"),
        ("a.csv", "sentence\na\n", 'row 1, has no usable column: .* found "sentence"; rename'),
        ("a.csv", "Title,Text\na,b\n", 'found "Title", "Text"; rename the column of the text to "text"$'),
        ("a.csv", " text ,label\na,b\n", 'found " text ", "label"; rename the column of the text to "text"$'),
        (
            "a.csv",
            "My secret is 4711\na\n",
            "row 1, has no usable column: .* found 1 other; rename the column of the text",
        ),
        ("a.csv", "text,text\na,b\n", "has two columns of the same name"),
        ("a.jsonl", '{"text": "a", "text": "b"}\n', "line 1, cannot be used: an object has a key twice"),
        ("a.json", '{"text": "a", "text": "b"}', "cannot be used: an object has a key twice"),
        ("a.jsonl", "[" * 100_000, "line 1, cannot be used: its brackets are nested too deeply"),
        ("a.json", "[" * 100_000, "cannot be used: its brackets are nested too deeply"),
        ("a.jsonl", '{"text": ' + "7" * 10_000 + "}", "line 1, cannot be used: a number has 10000 digits"),
        ("a.csv", "text\na\nHello, world\n", "row 2, has 2 fields under 1 columns: quote texts"),
        ("a.csv", "prompt,completion\na,b\nc\n", 'row 2, has a "prompt" without "completion"'),
        ("a.csv", 'text\na\n"b\n', "row 2, is malformed: unexpected end of data"),
        ("a.txt", b"caf\xe9", "is not UTF-8 text, as byte 4 shows"),
        ("a.parquet", b"PAR0", "cannot be read as parquet"),
        ("a.docx", "x", "should end in one of .jsonl, .json"),
    ],
)
def test_an_unusable_file_is_refused_in_one_sentence(tmp_path, name, content, message):
    """The sentence names the file and the line or row."""
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as error:
        read(path)
    sentence_of(error)


@pytest.mark.parametrize("source", ["no/such.jsonl", "gone.txt", Path("gone")])
def test_a_missing_file_is_never_taken_for_a_text(source):
    """A string that ends like a supported file, and any Path, has to exist."""
    with pytest.raises(DataError, match="was not found: check the path") as error:
        read_examples(source, role="holdout")
    assert sentence_of(error).startswith("the holdout file ")


def test_a_folder_and_an_unreadable_file_are_refused(tmp_path):
    """Neither ends in a traceback of the operating system."""
    with pytest.raises(DataError, match="is a folder"):
        read(tmp_path)
    if os.name == "posix" and os.geteuid():
        path = tmp_path / "a.txt"
        path.write_text("x")
        path.chmod(0)
        with pytest.raises(DataError, match="cannot be read: Permission denied"):
            read(path)


def test_parquet_without_pyarrow_says_how_to_install_it(tmp_path, monkeypatch):
    """pyarrow is optional, and only parquet needs it."""
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DependencyError, match="pip install pyarrow") as error:
        read(tmp_path / "a.parquet")
    sentence_of(error)
