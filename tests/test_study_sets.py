"""The sets of a study: matched, apart, and never trained on where they must not be; and its corpora."""

from collections import Counter

import pytest
from study_settings import TINY

from pyunlearn.data.examples import Example
from pyunlearn.errors import DataError
from pyunlearn.models.from_scratch import train_tokenizer
from pyunlearn.study import sets as study_sets
from pyunlearn.study.config import PRESETS, StudyConfig
from pyunlearn.study.corpus import read_corpus, synthetic
from pyunlearn.study.sets import Sets, make_sets


def sets_of(**changes):
    kinds = ("id", "mismatched", "canary", "random")
    config = StudyConfig(**{**TINY, "kinds": kinds, "corpus_size": 300, **changes})
    corpus = synthetic(config.setup, config.corpus_size, config.seed)
    tokenizer = train_tokenizer((t for e in corpus for t in (e.prompt, e.completion)), config.vocabulary)
    return config, make_sets(config, corpus, None, tokenizer)


@pytest.mark.parametrize("setup", ["translation", "text"])
def test_sets_are_matched_and_apart(setup):
    """Every set has the same number of examples, canaries as long as their partners; no example is in two groups."""
    config, sets = sets_of(setup=setup)
    assert len(sets.forget) == len(config.kinds) * len(config.doses) * config.seeds
    assert {len(indices) for indices in sets.forget.values()} == {config.examples}
    for which, indices in sets.forget.items():
        if which.kind in ("canary", "random"):
            natural = sets.forget[which._replace(kind="id")]
            assert [len(sets.tokens[i].scored) for i in indices] == [len(sets.tokens[i].scored) for i in natural]
    groups = [*sets.forget.values(), sets.background, sets.test]
    size = sum(map(len, groups))
    assert size == len({i for g in groups for i in g}) == len({(t.ids, t.decoder) for t in sets.tokens})


@pytest.mark.parametrize("seed", range(3))
def test_a_seed_trains_on_its_own_sets_alone_at_their_doses(seed):
    """Each example as often as its dose says in the whole training, spread over the epochs; nothing unseen at all."""
    config, sets = sets_of(doses=(1, 5), epochs=2)
    epochs = sets.epochs(config, seed)
    rows = Counter(i for epoch in epochs for i in epoch)
    for which, indices in sets.forget.items():
        assert {rows[i] for i in indices} == {which.dose if which.seed == seed else 0}
        if which == ("canary", 5, seed):
            assert {abs(epochs[0].count(i) - epochs[1].count(i)) for i in indices} == {1}
    assert {rows[i] for i in sets.background} == {config.epochs}
    assert not any(rows[i] for i in sets.test)


def test_non_members_are_examples_of_other_seeds_of_the_same_kind():
    """As many as there are, or as are wanted; the same at every call."""
    config, sets = sets_of()
    owners = sets.owners()
    for kind in config.kinds:
        every = sets.non_members(kind, 1, 99)
        assert len(every) == 2 * len(config.doses) * config.examples
        assert {owners[i].kind for i in every} == {kind}
        assert {owners[i].seed for i in every} == {0, 2}
        some = sets.non_members(kind, 1, 5)
        assert some == sets.non_members(kind, 1, 5)
        assert len(some) == 5
        assert set(some) < set(every)


def test_the_share_out_of_distribution_is_that_of_the_rows():
    """Counted in the epochs of a seed."""
    config, sets = sets_of()
    owners = sets.owners()
    rows = [i for epoch in sets.epochs(config, 0) for i in epoch]
    outside = sum(i in owners and owners[i].kind != "id" for i in rows)
    assert sets.outside_share(config) == pytest.approx(outside / len(rows))


@pytest.mark.parametrize("preset", ["cpu", "gpu", "paper"])
def test_the_presets_keep_what_is_out_of_distribution_rare(preset):
    """At most 1 % of the training rows, on a corpus of the size of the built-in one."""
    config = PRESETS[preset]
    natural = 2 * config.seeds * len(config.doses) * config.examples  # in distribution and mismatched
    sets = Sets([], [], list(range(config.corpus_size - natural - config.test_examples)), [])
    assert sets.outside_share(config) <= 0.01


def test_a_corpus_that_is_too_small_is_refused():
    """The message tells the numbers."""
    with pytest.raises(DataError, match="300 different examples, and the study needs"):
        sets_of(examples=40)


def test_examples_of_the_test_corpus_are_left_out_with_a_warning(monkeypatch):
    """They would be trained on; a copy within the corpus is no news."""
    lines = []
    monkeypatch.setattr(study_sets.logger, "warning", lines.append)
    config = StudyConfig(**{**TINY, "corpus_size": 300})
    corpus = synthetic(config.setup, 300, 0)
    tokenizer = train_tokenizer((t for e in corpus for t in (e.prompt, e.completion)), config.vocabulary)
    test = synthetic(config.setup, config.test_examples, 1)
    make_sets(config, corpus + corpus[:2], test, tokenizer)
    assert lines == []
    make_sets(config, corpus + test[:3], test, tokenizer)
    assert lines == ["3 examples of the corpus are in the test corpus too: they are left out of the training"]


@pytest.mark.parametrize("setup", ["translation", "text"])
@pytest.mark.parametrize("own_test", [False, True])
def test_texts_that_are_equal_once_cut_are_one(monkeypatch, setup, own_test):
    """Form letters that differ after max_tokens alone: else a forget or test text is in every model's training."""
    lines = []
    monkeypatch.setattr(study_sets.logger, "warning", lines.append)
    config = StudyConfig(**{**TINY, "setup": setup, "corpus_size": 300, "max_tokens": 12})
    corpus, letter = synthetic(setup, 300, 0), synthetic(setup, 1, 5)[0]
    letters = [Example(letter.prompt, " ".join([letter.completion] * 8 + [str(number)])) for number in range(80)]
    test = synthetic(setup, config.test_examples, 1)
    tokenizer = train_tokenizer((t for e in corpus for t in (e.prompt, e.completion)), config.vocabulary)
    sets = make_sets(config, corpus + letters[1:], [*letters[:1], *test[1:]] if own_test else None, tokenizer)
    trained = Counter((sets.tokens[i].ids, sets.tokens[i].decoder) for i in sets.background)
    forget = [i for which, group in sets.forget.items() if which.kind == "id" for i in group]
    assert not [i for i in (*forget, *sets.test) if (sets.tokens[i].ids, sets.tokens[i].decoder) in trained]
    assert set(trained.values()) == {1}
    same = "78 examples of the corpus have the same tokens as another one, cut to max_tokens 12: they are left out"
    assert same in lines


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
