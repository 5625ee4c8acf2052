"""A folder with a comparison takes further rows of the same comparison alone."""

import json
import re

import pytest
import tiny
import torch

import pyunlearn
from pyunlearn.comparing import Comparison
from pyunlearn.errors import OutputError

RETAIN, HOLDOUT = tiny.sentences(5, 1), tiny.sentences(20, 2)


def make_model(seed):
    torch.manual_seed(seed)
    return tiny.tiny_llama(len(tiny.make_tokenizer()))


@pytest.fixture(scope="module")
def model():
    return make_model(0)


@pytest.fixture
def compare(model, tmp_path):
    """Compare in one folder; methods that take no step are quick."""

    def run(**options):
        texts = {"forget": tiny.sentences(2, 3), "retain": RETAIN, "holdout": HOLDOUT}
        fixed = {"output_dir": tmp_path / "c", "max_steps": 0, "plot": False, "progress": False}
        return pyunlearn.compare(model, tokenizer=tiny.make_tokenizer(), **{**texts, **fixed, **options})

    return run


def mask(model, part):
    return {name: torch.full_like(p, part in name, dtype=torch.bool) for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["mask", "token_weights", "difficulty", "reference_model"])
def test_other_objects_are_other_settings(model, compare, tmp_path, name):
    """A mask, lists too long to show and a reference model are compared by their numbers, not by their type."""
    options = {
        "mask": (mask(model, "mlp"), mask(model, "embed")),
        "token_weights": ([[1.0] * 12] * 2, [[1.0] * 12, [2.0] * 12]),
        "difficulty": ([1.0] * 60, [*[1.0] * 59, 2.0]),
        "reference_model": (make_model(1), make_model(2)),
    }
    one, other = options[name]
    rows = {"forget": tiny.sentences(60, 3)} if name == "difficulty" else {}
    before = compare(methods=["ga"], **rows, **{name: one})
    assert compare(methods=["ga"], **rows, **{name: one}).rows == before.rows
    written = (tmp_path / "c" / "result.json").read_bytes()
    with pytest.raises(OutputError, match=f"was made with .*{name}"):
        compare(methods=["ga", "simnpo"], **rows, **{name: other})
    assert (tmp_path / "c" / "result.json").read_bytes() == written


def test_each_row_has_the_versions_that_made_it(compare, tmp_path, monkeypatch):
    """A row that was made before an update keeps its versions; the settings have those of the last call."""
    compare(methods=["ga"])
    monkeypatch.setattr(pyunlearn, "__version__", "99")
    compare(methods=["ga", "simnpo"])
    read = Comparison.read(tmp_path / "c")
    assert [row.versions["pyunlearn"] == "99" for row in read.rows] == [False, True]
    assert read.settings["pyunlearn"] == "99"
    assert all(row.versions["torch"] == torch.__version__ for row in read.rows)


def test_methods_are_added_next_to_one_with_options(compare, tmp_path):
    """Options belong to a method's row: they are compared where that method is asked for, and nowhere else."""
    compare(methods=["npo"], method_options={"npo": {"beta": 0.3}})
    compare(methods=["ga"])
    made = compare(methods=["ga", "simnpo"], method_options={"simnpo": {"beta": 2.0}})
    assert {row.method: row.method_options for row in Comparison.read(tmp_path / "c").rows} == {
        "npo": {"beta": 0.3},
        "ga": {},
        "simnpo": {"beta": 2.0},
    }
    again = compare(methods=["npo", "simnpo"], method_options={"npo": {"beta": 0.3}, "simnpo": {"beta": 2.0}})
    assert {row.method: row.seconds for row in again.rows} == {row.method: row.seconds for row in made.rows}
    written = (tmp_path / "c" / "result.json").read_bytes()
    for options, sentence in (
        ({}, "made with the options {'beta': 0.3} of npo, not {}"),
        ({"npo": {"beta": 0.5}}, "made with the options {'beta': 0.3} of npo, not {'beta': 0.5}"),
    ):
        with pytest.raises(OutputError, match=re.escape(sentence)):
            compare(methods=["npo", "wga"], method_options=options)
    assert (tmp_path / "c" / "result.json").read_bytes() == written


def test_texts_in_settings_are_not_written(compare, tmp_path):
    """Winners are texts: result.json has their hash."""
    winners = ["an answer of the user's own", "and another one"]
    options = {"method_options": {"dpo": {"winners": winners}}}
    rows = [{"prompt": f"prompt {i} is", "completion": " a text"} for i in range(2)]
    holdout = [{"prompt": f"question {i} is", "completion": f" an answer {i}"} for i in range(20)]
    made = compare(methods=["ga", "dpo"], forget=rows, retain=holdout[:1], holdout=holdout[1:] + rows[:0], **options)
    assert made.settings["method_options"]["dpo"]["winners"].startswith("list, SHA-256 ")
    assert winners[0] not in (tmp_path / "c" / "result.json").read_text()
    assert json.loads((tmp_path / "c" / "result.json").read_text())["settings"] == made.settings
