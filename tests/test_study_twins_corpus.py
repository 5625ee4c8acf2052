"""The corpus of setup twins: texts with doses, no two of which read alike, and one sentence where it cannot be used."""

import csv

import pytest
import tiny
from twin_texts import SETTINGS, UNSEEN, config_of, dosed, read, texts_of, write

from pyunlearn.data import Example
from pyunlearn.errors import DataError
from pyunlearn.study import run_study
from pyunlearn.study import twins as study_twins
from pyunlearn.study.corpus import Dosed, read_doses
from pyunlearn.study.twins import twin_sets

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

CORPORA = [
    (lambda rows: [{"text": r["text"]} for r in rows], 'line 1, has nothing in a column "duplicates" or "dose"'),
    (lambda rows: [r["text"] for r in rows], 'line 1, has nothing in a column "duplicates" or "dose"'),
    (lambda rows: [r | {"duplicates": float("nan")} for r in rows], 'line 1, has nothing in a column "duplicates"'),
    (lambda rows: [r | {"duplicates": ""} for r in rows], 'line 1, has nothing in a column "duplicates"'),
    (lambda rows: [r | {"duplicates": float("inf")} for r in rows], "must have a whole number, 0 or more, in column"),
    (lambda rows: [r | {"duplicates": True} for r in rows], "must have a whole number, 0 or more, in column"),
    (
        lambda rows: [r | {"duplicates": 0} for r in rows],
        r"needs 12 texts of kind id and dose 2 .* has 0 \(55 of",
    ),
    (lambda rows: [r | {"duplicates": -1} for r in rows], "must have a whole number, 0 or more, in column"),
    (lambda rows: [r | {"duplicates": 1.5} for r in rows], "must have a whole number, 0 or more, in column"),
    (lambda rows: [r | {"kind": "poem"} for r in rows], "must have one of id, mismatched, canary, random in column"),
    (lambda rows: [r | {"kind": "canary"} for r in rows], r"needs 12 texts of kind id .* \(none of this kind\)"),
    (lambda rows: rows[UNSEEN:], "needs 31 texts of kind id and dose 0 for non-members and test"),
    (lambda rows: rows[:-1], r"needs 12 texts of kind id and dose 16 for its forget sets, and the corpus has 11"),
    (lambda rows: [*rows, rows[0] | {"duplicates": 16}], "has a text that stands before it with another dose"),
]


@pytest.mark.parametrize(("change", "message"), CORPORA)
def test_a_corpus_that_cannot_be_used_is_one_sentence(tmp_path, monkeypatch, change, message):
    """It says what is missing, before a model is loaded and anything is written."""
    monkeypatch.setattr("pyunlearn.study.study.twin_tokenizer", lambda *_: tiny.make_tokenizer())
    corpus = write(tmp_path / "corpus.jsonl", change(dosed()))
    with pytest.raises(DataError, match=message) as caught:
        run_study(tmp_path / "out", **{**SETTINGS, "checkpoint": "seen", "twin": "unseen", "corpus": corpus})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_texts_that_are_not_used_are_counted(tmp_path, monkeypatch):
    """Of other doses and kinds than the settings name; the same row twice is one text; doses may be strings."""
    lines = []
    monkeypatch.setattr(study_twins.logger, "warning", lines.append)
    rows = [r | {"dose": str(r.pop("duplicates"))} for r in dosed()]
    extra = [{"text": f"extra text {n}", "dose": "64"} for n in range(3)]
    texts = read([*rows, *rows, *extra], tmp_path)
    assert len(texts) == len(rows) + 3
    assert texts[0] == Dosed(Example("", rows[0]["text"]), "id", 0)
    twin_sets(config_of(kinds=("id",)), texts, None, tiny.make_tokenizer())
    assert lines == ["3 texts of the corpus are not used: their kind is none of id, or their dose none of 0, 2, 16"]


def test_tables_of_pandas_are_read(tmp_path):
    """A column in which some values are missing has floats, and NaN in their places: in JSON, CSV and Parquet."""
    nan, texts = float("nan"), texts_of(4, 7)
    rows = [
        {"text": text, "duplicates": duplicates, "dose": dose, "kind": kind}
        for text, duplicates, dose, kind in zip(
            texts, [4.0, nan, 0.0, 256.0], [nan, 2.0, nan, nan], ["canary", nan, nan, None], strict=True
        )
    ]
    wanted = [("canary", 4), ("id", 2), ("id", 0), ("id", 256)]
    assert [(t.kind, t.dose) for t in read(rows, tmp_path)] == wanted
    with open(tmp_path / "corpus.csv", "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows({k: "" if v is None or v != v else v for k, v in row.items()} for row in rows)
    assert [(t.kind, t.dose) for t in read_doses([tmp_path / "corpus.csv"])] == wanted
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {k: [row[k] for row in rows] for k in ("text", "duplicates", "dose")}
    parquet.write_table(arrow.table(columns), tmp_path / "corpus.parquet")
    assert [t.dose for t in read_doses([tmp_path / "corpus.parquet"])] == [4, 2, 0, 256]


def test_texts_that_read_alike_when_they_are_cut_are_left_out(tmp_path, monkeypatch):
    """None of them: a text of dose 0 would begin as one that was inserted; a warning counts them."""
    lines = []
    monkeypatch.setattr(study_twins.logger, "warning", lines.append)
    rows, config, tokenizer = dosed(), config_of(kinds=("id",)), tiny.make_tokenizer()
    begin = " ".join(texts_of(8, 8))
    alike = [{"text": f"{begin} {end}", "duplicates": dose} for end, dose in (("one", 0), ("two", 16), ("three", 2))]
    sets = twin_sets(config, read([*alike, *rows], tmp_path), None, tokenizer)
    assert lines == [
        "3 texts of the corpus have the same tokens as another one, cut to max_tokens 48: they are left out, since the "
        "dose of what they share is not that of one text"
    ]
    assert [t.ids for t in sets.tokens] == [
        t.ids for t in twin_sets(config, read(rows, tmp_path), None, tokenizer).tokens
    ]
    with pytest.raises(DataError, match=r"needs 12 texts of kind id and dose 16 .* has 11"):
        twin_sets(config, read([*alike, *rows[:-1]], tmp_path), None, tokenizer)


def test_test_texts_that_are_in_a_set_are_left_out(tmp_path, monkeypatch):
    """The same text, one cut to the same tokens, and a passage of one; too few left is one sentence."""
    lines = []
    monkeypatch.setattr(study_twins.logger, "warning", lines.append)
    long = " ".join(texts_of(8, 8))
    rows = [*dosed()[:-1], {"text": long, "duplicates": 16}]
    config, tokenizer, other = config_of(kinds=("id",)), tiny.make_tokenizer(), texts_of(12, 9)
    words = long.split()
    same = [rows[-2]["text"], f"{long} more", "  ".join(words[30:40])]
    test = [Example("", t) for t in [*same, *other]] + [Example(" ".join(words[50:54]), " " + " ".join(words[54:60]))]
    texts = read(rows, tmp_path)
    sets = twin_sets(config, texts, test, tokenizer)
    assert lines == [
        "4 examples of the test corpus are in the forget sets or among the non-members too: they are left out of the "
        "test"
    ]
    assert [tokenizer.decode(sets.tokens[i].ids[1:]) for i in sets.test] == other
    with pytest.raises(DataError, match="has 11 examples that are in no forget set, and test_examples is 12: lower it"):
        twin_sets(config, texts, [*test[:3], *test[4:]], tokenizer)
    with pytest.raises(DataError, match="has 1 examples, and test_examples is 12: lower it"):
        twin_sets(config, texts, test[3:4], tokenizer)
