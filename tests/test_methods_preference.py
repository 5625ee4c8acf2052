"""Another answer in place of the forget text: the user's own (dpo), or the model's (altpo)."""

import copy
import re

import numpy as np
import pytest
import tiny
import torch
from torch.nn.functional import cross_entropy

import pyunlearn
from pyunlearn.data import Example, encode, read_examples
from pyunlearn.errors import ArgumentError, DataError
from pyunlearn.methods import METHODS
from pyunlearn.models import sampling
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.sampling import sample_alternates
from pyunlearn.unlearning import sampled
from pyunlearn.unlearning.preferences import with_winners

BETA = 0.3


@pytest.fixture(scope="module")
def story(one_thread):
    return tiny.trained(tiny.tiny_gpt2, tiny.facts, count=120, repeats=16, epochs=6, form="$A", pad=False)


@pytest.fixture(scope="module")
def other(story):
    """Return a reference model that has read other texts of the kind, so that both secrets stand out beyond it."""
    torch.manual_seed(1)
    model = tiny.tiny_gpt2(len(story.tokenizer))
    tiny.train(model, story.tokenizer, tiny.facts(120, 9), epochs=2)
    return model


def run(story, method, forget=None, **options):
    options = {"max_steps": 2, "learning_rate": 1e-4, "progress": False, "holdout": story.holdout, **options}
    return pyunlearn.unlearn(
        story.fresh(), story.forget if forget is None else forget, tokenizer=story.tokenizer, method=method, **options
    )


def won(story, winners=("a lamp.", "two stones and the sea.")):
    return [row | {"winner": winner} for row, winner in zip(story.forget, winners, strict=True)]


def tokens_of(story, rows):
    return encode(read_examples(rows, role="x"), story.tokenizer, role="x", max_length=None)


def sums(model, tokens):
    """Return summed log-likelihoods of the scored tokens, by a plain loop over the model's own logits."""
    with torch.no_grad():
        return torch.tensor(
            [
                -cross_entropy(
                    model(torch.tensor([t.ids])).logits[0, t.first - 1 : -1], torch.tensor(t.scored), reduction="sum"
                )
                for t in tokens
            ]
        )


def dpo_by_hand(model, other, winners, losers):
    w, f = (sums(model, x) - sums(other, x) for x in (winners, losers))
    return (-(2 / BETA) * torch.log(torch.sigmoid(BETA * (w - f)))).mean().item()


def timeless(result):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in result.history]


@pytest.mark.full
def test_dpo_prefers_the_winner_in_the_forget_set(story, other):
    """The first loss is the formula on plain logits; winners passed as an option make the same run."""
    winners = [row | {"answer": row["winner"]} for row in won(story)]
    options = {"reference_model": other, "method_options": {"beta": BETA}}
    result = run(story, "dpo", won(story), **options)
    right = dpo_by_hand(story.model, other, tokens_of(story, winners), tokens_of(story, story.forget))
    assert result.history[0]["forget_loss"] == pytest.approx(right, rel=1e-4)
    as_option = {"beta": BETA, "winners": [row["winner"] for row in won(story)]}
    assert timeless(run(story, "dpo", **options | {"method_options": as_option})) == timeless(result)


def test_a_winner_is_read_from_every_form_of_text():
    """It replaces the completion of prompts, questions, chats and plain texts, with the completion's spacing."""
    rows = [
        {"prompt": "one", "completion": " two", "winner": "three"},
        {"question": "one?", "answer": "two", "winner": "three"},
        {"messages": [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}], "winner": "three"},
        {"text": "one two", "winner": "three"},
    ]
    examples = read_examples(rows, role="forget")
    assert [e.winner for e in examples] == ["three"] * 4
    replaced = with_winners(examples, None)
    assert [e.prompt + e.completion for e in replaced] == [
        "one three",
        "one?\nthree",
        "user: one?\nassistant: three",
        "three",
    ]
    assert replaced[2].messages[-1].content == "three"
    assert read_examples([{"text": "one", "winner": None}], role="forget")[0].winner is None
    assert with_winners([Example("a ", "b")], ["c"])[0].completion == "c"


@pytest.mark.parametrize(
    ("forget", "winners", "message"),
    [
        (1, None, 'forget example 2 has none: give each a "winner"'),
        (2, ["a"], "must be a list of 2 texts, one for each forget example, got 1 entries"),
        (2, "ab", "must be a list of 2 texts, one for each forget example, got a value of type str"),
        (2, ["a", " "], "must be a list of 2 texts"),
        (2, 3, "must be a list of 2 texts, one for each forget example, got a value of type int"),
    ],
)
def test_winners_that_do_not_fit_are_refused(story, forget, winners, message):
    """One sentence, before anything is changed."""
    rows = won(story)[:forget] + story.forget[forget:]
    with pytest.raises(ArgumentError, match=message):
        run(story, "dpo", rows, method_options={} if winners is None else {"winners": winners})


@pytest.mark.parametrize("refusals", [3, True, "no", [], {"a": 1}, [1]])
def test_refusals_that_are_no_texts_are_refused(story, refusals):
    """One sentence quotes them."""
    with pytest.raises(ArgumentError, match=re.escape(f"must be a list of one text or more, got {refusals!r}")):
        run(story, "idk", method_options={"refusals": refusals})


def test_alternates_answer_the_same_prompts_otherwise(story):
    """There are `count` for each text; none begins as it does; the seed decides, not the global generator."""
    tokens, state = tokens_of(story, story.forget), torch.get_rng_state()
    alternates = sample_alternates(LanguageModel.of(story.model, story.tokenizer), tokens, count=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(alternates) == 6
    for i, t in enumerate(alternates):
        source = tokens[i // 3]
        assert t.ids[: t.first] == source.ids[: source.first]
        assert t.scored[0] != source.scored[0]
        assert 2 <= len(t.scored) <= len(source.scored)
    assert len(set(alternates)) > 3
    assert sample_alternates(LanguageModel.of(story.model, story.tokenizer), tokens, count=3) == alternates
    assert sample_alternates(LanguageModel.of(story.model, story.tokenizer), tokens, count=3, seed=1) != alternates
    with pytest.raises(ArgumentError, match="alternates must be a whole number, 1 or more, got 0"):
        run(story, "altpo", method_options={"alternates": 0})


def test_what_recites_the_forget_set_is_no_alternate(story, monkeypatch):
    """It is drawn again; good ones are repeated to make up the number; without any, one sentence says so."""
    tokens = tokens_of(story, story.forget)[:1]
    good = copy.copy(sample_alternates(LanguageModel.of(story.model, story.tokenizer), tokens, count=1)[0])
    reciting = [tokens[0]] * 2
    answers = iter([reciting, [good, tokens[0]], reciting, reciting])
    monkeypatch.setattr(sampling, "_sample", lambda *args: next(answers))
    assert sample_alternates(LanguageModel.of(story.model, story.tokenizer), tokens, count=2) == [good, good]
    monkeypatch.setattr(sampling, "_sample", lambda *args: reciting)
    with pytest.raises(DataError, match="recites the forget set whenever it is to answer forget example 1"):
        sample_alternates(LanguageModel.of(story.model, story.tokenizer), tokens, count=2)


def test_altpo_is_dpo_against_each_alternate_in_turn(story, other):
    """At a rate too small to matter the losses are those of the first alternates, then of the second ones."""
    losers = tokens_of(story, story.forget)
    sampled = sample_alternates(LanguageModel.of(story.model, story.tokenizer), losers, count=2)
    result = run(
        story, "altpo", reference_model=other, learning_rate=1e-9, method_options={"beta": BETA, "alternates": 2}
    )
    for turn in (0, 1):
        right = dpo_by_hand(story.model, other, sampled[turn::2], losers)
        assert result.history[turn]["forget_loss"] == pytest.approx(right, rel=1e-4)
    losses = [record["forget_loss"] for record in result.history]
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.full
def test_a_resumed_run_takes_its_alternates_from_the_checkpoint(story, tmp_path, monkeypatch):
    """None is sampled again, and the numbers are those of an uninterrupted run."""
    options = {"max_steps": 5, "batch_size": 1, "method_options": {"alternates": 2}}
    whole = run(story, "altpo", **options)
    assert len(whole.history) == 5
    calls = []

    def cut(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(*args, **kwargs)

    loss = METHODS["altpo"].function
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "altpo", tiny.with_loss("altpo", cut))
        assert run(story, "altpo", **options, output_dir=tmp_path / "out").stopped == "interrupted"
    monkeypatch.setattr(sampled, "sample_alternates", lambda *args, **kwargs: pytest.fail("sampled again"))
    resumed = run(story, "altpo", **options, output_dir=tmp_path / "out", resume=True)
    assert timeless(resumed) == timeless(whole)
    assert resumed.examples == whole.examples
    np.testing.assert_equal(resumed.utility, whole.utility)
