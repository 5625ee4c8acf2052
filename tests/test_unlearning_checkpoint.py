"""Checkpoints: an interrupted run resumes to the numbers of an uninterrupted one; a foreign checkpoint is refused."""

import pytest
import tiny
import torch
from unlearning_runs import Interrupted, run, same, timeless, weights

from pyunlearn.errors import ArgumentError, DataError
from pyunlearn.methods import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")


RESUMED = {
    "plain": {},
    "many batches": {"batch_size": 1, "retain": None},
    "rolled-back steps": {"learning_rate": 5e-3},
    "bfloat16": {},
}


@pytest.mark.parametrize("at", [0, 2, 4])
@pytest.mark.parametrize("setting", RESUMED)
def test_an_interrupted_run_resumes_to_the_numbers_of_an_uninterrupted_one(story, tmp_path, monkeypatch, at, setting):
    """Weights, optimizer, order, halvings, history and steps are those of the checkpoint, also within a round."""
    options = {"max_steps": 8, **RESUMED[setting]}
    model = story.fresh().bfloat16() if setting == "bfloat16" else story.fresh()
    start, forget = weights(model), story.forget + story.unseen
    whole = run(story, forget, **options, model=model)
    assert len(whole.history) > at
    if setting == "rolled-back steps":
        assert not whole.history[0]["accepted"]

    model.load_state_dict(start)
    out = tmp_path / "out"
    cut = tiny.with_loss("ga", Interrupted("ga", at))
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "ga", cut)
        interrupted = run(story, forget, **options, model=model, output_dir=out)
    assert interrupted.stopped == "interrupted"
    assert not out.exists()
    assert (tmp_path / "out.checkpoint.pt").exists()
    assert timeless(interrupted.history) == timeless(whole.history)[: len(interrupted.history)]
    assert len(interrupted.history) <= at
    assert not interrupted.history or "accepted" in interrupted.history[-1]

    model.load_state_dict(start)
    resumed = run(story, forget, **options, model=model, output_dir=out, resume=True)
    assert resumed.stopped == whole.stopped
    assert timeless(resumed.history) == timeless(whole.history)
    assert resumed.examples == whole.examples
    assert resumed.utility == whole.utility
    assert same(resumed.model, whole.model)
    assert (out / "result.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_resume_needs_an_output_folder(story):
    """One sentence, before anything is read or changed."""
    with pytest.raises(ArgumentError, match="no output_dir was given"):
        run(story, resume=True)


def test_a_checkpoint_of_another_run_is_refused(story, tmp_path, monkeypatch):
    """Other texts, model or settings, or no resume=True: one sentence, and model and checkpoint do not change."""
    out, checkpoint = tmp_path / "out", tmp_path / "out.checkpoint.pt"
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "ga", tiny.with_loss("ga", Interrupted("ga", 1)))
        assert run(story, output_dir=out).stopped == "interrupted"
    before, other = checkpoint.read_bytes(), story.fresh()
    with torch.no_grad():
        other.lm_head.weight.mul_(0.9)
    for changes, message in (
        ({"seed": 1}, "seed=0, not 1"),
        ({"learning_rate": 1e-4}, "learning_rate=0.0003, not 0.0001"),
        ({"method": "npo"}, "method='ga', not 'npo'"),
        ({"forget": story.forget[:1]}, "another model or forget set"),
        ({"holdout": story.holdout[::-1]}, "another model or holdout"),
        ({"model": other}, "another model or forget set"),
    ):
        model = changes.pop("model", None) or story.fresh()
        start = weights(model)
        with pytest.raises(DataError, match=message):
            run(story, **changes, model=model, output_dir=out, resume=True)
        assert all(torch.equal(w, start[name]) for name, w in model.state_dict().items())
    with pytest.raises(ArgumentError, match="holds an interrupted run: continue it with resume=True"):
        run(story, output_dir=out)
    assert checkpoint.read_bytes() == before
