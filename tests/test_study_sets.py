"""The sets of a study: matched, apart, and never trained on where they must not be; and its corpora."""

import pytest
from study_settings import TINY

from pyunlearn.errors import DataError
from pyunlearn.models.from_scratch import train_tokenizer
from pyunlearn.study.config import StudyConfig
from pyunlearn.study.corpus import read_corpus, synthetic
from pyunlearn.study.sets import make_sets


def sets_of(**changes):
    kinds = ("id", "mismatched", "canary", "random")
    config = StudyConfig(**{**TINY, "kinds": kinds, "draws": 2, "corpus_size": 500, **changes})
    corpus = synthetic(config.setup, config.corpus_size, config.seed)
    tokenizer = train_tokenizer((t for e in corpus for t in (e.prompt, e.completion)), config.vocabulary)
    return config, corpus, make_sets(config, corpus, None, tokenizer)


@pytest.mark.parametrize("setup", ["translation", "text"])
def test_sets_are_matched_and_apart(setup):
    """Every kind has the same number of examples of the same lengths; no example is in two groups."""
    config, _, sets = sets_of(setup=setup)
    assert {len(indices) for indices in sets.forget.values()} == {config.examples}
    assert {len(indices) for indices in sets.non_members.values()} == {config.non_members}
    for which, indices in sets.forget.items():
        if which.kind in ("canary", "random"):
            natural = sets.forget[which._replace(kind="id")]
            assert [len(sets.tokens[i].scored) for i in indices] == [len(sets.tokens[i].scored) for i in natural]
    groups = [*sets.forget.values(), *sets.non_members.values(), sets.background, sets.test]
    size = sum(map(len, groups))
    assert size == len({i for g in groups for i in g}) == len({(t.ids, t.decoder) for t in sets.tokens})


def test_nothing_unseen_is_trained_on():
    """Non-members and test examples are in no epoch; subset models leave out exactly what their masks exclude."""
    config, _, sets = sets_of()
    unseen = {i for g in (*sets.non_members.values(), sets.test) for i in g}
    assert not unseen & set(sets.members(None)) | unseen & set(sets.background)
    masks = sets.subsets(config)
    assert set(masks) == set(sets.scored())
    for k in range(config.subset_models):
        chosen = {i for i, mask in masks.items() if mask[k]}
        members = sets.members(None, chosen)
        assert set(members) == chosen - unseen
        for which, indices in sets.forget.items():
            assert all(members.count(i) == which.repetitions for i in indices if i in chosen)
    assert {which.draw for which, p in sets.forget.items() if set(p) & set(sets.members(1))} == {1}


def test_a_corpus_that_is_too_small_is_refused():
    """The message tells the numbers."""
    with pytest.raises(DataError, match="500 different examples, and the study needs"):
        sets_of(examples=100)


def test_corpora_are_read_in_every_form(tmp_path):
    """Two files of parallel lines, pairs separated by tabs, questions and answers, plain text."""
    (tmp_path / "a.en").write_text("one\ntwo\n")
    (tmp_path / "a.de").write_text("eins\nzwei\n")
    (tmp_path / "a.tsv").write_text("one\teins\ntwo\tzwei\n")
    (tmp_path / "a.jsonl").write_text('{"question": "who?", "answer": "I"}\n')
    (tmp_path / "a.txt").write_text(" ".join(["word"] * 50))
    pairs = [("one", "eins"), ("two", "zwei")]
    assert [(e.prompt, e.completion) for e in read_corpus([tmp_path / "a.en", tmp_path / "a.de"])] == pairs
    assert [(e.prompt, e.completion) for e in read_corpus([tmp_path / "a.tsv"])] == pairs
    assert read_corpus([tmp_path / "a.jsonl"])[0].messages
    assert [len((e.prompt + e.completion).split()) for e in read_corpus([tmp_path / "a.txt"])] == [24, 24]
    (tmp_path / "a.de").write_text("eins\n")
    with pytest.raises(DataError, match=r"2 lines and .* has 1"):
        read_corpus([tmp_path / "a.en", tmp_path / "a.de"])
