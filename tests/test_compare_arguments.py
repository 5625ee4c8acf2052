"""Wrong arguments of compare(): one sentence each, before anything is read or written."""

from typing import Any

import pytest
import tiny
import torch

import pyunlearn
from pyunlearn.comparing import CompareConfig, Comparison
from pyunlearn.errors import ArgumentError, DataError, DependencyError, OutputError

RETAIN, HOLDOUT = tiny.sentences(5, 1), tiny.sentences(20, 2)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny.tiny_llama(len(tiny.make_tokenizer()))


def compare(model, /, **options):
    arguments = {
        "forget": tiny.sentences(2, 3),
        "retain": RETAIN,
        "holdout": HOLDOUT,
        "tokenizer": tiny.make_tokenizer(),
    }
    arguments |= {"methods": ["ga", "simnpo"], "output_dir": "c", "model": model}
    return pyunlearn.compare(**(arguments | options))


WRONG: list[Any] = [
    ({"methods": ["gaa"]}, ArgumentError, 'did you mean "ga"'),
    ({"methods": "ga"}, ArgumentError, "methods must be a list"),
    ({"methods": []}, ArgumentError, "methods must be a list"),
    ({"methods": 5}, ArgumentError, "methods must be a list .* got 5"),
    ({"methods": ["ga", 5]}, ArgumentError, "methods must be a list"),
    ({"methods": {"ga": 1}}, ArgumentError, "methods must be a list"),
    ({"method_options": 5}, ArgumentError, "method_options must be a dict .* got 5"),
    ({"method_options": {"ga": 5}}, ArgumentError, "method_options must be a dict of dicts"),
    ({"method_options": {"npo": {"beta": 1}}}, ArgumentError, "not among the methods"),
    ({"method_options": {"ga": {"beta": 1}}}, ArgumentError, "has no option 'beta'"),
    ({"method_options": {"simnpo": {"beta": "x"}}}, ArgumentError, "beta must be a number"),
    ({"method": "ga"}, ArgumentError, "compare has no option 'method': did you mean \"methods\""),
    ({"tau": 0}, ArgumentError, "above 0"),
    ({"tau": 1.5}, ArgumentError, "at most 1"),
    ({"tau": True}, ArgumentError, "tau must be a number"),
    ({"metric": "accuracy"}, ArgumentError, "metric must be one of .* choose from"),
    ({"metric": 5}, ArgumentError, "metric must be one of"),
    ({"learning_rat": 1}, ArgumentError, 'did you mean "learning_rate"'),
    ({"batch_size": 0}, ArgumentError, "batch_size must be"),
    ({"workspace": -1}, ArgumentError, "workspace must be"),
    ({"config": 5}, ArgumentError, "config must be a CompareConfig or a path, got int"),
    ({"config": "missing.toml"}, DataError, "the settings file missing.toml cannot be read"),
    ({"output_dir": 5}, ArgumentError, "output_dir must be the path"),
    ({"output_dir": ""}, ArgumentError, "output_dir must be the path"),
    ({"output_dir": "a\0b"}, ArgumentError, "output_dir must be the path"),
    ({"output_dir": __file__}, OutputError, "is a file"),
    ({"model": 3}, ArgumentError, "model must be a transformers language model, .* got int"),
    ({"model": None}, ArgumentError, "model must be a transformers language model, .* got NoneType"),
    ({"model": ""}, ArgumentError, "model must be the path"),
    ({"reference_model": 3}, ArgumentError, "reference_model must be a transformers language model"),
    ({"tokenizer": 3}, ArgumentError, "tokenizer must be the path"),
    ({"plot": "x"}, ArgumentError, "plot must be True or False"),
    ({"plot": 1}, ArgumentError, "plot must be True or False"),
    ({"plot": True, "output_dir": None}, ArgumentError, "give output_dir"),
    ({"progress": "x"}, ArgumentError, "progress must be True or False"),
    ({"forget": 5}, DataError, "forget must be a text"),
    ({"retain": 5}, DataError, "retain must be a text"),
    ({"holdout": ["one text"]}, DataError, "19 non-members"),
    ({"retain": "no such file.jsonl"}, DataError, "was not found"),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG)
def test_every_wrong_argument_is_one_sentence(model, tmp_path, monkeypatch, options, error, message):
    """The sentence names the argument, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message) as caught:
        compare(model, **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [o for o, error, _ in WRONG if error is ArgumentError and "forget" not in o])
def test_wrong_arguments_are_seen_before_anything_is_read(model, tmp_path, monkeypatch, options):
    """A missing file of forget texts would be another error."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError):
        compare(model, **{"forget": "missing.jsonl", **options})


def test_a_plot_without_matplotlib_is_refused_at_the_start(model, tmp_path, monkeypatch):
    """The package is looked for first, and not after hours of unlearning."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DependencyError, match="matplotlib"):
        compare(model, plot=True, forget="missing.jsonl")


def test_several_processes_are_refused(model, monkeypatch):
    """Each would run every method."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ArgumentError, match="runs in one process"):
        compare(model)


def test_a_config_gives_every_method_its_settings():
    """The shared settings, and the method's own options under its name in any case."""
    config = CompareConfig(methods=["NPO", "ga", "npo"], method_options={"NPO": {"beta": 0.5}}, max_steps=7, seed=3)
    assert config.methods == ("npo", "ga")
    run = config.for_method("npo")
    assert (run.method, run.method_options, run.max_steps, run.seed) == ("npo", {"beta": 0.5}, 7, 3)
    assert config.for_method("ga").method_options == {}
    shared = set(run.options()) & set(config.options()) - {"method", "method_options", "show_text"}
    assert shared >= {"learning_rate", "batch_size", "gradient_checkpointing"}
    assert all(getattr(run, name) == getattr(config, name) for name in shared)


def test_a_holdout_with_a_forget_text_is_refused_before_the_model_is_loaded(model, tmp_path, monkeypatch):
    """Which one, and what to do; nothing is written."""
    monkeypatch.delattr("pyunlearn.comparing.api.LanguageModel.of")
    forget = tiny.sentences(2, 3)
    options = {"output_dir": tmp_path / "c"}
    with pytest.raises(DataError, match=r"holdout example 21 .* nearly one, of forget example 2: take it out"):
        compare(model, **options, holdout=[*HOLDOUT, forget[1]])
    with pytest.raises(DataError, match="nothing of retain is left"):
        compare(model, **options, retain=forget)
    assert not any(tmp_path.iterdir())


def test_copies_in_retain_are_left_out_once(model, tmp_path):
    """One warning for the comparison, none for each method; the note is in result.json."""
    options = {"output_dir": tmp_path / "c", "max_steps": 0, "plot": False, "progress": False}
    with pytest.warns(UserWarning, match="1 of 6 retain texts is a copy of a forget text and is left out") as caught:
        comparison = compare(model, **options, retain=[*RETAIN, tiny.sentences(1, 3)[0]])
    assert len(caught) == 1
    assert comparison.notes[0] == str(caught[0].message)
    assert Comparison.read(tmp_path / "c").notes == comparison.notes
