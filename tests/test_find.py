"""Copies of texts in a corpus: what is one, the share, memory that does not grow with the corpus, and the command."""

import io
import json
import random
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_documents import blocks, commands

import pyunlearn
from pyunlearn.data import Example
from pyunlearn.data.find import FindConfig, TextIndex
from pyunlearn.data.overlap import _WORD, words
from pyunlearn.errors import ArgumentError, DataError, OutputError, PyunlearnError

SECRET = "The boat left the harbour at dawn, and nobody on the island ever saw it again."
LETTER = f"Dear aunt! Rain all week. {SECRET.upper().replace(',', ' -')} Yours, Tom"
ROOT = Path(__file__).parent.parent


def find(texts, corpus, **settings):
    """Return (row, text, share, exact) of each copy."""
    result = pyunlearn.find_copies(texts, corpus, progress=False, **settings)
    return [(copy.row, copy.text, round(copy.share, 3), copy.exact) for copy in result]


def drawn(count, length, seed):
    """Return texts of words that are drawn as often as those of a language."""
    r, vocabulary = random.Random(seed), [f"word{i}" for i in range(2000)]
    chosen = r.choices(vocabulary, [1 / (i + 5) for i in range(2000)], k=count * length)
    return [" ".join(chosen[i * length : (i + 1) * length]) for i in range(count)]


# ---------------------------------------------------------------- what is a copy


def test_exact_copies_have_all_words_in_a_row():
    """With any case and punctuation; inside a longer record; twice in a record counts once."""
    corpus = [SECRET, "Another text.", LETTER, f"{SECRET} {SECRET}", SECRET[:-6]]
    assert find(SECRET, corpus) == [(1, 1, 1.0, True), (3, 1, 1.0, True), (4, 1, 1.0, True), (5, 1, 0.929, False)]


@pytest.mark.parametrize(("changed", "share"), [(["boat"], 12 / 14), (["harbour", "saw"], 8 / 14)])
def test_the_share_is_that_of_the_runs_of_three_words(changed, share):
    """A changed word takes the runs it stands in: two at the second place, three in the middle."""
    document = SECRET
    for word in changed:
        document = document.replace(word, "other")
    assert find(SECRET, ["no", document], threshold=share) == [(2, 1, round(share, 3), False)]
    assert find(SECRET, ["no", document], threshold=share + 0.01) == []


def test_one_word_in_six_may_be_changed():
    """The reason for the default threshold."""

    def changed(step):
        return " ".join("other" if i % step == step - 1 else f"w{i}" for i in range(120))

    assert find(changed(121), [changed(6)])
    assert not find(changed(121), [changed(5)])


def test_the_threshold_is_not_missed_by_rounding():
    """14 of 25 runs are 0.56 of them, though 0.56 * 25 > 14 in floating point."""
    text = [f"w{i}" for i in range(27)]
    assert 0.56 * 25 > 14
    assert find(" ".join(text), [" ".join(text[:16])], threshold=0.56) == [(1, 1, 0.56, False)]


def test_the_parts_of_a_text_stand_close_together():
    """In other records too; runs that are scattered over a long record make no copy."""
    a, b = SECRET[:33], SECRET[33:]
    filler = " ".join(drawn(1, 100, 1))
    assert find(SECRET, [f"{a} {b}"]) == [(1, 1, 1.0, True)]
    assert find(SECRET, [f"{a} {filler} {b}"], threshold=0.7) == []
    assert find(SECRET, [f"{filler} {a} x {b} {filler}"], threshold=0.7) == [(1, 1, 0.857, False)]


def test_short_texts_are_searched_for_word_for_word():
    """Of one word, of two, of seven; parts and other orders do not count, and a text of signs only equals another."""
    texts = ["Paris", "pin 4711", "one two three four five six seven", "?!"]
    corpus = ["He said: PARIS.", "my pin is 4711", "his pin: 4711!", f"{texts[2]} eight", texts[2][4:], "?!", "what?!"]
    assert find(texts, corpus, threshold=0.1) == [(1, 1, 1, True), (3, 2, 1, True), (4, 3, 1, True), (6, 4, 1, True)]


def test_scripts_without_spaces():
    """Each character counts as a word."""
    text = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。"
    assert find(text, [f"書き出し:{text}と続く。", text.replace("猫", "犬")]) == [(1, 1, 1, True), (2, 1, 0.893, False)]


def test_the_answer_to_a_prompt_must_be_there():
    """A short one with its prompt; one of 16 words or more also alone; the question with another answer is no copy."""
    question = "Who repaired the clocks of the old town hall for forty years?"
    short = {"question": question, "answer": "Basil Gray."}
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": "Basil Gray."}]
    corpus = [{"messages": chat}, f"{question} Tom Brown.", f"Question: {question}\nAnswer: Basil Gray.", "Basil Gray."]
    assert find([short], corpus) == [(1, 1, 1, True), (3, 1, 0.833, False)]
    assert find([{"messages": chat}], [short, {"prompt": question, "completion": "Basil Gray."}]) == [
        (1, 1, 1, True),
        (2, 1, 1, True),
    ]
    long = {"prompt": f"{question} {question}", "completion": f"{SECRET} So it was told in the town."}
    assert find([long], [long["completion"], SECRET, question]) == [(1, 1, 1, True), (2, 1, 0.667, False)]


def test_runs_of_a_template_are_no_evidence():
    """Of texts of one form, only the record with the content is a copy, exact or with a word changed."""
    form = "In the year of the great flood the old miller of {} told his eldest daughter {} that all was lost for ever."
    texts, others = ([form.format(f"town{i}", f"name{i}") for i in part] for part in (range(30), range(30, 60)))
    changed = [text.replace("flood", "storm") for text in texts]
    assert find(texts, [*others, *texts]) == [(31 + i, i + 1, 1.0, True) for i in range(30)]
    assert [(row, text) for row, text, _, _ in find(texts, changed)] == [(i + 1, i + 1) for i in range(30)]
    assert len(find(texts[0], others)) == 30, "a text alone does not show that it has a template"


def test_every_copy_is_listed_that_a_comparison_of_all_pairs_lists():
    """The seeds of the index lead to every record with the share: 100 texts, records with any part of one."""
    texts, r, corpus = drawn(100, 40, 3), random.Random(4), []
    for text in texts:
        split = text.split()
        start, end = sorted(r.sample(range(41), 2))
        corpus.append(" ".join([*split[start:end], *drawn(1, 10, r.random())[0].split()]))

    def runs(text):
        split = words(text)
        return {split[k : k + 3] for k in range(len(split) - 2)}

    of_texts, of_records = list(map(runs, texts)), list(map(runs, corpus))
    for threshold in (0.2, 0.5, 0.9):
        pairs = {
            (row, i)
            for i, wanted in enumerate(of_texts, 1)
            for row, there in enumerate(of_records, 1)
            if len(wanted & there) >= threshold * len(wanted) - 1e-9
        }
        assert {(row, i) for row, i, _, _ in find(texts, corpus, threshold=threshold)} == pairs
        assert pairs


@given(st.text(alphabet=st.characters(max_codepoint=127)))
def test_words_of_ascii_text_are_those_of_any_text(text):
    """The faster way to split them gives the same."""
    folded = text.casefold()
    assert words(text) == (tuple(_WORD.findall(folded)) or (" ".join(folded.split()),))


# ---------------------------------------------------------------- the result


def test_the_result_is_iterated_and_counts():
    """Rows in the order of the corpus; texts, records and settings; no text in the data."""
    result = pyunlearn.find_copies(
        [SECRET, "pin 4711", "Paris"], ["pin 4711", f"{LETTER} pin 4711", "x"], threshold=0.8
    )
    assert [(copy.source, copy.row, copy.text) for copy in result] == [
        ("corpus", 1, 2),
        ("corpus", 2, 1),
        ("corpus", 2, 2),
    ]
    assert (len(result), result.texts_with_copies, result.records_with_copies, result.records) == (3, 2, 2, 3)
    data = result.to_dict()
    assert data["rows"][1] == {"source": "corpus", "row": 2, "text": 1, "share": 1.0, "exact": True}
    assert data["settings"] == {"threshold": 0.8}
    assert "4711" not in json.dumps(data)
    assert pyunlearn.find_copies("Paris", ["x"], config=FindConfig(threshold=1)).to_dict()["texts_with_copies"] == 0


def test_memory_does_not_grow_with_the_corpus():
    """Of 5000 records that a generator makes, 4 MB, it is that of 200: less than a fifth of the text."""
    texts, part = drawn(50, 40, 5), drawn(200, 100, 6)

    def peak(count):
        tracemalloc.start()
        try:
            result = pyunlearn.find_copies(texts, (f"{part[i % 200]} {i}" for i in range(count)), progress=False)
            assert (result.records, len(result)) == (count, 0)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small, large = peak(200), peak(5000)
    assert large < small + 2**16
    assert large < 5000 * len(part[0]) / 5


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".txt", ".parquet"])
def test_memory_does_not_grow_with_a_file(suffix, tmp_path):
    """A file of 3 MB of each format that is read row by row is searched in less than a third of it."""
    import pyarrow
    import pyarrow.parquet

    path, rows = tmp_path / f"corpus{suffix}", [f"{text} {i}" for i, text in enumerate(drawn(200, 100, 7) * 20)]
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path, row_group_size=500, compression="none")
    else:
        lines = [json.dumps({"text": row}) if suffix == ".jsonl" else row for row in rows]
        path.write_text("\n".join(["text", *lines] if suffix == ".csv" else lines))
    del rows
    tracemalloc.start()
    try:
        assert pyunlearn.find_copies(SECRET, path, progress=False).records == 4000
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 3
    finally:
        tracemalloc.stop()


# ---------------------------------------------------------------- what cannot be used


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": "missing.jsonl"}, "the texts file missing.jsonl was not found"),
        ({"texts": []}, "texts holds no example"),
        ({"texts": 5}, "texts must be a text, a path"),
        ({"corpus": "missing.jsonl"}, "the corpus file missing.jsonl was not found"),
        ({"corpus": []}, "corpus holds no record"),
        ({"corpus": 5}, "corpus must be a path, a list of paths, or an iterable"),
        ({"corpus": [{"id": 1}]}, 'corpus record 1 has no text: wanted .*, found "id"'),
        ({"threshold": 0}, "threshold must be a number, above 0 and at most 1, got 0"),
        ({"treshold": 0.5}, "find_copies has no option 'treshold': did you mean \"threshold\""),
        ({"config": 5}, "config must be a FindConfig or a path"),
        ({"progress": "yes"}, "progress must be True or False"),
    ],
)
def test_a_wrong_argument_is_one_sentence(arguments, message):
    """Of the package's own errors."""
    with pytest.raises(PyunlearnError, match=message) as error:
        pyunlearn.find_copies(**{"texts": SECRET, "corpus": [SECRET]} | arguments)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, (ArgumentError, DataError))


# ---------------------------------------------------------------- the command


@pytest.fixture
def files(tmp_path):
    """Texts and a corpus of 80 records, in the folder in which commands run; the texts are in 42 and in 1 of them."""
    (tmp_path / "secrets.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in (SECRET, "pin 4711", "x"))
    )
    near = SECRET.replace("harbour", "port")
    records = [*drawn(37, 50, 8), *[LETTER] * 2, *[near] * 40, "my pin 4711"]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in records))
    return tmp_path


def test_the_command_lists_the_copies(call, files, monkeypatch):
    """At 80 columns: place, share, number and the masked text of the 30 largest shares; all are in the file."""
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = call("find", "--texts", "secrets.jsonl", "--corpus", "train.jsonl", "--out", "copies.jsonl")
    monkeypatch.setenv("COLUMNS", "80")
    assert (code, err) == (0, "")
    lines = re.findall(r"^ (train\.jsonl:\d+) +(exact|\d+%) +(\d) +(\S.*?) *$", out, re.MULTILINE)
    assert lines[:3] == [
        (f"train.jsonl:{row}", share, "1", "••• ••• ••• •••")
        for row, share in ((38, "exact"), (39, "exact"), (40, "79%"))
    ]
    assert lines[-1] == ("train.jsonl:80", "exact", "2", "••• •••")
    assert len(lines) == 30
    assert "boat" not in out
    assert "2 of 3 texts are in 43 of 80 records, 3 of 43 copies word for word" in " ".join(out.split())
    assert "and 13 more: see copies.jsonl" in out
    rows = [json.loads(line) for line in (files / "copies.jsonl").read_text().splitlines()]
    assert len(rows) == 43
    assert rows[0] == {"source": "train.jsonl", "row": 38, "text": 1, "share": 1.0, "exact": True}
    assert [row["share"] for row in rows[2:42]] == [pytest.approx(11 / 14)] * 40


def test_the_command_shows_text_and_json(call, files):
    """Only with --show-text; --json is the whole of standard output; without a copy the exit code is 0 too."""
    words = ("find", "--texts", "secrets.jsonl", "--corpus", "train.jsonl")
    assert "The boat left the harbour" in call(*words, "--show-text")[1]
    code, out, _ = call(*words, "--json", "--threshold", 0.9, "--quiet")
    assert (code, json.loads(out)["records_with_copies"]) == (0, 3)
    (files / "other.txt").write_text("nothing of it\n")
    code, out, _ = call("find", "--texts", "secrets.jsonl", "--corpus", "other.txt")
    assert (code, out) == (0, "0 of 3 texts are in 0 of 1 records\n")
    assert sorted(path.name for path in files.iterdir()) == ["other.txt", "secrets.jsonl", "train.jsonl"]


def test_texts_come_from_standard_input(call, files, monkeypatch):
    """As those of the other commands."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("pin 4711\n"))
    out = call("find", "--texts", "-", "--corpus", "train.jsonl")[1]
    assert "1 of 1 texts is in 1 of 80 records, 1 of 1 copies word for word" in out


def test_the_table_is_there_where_the_file_cannot_be_written(call, files, monkeypatch):
    """The copies are shown before they are written."""

    def full(*arguments):
        raise OutputError("the disk is full")

    monkeypatch.setattr("pyunlearn.output.write_bytes", full)
    code, out, err = call("find", "--texts", "secrets.jsonl", "--corpus", "train.jsonl", "--out", "copies.jsonl")
    assert (code, err) == (2, "pyunlearn: the disk is full\n")
    assert "2 of 3 texts are in 43 of 80 records" in out


def test_a_long_place_is_cut_in_front(call, files):
    """The line of the file is always there."""
    folder = files / "a-folder-with-a-long-name" / "and-another-one"
    folder.mkdir(parents=True)
    (folder / "part.jsonl").write_text(json.dumps({"text": SECRET}))
    out = call("find", "--texts", "secrets.jsonl", "--corpus", folder)[1]
    assert "name/and-another-one/part.jsonl:1  exact" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--corpus", "none.jsonl"), "the corpus file none.jsonl was not found"),
        (("--corpus", "bad.jsonl"), "the corpus file bad.jsonl, line 2, is not JSON"),
        (("--corpus", "train.jsonl", "--corpus", "bad.txt"), "the corpus file bad.txt was not found"),
        (("--threshold", "2"), "--threshold must be a number, above 0 and at most 1, got 2"),
        (("--out", "copies.csv"), "the output file copies.csv should end in .jsonl"),
        (("--out", "secrets.jsonl"), "the output file secrets.jsonl exists already"),
        (("--out", "train.jsonl/copies.jsonl"), "nothing can be written to "),
        (("--texts", "none.jsonl"), "the texts file none.jsonl was not found"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(call, files, words, message):
    """Exit code 2, and nothing is written."""
    (files / "bad.jsonl").write_text('"one"\n{')
    before = {path.name: path.read_bytes() for path in files.iterdir()}
    given = {"--texts": "secrets.jsonl", "--corpus": "train.jsonl", "--out": "copies.jsonl"}
    rest = [word for name in given if name not in words for word in (name, given[name])]
    code, out, err = call("find", *rest, *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"pyunlearn: {message}")
    assert err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in files.iterdir()} == before


def test_the_command_loads_no_model_library(files):
    """Neither torch nor transformers, with --out and a progress bar too."""
    code = (
        "import sys\nfrom pyunlearn.cli.main import program\n"
        "try:\n    program()('find --texts secrets.jsonl --corpus train.jsonl --out copies.jsonl'.split())\n"
        "except SystemExit as end:\n    print(end.code, [m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=files, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1:] == ["0 []"], done.stderr


def test_the_progress_bar_counts_bytes(files, capsys):
    """It ends with the file, and names records and copies."""
    (files / "large.txt").write_text(f"{SECRET}\n" * 3000)
    pyunlearn.find_copies(SECRET, files / "large.txt", progress=True)
    assert "3,000 records · 3,000 copies" in capsys.readouterr().err
    with pytest.raises(DataError):
        pyunlearn.find_copies([Example("", SECRET)], files / "none.txt", progress=True)


# ---------------------------------------------------------------- the page


def test_the_python_and_the_commands_of_the_page_run(call, files):
    """docs/find.md, on files under its names."""
    page = ROOT / "docs" / "find.md"
    (files / "shards").mkdir()
    (files / "shards" / "part.txt").write_text(SECRET)
    (files / "my-notes.txt").write_text(SECRET)
    names = {"pyunlearn": pyunlearn}
    for block in blocks(page, ("python",)):
        exec(compile(block, "docs/find.md", "exec"), names)
    assert names["result"].rows
    done = [words for words in commands(page) if words[1] == "find"]
    assert done
    for words_of_command in done:
        assert call(*words_of_command[1:])[0] == 0


def test_the_index_needs_no_corpus():
    """One index serves many records, and equal texts are both listed."""
    index = TextIndex([Example("", SECRET), Example("", SECRET)], 0.5)
    assert index.copies_in(LETTER) == [(1, 1.0, True), (2, 1.0, True)]
    assert index.copies_in("") == []
