"""Arguments of the probes: one sentence for every wrong value, before anything is computed."""

import math
from typing import Any

import pytest
import tiny
import torch

from pyunlearn.data import Tokens, encode, read_examples
from pyunlearn.errors import ArgumentError, ModelError
from pyunlearn.probes import (
    gradient_norms,
    greedy_continuations,
    mean_gradient,
    representations,
    subset_masks,
    teacher_forced,
)


@pytest.fixture(scope="module")
def llama():
    """An untrained model, its tokenizer and three texts."""
    tokenizer = tiny.make_tokenizer()
    examples = read_examples(tiny.sentences(3, 1), role="forget")
    tokens = encode(examples, tokenizer, role="forget", max_length=None)
    return tiny.tiny_llama(len(tokenizer)), tokenizer, tokens


FORWARD = [teacher_forced, mean_gradient, representations]
DECODING = [greedy_continuations]
WRONG: dict[str, list[Any]] = {
    "batch_size": [0, -1, 1.5, "x", True],
    "longest": [0, None],
}
WRONG |= {"seed": [-1, "x"], "count": [0, "x"], "fraction": [2.0, math.nan]}


@pytest.mark.parametrize(
    ("probe", "name", "value"),
    [(probe, "batch_size", value) for probe in FORWARD + DECODING for value in WRONG["batch_size"]]
    + [(greedy_continuations, "longest", value) for value in WRONG["longest"]],
)
def test_every_wrong_option_is_named_in_one_sentence(llama, monkeypatch, probe, name, value):
    """Before anything is computed."""
    model, tokenizer, tokens = llama
    monkeypatch.setattr(model, "forward", None)
    options = {"tokenizer": tokenizer} if probe.__name__.startswith("greedy") else {}
    with pytest.raises(ArgumentError, match=rf"^{name} must be .+, got ") as error:
        probe(model, tokens, **options, **{name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "value"), [(n, v) for n in ("count", "fraction", "seed") for v in WRONG[n]])
def test_every_wrong_option_of_a_mask_is_named_in_one_sentence(name, value):
    """As those of the probes are."""
    with pytest.raises(ArgumentError, match=rf"^{name} must be .+, got "):
        subset_masks(3, **{"count": 4, name: value})


@pytest.mark.parametrize("probe", [*FORWARD, gradient_norms])
@pytest.mark.parametrize("model", [3, None, torch.nn.Linear(2, 2)])
def test_what_is_no_language_model_is_refused(probe, model):
    """By its type."""
    with pytest.raises(ModelError, match=f"a path or a name, got a value of type {type(model).__name__}"):
        probe(model, [Tokens((1, 2, 3), 1)])


@pytest.mark.parametrize("probe", [*FORWARD, gradient_norms])
def test_no_example_is_refused(llama, probe):
    """There is nothing to measure."""
    with pytest.raises(ArgumentError, match="at least one example"):
        probe(llama[0], [])
