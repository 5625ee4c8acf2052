"""Every argument of unlearn() that cannot be is refused with one sentence before anything is changed."""

import math
import warnings

import pytest
import tiny
import torch
from unlearning_runs import run, same, weights

import pyunlearn
from pyunlearn.errors import ArgumentError, ModelError, TrainingError

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.parametrize("options", [{}, {"method": "simnpo+nll"}, {"order": "easy_first", "difficulty": [1.0, 2.0]}])
def test_a_reference_model_that_would_be_ignored_is_refused(story, options):
    """The sentence names what reads one, and nothing has been changed."""
    model = story.fresh()
    with pytest.raises(ArgumentError, match=r"reference_model is read by .* compares with none: leave it out, or "):
        run(story, model=model, reference_model=story.fresh(), **options)
    assert same(model, story.model)


@pytest.mark.parametrize(
    "options", [{"method": "npo"}, {"method": "ga+kl"}, {"token_weights": "reference"}, {"order": "easy_first"}]
)
def test_a_reference_model_that_is_read_is_not_refused(story, options):
    """A method reads it, the retain loss kl, token weights or an order; each notices another vocabulary."""
    with pytest.raises(ModelError, match="another vocabulary"):
        run(story, reference_model=tiny.tiny_llama(77), **options)
