"""The option `turns` from end to end: whole conversations are audited and forgotten, or some of their turns."""

import random

import pytest
import tiny

import pyunlearn
from pyunlearn.errors import ArgumentError

FAST = {"metrics": ["membership"], "progress": False}


def conversations(count, seed):
    """Return random chats of four turns, none of which can be guessed from the others."""
    r = random.Random(seed)

    def clause():
        return f"{r.choice(tiny.SUBJECTS)} {r.choice(tiny.VERBS)} {r.choice(tiny.OBJECTS)}"

    roles = ["user", "assistant"] * 2
    return [{"messages": [{"role": role, "content": clause()} for role in roles]} for _ in range(count)]


@pytest.fixture(scope="module")
def talker(one_thread):
    """A model that was trained on whole conversations, two of them many times."""
    return tiny.trained(tiny.tiny_llama, conversations, count=400, repeats=40, epochs=10, chat=True)


def test_an_audit_scores_the_turns_that_it_says():
    """All by default, as training did; the note counts tokens and turns."""
    tokenizer = tiny.make_tokenizer(chat=True)
    model, counts = tiny.tiny_llama(len(tokenizer)), {}
    for turns in (None, "all", "assistant", "last"):
        texts = conversations(2, 3)
        audit = pyunlearn.audit(model, texts, holdout=conversations(30, 6), tokenizer=tokenizer, turns=turns, **FAST)
        counts[turns] = sum(e.tokens for e in audit.examples)
        (note,) = (note for note in audit.notes if note.startswith("Scored are "))
        number = {"assistant": 4, "last": 2}.get(turns, 8)
        assert note.startswith(f"Scored are {counts[turns]} of ")
        assert f"in {number} of 8 turns of 2 conversations" in note
        assert audit.settings["turns"] == turns
    assert counts[None] == counts["all"] > 2 * counts["assistant"] > 2 * counts["last"]


@pytest.mark.full
@pytest.mark.parametrize("turns", ["all", "assistant", "last"])
def test_a_memorized_conversation_is_exposed(talker, turns):
    """In whichever turns are scored, and unseen ones are not."""
    options = {"holdout": talker.holdout, "tokenizer": talker.tokenizer, "turns": turns}
    audit = pyunlearn.audit(talker.model, talker.forget + talker.unseen, **options, **FAST)
    assert [e.verdict for e in audit.examples] == ["still exposed"] * 2 + ["not memorized"] * 2


@pytest.mark.full
def test_continuations_of_conversations_are_decoded(talker):
    """Of all turns from the middle of the text, of the assistant's turns in the place of the longest."""
    for turns in ("all", "assistant"):
        audit = pyunlearn.audit(
            talker.model, talker.forget, tokenizer=talker.tokenizer, turns=turns, template="chat", progress=False
        )
        for e, row in zip(audit.examples, talker.forget, strict=True):
            assert e.now.continuation is not None
            assert e.now.longest_run >= (6 if turns == "all" else 1)
            assert e.now.answer_prior is None
            assert (row["messages"][0]["content"] in e.text) == (turns == "all")
            assert row["messages"][1]["content"] in e.text
        truths = {m["content"] for row in talker.forget for m in row["messages"][1::2]}
        if turns == "assistant":
            assert all(any(e.truth.strip() == truth for truth in truths) for e in audit.examples)


@pytest.mark.full
@pytest.mark.parametrize("turns", [None, "assistant"])
def test_a_conversation_is_forgotten(talker, turns):
    """All that is scored of it: its turns are no likelier than those of unseen ones."""
    result = pyunlearn.unlearn(
        talker.fresh(),
        talker.forget,
        retain=talker.retain,
        holdout=talker.holdout,
        tokenizer=talker.tokenizer,
        turns=turns,
        learning_rate=3e-4,
        utility_budget=0.2,
        progress=False,
    )
    assert result.forgotten
    assert any(note.startswith("Scored are ") for note in result.notes)
    assert result.settings["turns"] == turns


@pytest.mark.full
def test_token_weights_are_for_scored_tokens(talker):
    """Importance reads the assistant's turns alone, and a list must have a number for each of their tokens."""
    options = {"tokenizer": talker.tokenizer, "turns": "assistant", "template": "chat", "progress": False}
    result = pyunlearn.unlearn(
        talker.fresh(), talker.forget, holdout=talker.holdout, token_weights="importance", max_steps=1, **options
    )
    sizes = [e.tokens for e in result.examples]
    weights = [[1.0] * n for n in sizes]
    pyunlearn.unlearn(
        talker.fresh(), talker.forget, holdout=talker.holdout, token_weights=weights, max_steps=1, **options
    )
    with pytest.raises(ArgumentError, match=f"must be {sizes[0]} numbers"):
        pyunlearn.unlearn(talker.fresh(), talker.forget, token_weights=[[1.0], weights[1]], **options)


@pytest.mark.parametrize("function", [pyunlearn.unlearn, pyunlearn.audit, pyunlearn.compare])
def test_a_wrong_value_is_refused_before_anything_is_read(function, tmp_path):
    """In one sentence."""
    with pytest.raises(ArgumentError, match=r"^turns must be one of all, assistant, last, got 'first'"):
        function(tmp_path / "no-model", tmp_path / "no-texts.jsonl", turns="first")
