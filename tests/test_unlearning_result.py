"""The result of a run: its history, its JSON form, and the folder that it is saved to."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer
from unlearning_runs import run, same

import pyunlearn
from pyunlearn import models
from pyunlearn.errors import OutputError

STEP = {"step", "round", "examples", "restored", "forget_loss", "retain_nll", "gradient_norm", "learning_rate"}
STEP |= {"forget_weight", "seconds"}
ROUND = {
    "accepted",
    "rejection_reason",
    "active",
    "utility_rise",
    "utility_rise_upper",
    "holdout_rise",
    "holdout_rise_upper",
    "mean_log_likelihood",
    "exposure",
    "extraction",
    "overshot",
    "scored",
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_left_as_it_was(story, training):
    """A model that is unlearned within a training is still in training mode after it, every module of it."""
    model = story.fresh().train(training)
    model.model.layers[0].train(not training)
    modes = [module.training for module in model.modules()]
    settings = {"holdout": story.holdout, "tokenizer": story.tokenizer, "max_steps": 1, "progress": False}
    result = pyunlearn.unlearn(model, story.forget, **settings)
    assert result.model is model
    assert [module.training for module in model.modules()] == modes


def test_the_history_has_one_record_a_step_and_the_state_after_each_round(story):
    """Every record has all documented fields, the last accepted round agrees with the result, and all of it is JSON."""
    result = run(story, story.forget + story.unseen, batch_size=1, learning_rate=1e-3)
    rounds = [record for record in result.history if "accepted" in record]
    assert all(record.keys() in (STEP, STEP | ROUND) for record in result.history)
    assert [record["step"] for record in result.history] == list(range(1, len(result.history) + 1))
    assert result.history[-1] is rounds[-1]
    assert [record["round"] for record in rounds] == list(range(len(rounds)))
    assert all(len(record["exposure"]) == len(record["mean_log_likelihood"]) == 4 for record in rounds)
    last = [record for record in rounds if record["accepted"]][-1]
    assert last["active"] == 0
    assert last["exposure"] == [e.exposure_after for e in result.examples]
    assert last["mean_log_likelihood"] == [e.log_likelihood_after for e in result.examples]
    assert last["utility_rise"] == result.utility.relative_rise
    low, high = result.utility.interval
    assert low <= result.utility.relative_rise <= high == last["utility_rise_upper"]
    assert last["holdout_rise"] == result.utility.holdout_rise
    assert last["holdout_rise_upper"] == result.utility.holdout_interval[1]
    then, now = (tiny.negative_log_likelihoods(story, story.holdout, m) for m in (story.model, result.model))
    assert result.utility.non_member_drift == pytest.approx((now - then).mean(), abs=1e-5) != 0

    data = result.to_dict(show_text=True)
    assert json.loads(json.dumps(data, allow_nan=False)) == json.loads(json.dumps(data))
    flags = {"forgotten", "passed", "evidence", "stopped", "notes", "rendering", "documents"}
    assert data.keys() == flags | {"non_member_scores", "utility", "examples", "settings", "history", "attack"}
    first = asdict(result.examples[0])
    assert data["examples"][0] == {**first, "interval": list(first["interval"]), "forgotten": True}
    assert data["settings"]["pyunlearn"] == pyunlearn.__version__
    assert (data["settings"]["method"], data["settings"]["learning_rate"], data["settings"]["seed"]) == ("ga", 1e-3, 0)
    assert (data["settings"]["weights"], data["settings"]["method_used"]) == ("float32", "ga")


def test_a_saved_model_loads_with_the_same_weights(story, tmp_path):
    """The folder has safetensors, tokenizer and result.json."""
    result = run(story, output_dir=tmp_path / "a" / "out")
    out = tmp_path / "a" / "out"
    names = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "result.json"} <= names
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert same(model, result.model)
    assert tokenizer(story.forget)["input_ids"] == story.tokenizer(story.forget)["input_ids"]
    np.testing.assert_allclose(
        tiny.negative_log_likelihoods(story, story.forget, model),
        [-e.log_likelihood_after for e in result.examples],
        rtol=1e-5,
    )
    written = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(result.to_dict()))
    assert written["settings"]["output_dir"] == "out"
    assert {e["text"].split()[0] for e in written["examples"]} == {"•••"}
    (tmp_path / "empty").mkdir()
    assert result.save(tmp_path / "empty") == tmp_path / "empty"
    loaded, _ = models.load(tmp_path / "empty")
    assert same(loaded, model)


def test_an_output_folder_that_is_not_empty_is_refused_before_anything_is_changed(story, tmp_path):
    """A file is refused too; the content of both stays."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    model = story.fresh()
    for target, message in ((tmp_path / "out", "is not empty"), (tmp_path / "out" / "mine.txt", "is a file")):
        with pytest.raises(OutputError, match=message):
            run(story, model=model, output_dir=target)
        with pytest.raises(OutputError, match=message):
            run(story, story.unseen).save(target)
    assert same(model, story.model)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize("place", ["a mount point", "the current folder"])
def test_files_are_written_into_a_folder_that_has_to_stay(story, tmp_path, monkeypatch, place):
    """The volume of a container, and the folder in which a shell is, get the files themselves and no others."""
    out = tmp_path / "out"
    out.mkdir()
    before = out.stat().st_ino
    if place == "a mount point":
        monkeypatch.setattr(Path, "is_mount", lambda self: self == out)
    else:
        monkeypatch.chdir(out)
    monkeypatch.setattr(Path, "rmdir", lambda self: pytest.fail("it cannot be removed"))
    run(story, story.unseen).save(out)
    assert out.stat().st_ino == before
    names = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "result.json", "config.json"} <= names
    assert not any(name.startswith(".") for name in names)
    AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("a library's own")])
def test_a_result_is_saved_completely_or_not_at_all(story, tmp_path, monkeypatch, error):
    """A save that fails in the middle leaves no file, with any error of the library below."""
    result = run(story, story.unseen)
    (tmp_path / "out").mkdir()

    def half(folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(result.model, "save_pretrained", half)
    for target in (tmp_path / "out", tmp_path / "new"):
        with pytest.raises(OutputError, match=str(error)):
            result.save(target)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert list((tmp_path / "out").iterdir()) == []
