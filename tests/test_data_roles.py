"""The texts of a run by role, and the part of a large retain set that is drawn."""

import json
import tracemalloc

import numpy as np
import pytest
from unlearning_runs import run

from pyunlearn.data import read_examples, roles
from pyunlearn.data.roles import read_roles
from pyunlearn.errors import DataError


@pytest.fixture
def large(tmp_path):
    """A file of 4000 texts."""
    path = tmp_path / "retain.jsonl"
    path.write_text("".join(json.dumps({"text": f"text number {i} " + "word " * 50}) + "\n" for i in range(4000)))
    return path


def test_all_texts_are_read_where_there_are_not_too_many(large):
    """As `read_examples` reads them; a role without a source is left out."""
    examples, notes = read_roles({"forget": ["a secret"], "retain": large, "holdout": None}, turns=None)
    assert examples == {"forget": read_examples(["a secret"], role="forget"), "retain": read_examples(large, role="r")}
    assert notes == []


def test_of_a_large_retain_set_a_part_is_drawn(large, monkeypatch):
    """Uniformly over the whole file, in order, the same each time; nothing is drawn of the forget set."""
    monkeypatch.setattr(roles, "RETAIN_AT_MOST", 500)
    sources = {"forget": large, "retain": large}
    examples, notes = read_roles(sources, turns=None)
    numbers = [int(e.completion.split()[2]) for e in examples["retain"]]
    assert len(numbers) == len(set(numbers)) == 500
    assert numbers == sorted(numbers)
    counts, _ = np.histogram(numbers, bins=10, range=(0, 4000))
    assert 20 < counts.min() < counts.max() < 80  # 50 each are expected, with a standard deviation of 6.3
    assert len(examples["forget"]) == 4000
    assert notes == ["Of 4,000 retain texts, 500 were drawn at random; the rest is not used."]
    assert read_roles(sources, turns=None)[0] == examples


def test_a_part_takes_the_memory_of_the_part(large, monkeypatch):
    """The file is read row by row."""
    monkeypatch.setattr(roles, "RETAIN_AT_MOST", 100)
    tracemalloc.start()
    try:
        read_roles({"forget": ["a secret"], "retain": large}, turns=None)
        assert tracemalloc.get_traced_memory()[1] < large.stat().st_size / 4
    finally:
        tracemalloc.stop()


def test_a_malformed_line_is_refused_wherever_it_is(large, monkeypatch):
    """Among the rows that are not drawn too."""
    monkeypatch.setattr(roles, "RETAIN_AT_MOST", 5)
    with large.open("a") as file:
        file.write('{"text": "half\n')
    with pytest.raises(DataError, match="line 4001, is not JSON: Unterminated string"):
        read_roles({"forget": ["a secret"], "retain": large}, turns=None)


def test_a_run_says_that_a_part_was_drawn(story, monkeypatch):
    """In its notes."""
    monkeypatch.setattr(roles, "RETAIN_AT_MOST", 8)
    result = run(story, max_steps=0)
    assert result.notes[0].startswith(f"Of {len(story.corpus)} retain texts, 8 were drawn")
