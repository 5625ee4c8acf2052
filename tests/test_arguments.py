"""Every wrong argument of every public function gets one sentence, before anything is read, written or changed."""

import inspect
from typing import Any

import pytest
import tiny
import torch

import pyunlearn
from pyunlearn import edits
from pyunlearn.errors import PyunlearnError
from pyunlearn.study import run_study

TEXTS = ["the king hides a lamp.", "a dog sees the sea."]


class Odd:
    """An object that is nothing that an argument can be."""


PATHS: list[Any] = [5, True, b"x", "a\0b", "", Odd(), ["a"]]
MODELS: list[Any] = [3, True, None, [1], {}, Odd(), torch.nn.Linear(2, 2), "", "a\0b"]
SOURCES: list[Any] = [3, True, Odd(), 1.5, b"x", [], [3], [None], {}, [{"texte": "a"}], "missing.jsonl", [""]]
SWITCHES: list[Any] = ["yes", 0, 1, "true", Odd(), [True]]
WRONG: dict[str, list[Any]] = {
    "model": MODELS,
    "original": [m for m in MODELS if m is not None],
    "control": [m for m in MODELS if m is not None],
    "reference_model": [m for m in MODELS if m is not None],
    "forget": [*SOURCES, None],
    "retain": SOURCES,
    "holdout": SOURCES,
    "tokenizer": [1, True, Odd(), ["a"], b"x"],
    "config": [3, True, Odd(), {"a": 1}, "missing.toml"],
    "output_dir": PATHS,
    "cache": PATHS,
    "resume": [*SWITCHES, None],
    "progress": SWITCHES,
    "plot": SWITCHES,
}
FUNCTIONS: dict[str, Any] = {"unlearn": pyunlearn.unlearn, "audit": pyunlearn.audit, "compare": pyunlearn.compare}
FUNCTIONS |= {"attack": pyunlearn.attack}
FUNCTIONS |= {name: edit.function for name, edit in edits.EDITS.items()}
CASES = [
    pytest.param(name, argument, id=f"{name}-{argument}")
    for name, function in FUNCTIONS.items()
    for argument in WRONG
    if argument in inspect.signature(function).parameters
]


@pytest.fixture(scope="module")
def model():
    """An untrained model, for no case comes to its weights."""
    tokenizer = tiny.make_tokenizer()
    torch.manual_seed(0)
    made = tiny.tiny_llama(len(tokenizer))
    return made, tokenizer


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_every_wrong_argument_gets_one_sentence(model, name, argument, tmp_path, monkeypatch):
    """The error is one of ours, on one line, and nothing was written; the weights keep their bits."""
    monkeypatch.chdir(tmp_path)
    made, tokenizer = model
    before = [p.clone() for p in made.parameters()]
    function = FUNCTIONS[name]
    parameters = inspect.signature(function).parameters
    right = {"model": made, "forget": TEXTS, "tokenizer": tokenizer, "retain": TEXTS, "fine_tuned": made, "rate": 0.1}
    right = {k: v for k, v in right.items() if k in parameters}
    if argument == "reference_model" and name == "unlearn":
        right["method"] = "npo"
    for value in WRONG[argument]:
        if name == "prune" and argument == "forget" and value is None:  # it prunes by magnitude without texts
            continue
        with pytest.raises(PyunlearnError) as error:
            function(**right | {argument: value})
        sentence = str(error.value)
        assert "\n" not in sentence
        assert 10 < len(sentence) < 500
        assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(p, q) for p, q in zip(made.parameters(), before, strict=True))


@pytest.mark.parametrize("out", PATHS)
def test_a_study_is_refused_in_one_sentence(out, tmp_path, monkeypatch):
    """Where its folder cannot be one."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PyunlearnError) as error:
        run_study(out)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
