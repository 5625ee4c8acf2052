"""Every argument of unlearn() that cannot be is refused with one sentence before anything is changed."""

import math
import warnings

import pytest
import tiny
import torch
from unlearning_runs import run, same, weights

import pyunlearn
from pyunlearn.errors import ArgumentError, DataError, ModelError, TrainingError

pytestmark = pytest.mark.usefixtures("one_thread")

GIANT = 10**5000  # more digits than Python prints


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number, 1 or more, got 0"),
        ({"batch_size": "8"}, "batch_size must be a whole number, 1 or more, got '8'"),
        ({"max_steps": -1}, "max_steps must be a whole number, 0 or more, got -1"),
        ({"utility_budget": math.nan}, "utility_budget must be a number, 0 or more, got nan"),
        ({"learning_rate": 0}, "learning_rate must be a number, above 0 and below 1, got 0"),
        ({"learning_rate": 3.0}, "learning_rate must be a number, above 0 and below 1, got 3.0"),
        ({"method": "npoo"}, "no method 'npoo'; did you mean \"npo\""),
        ({"method": "graddiff", "retain": None}, "needs text to keep: pass retain="),
        ({"method_options": {"beta": 1.0}}, "'ga' has no option 'beta'"),
        ({"mask": [GIANT]}, "mask must be .*, got a value of type list"),
        ({"token_weights": [GIANT, GIANT]}, "token_weights of forget example 1 must be .*, got a value of type int"),
        ({"difficulty": [GIANT, GIANT], "order": "easy_first"}, "difficulty must be 2 numbers, .* of type list"),
        ({"method": "idk", "method_options": {"refusals": [GIANT]}}, "refusals must be a list .* of type list"),
        ({"method": "rmu", "method_options": {"layer": GIANT}}, "layer must be a whole number .* of type int"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_changed(story, options, message):
    """The sentence names the option, the values allowed and the value that came."""
    model = story.fresh()
    with pytest.raises(ArgumentError, match=message):
        run(story, model=model, **options)
    assert same(model, story.model)


def test_a_model_without_a_head_or_a_tokenizer_is_refused(story):
    """One sentence names the class that came, or the argument to pass."""
    with pytest.raises(ModelError, match="must have a language-model head, and LlamaModel has none"):
        run(story, model=story.fresh().model)
    with pytest.raises(ModelError, match="a path or a name, got a value of type Linear"):
        run(story, model=torch.nn.Linear(2, 2))
    model = story.fresh()
    model.name_or_path = model.config._name_or_path = ""
    with pytest.raises(ModelError, match="pass tokenizer="):
        pyunlearn.unlearn(model, story.forget)


def test_a_model_with_nan_in_its_weights_is_refused(story):
    """One sentence, no warning that takes the head for the fault, and nothing has been changed."""
    model = story.fresh()
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan
    start = weights(model)
    with pytest.raises(TrainingError, match="NaN or Inf for the forget set before the first step"):
        run(story, model=model)
    assert same(model, start)


def test_a_workspace_that_cannot_be_is_refused_at_once(story):
    """Before the forget set is read and without a warning about the model."""
    model = story.fresh()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for workspace in (-1, 0.5, True):
            with pytest.raises(ArgumentError, match=f"workspace must be .*, got {workspace}"):
                run(story, "missing.jsonl", model=model, workspace=workspace)
    assert same(model, story.model)


@pytest.mark.parametrize(
    "options", [{}, {"method": "npo"}, {"method": "ga+kl"}, {"token_weights": "reference"}, {"order": "easy_first"}]
)
def test_a_reference_model_is_always_read(story, options):
    """By the verdict, by a method, the retain loss kl, token weights, an order; each needs the same vocabulary."""
    with pytest.raises(ModelError, match="another vocabulary"):
        run(story, reference_model=tiny.tiny_llama(77), **options)


def test_a_holdout_with_a_forget_text_is_refused_before_the_model_is_loaded(story, monkeypatch):
    """Which one, and what to do."""
    monkeypatch.delattr("pyunlearn.unlearning.api.LanguageModel")
    with pytest.raises(DataError, match=r"holdout example 61 .* nearly one, of forget example 1: take it out"):
        pyunlearn.unlearn(story.model, story.forget, holdout=[*story.holdout, story.forget[0].upper()])
    with pytest.raises(DataError, match="nothing of retain is left"):
        pyunlearn.unlearn(story.model, story.forget, retain=story.forget)


def test_copies_in_retain_and_repeated_non_members_are_left_out(story):
    """With a warning at the caller's line, and the result as if they had not been given."""
    dirty = {"retain": [*story.corpus, story.forget[1]], "holdout": [*story.holdout, story.holdout[0]]}
    with pytest.warns(UserWarning, match="left out") as caught:
        result = run(story, max_steps=2, **dirty)
    notes = [
        "1 of 201 retain texts is a copy of a forget text and is left out: retain example 201.",
        "1 of 61 holdout texts repeats another one and is left out: 60 different ones count.",
    ]
    assert [str(w.message) for w in caught] == result.notes[:2] == result.to_dict()["notes"][:2] == notes
    assert all(w.filename.endswith("unlearning_runs.py") for w in caught)
    clean = run(story, max_steps=2)
    assert clean.notes == result.notes[2:]
    assert same(result.model, clean.model)
    assert result.non_member_scores == clean.non_member_scores
    assert result.utility == clean.utility


def test_a_holdout_of_another_kind_is_noted(story):
    """By its length always, by its scores where there is a reference model."""
    holdout = [text.partition(" and ")[0] for text in tiny.sentences(400, 9)]
    holdout = list(dict.fromkeys(text.rpartition(" ")[0] for text in holdout))
    assert len(holdout) >= 19
    forget = tiny.sentences(12, 8)
    reference = tiny.trained(tiny.tiny_llama, tiny.sentences, count=200, repeats=8, epochs=6).model
    options = {"max_steps": 0, "reference_model": reference}
    notes = run(story, forget, holdout=holdout, retain=None, **options).notes
    assert notes[0].startswith("The holdout is of another length than the forget set: 4 words at the median, where the")
    assert notes[1].startswith("Under the reference model the holdout is ")
    assert notes[2].startswith("Each score is less what the reference model gives the same text")
    assert all("non-members can name" in note for note in notes[3:])
    assert [n for n in run(story, forget, **options).notes if "can name" not in n] == [notes[2]]
