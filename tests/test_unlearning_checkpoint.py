"""Checkpoints: an interrupted run resumes to the numbers of an uninterrupted one; a foreign checkpoint is refused."""

import pickle
from dataclasses import asdict

import numpy as np
import pytest
import tiny
import torch
from coverings import in_full
from damage import damaged
from torch import nn
from unlearning_runs import Interrupted, run, same, timeless, weights

from pyunlearn.errors import ArgumentError, DataError
from pyunlearn.methods import METHODS, Multiplier
from pyunlearn.progress import logger
from pyunlearn.unlearning import utility_set
from pyunlearn.unlearning.checkpoint import Checkpoint, LoopState, sampled_texts
from pyunlearn.unlearning.optimizer import TrainedWeights
from pyunlearn.unlearning.step_size import StepSize

pytestmark = pytest.mark.usefixtures("one_thread")

FINGERPRINT = {"seed": 0, "method": "pdu", "forget set": [-1.5, -2.5], "mask": None}


def state_of(multiplier=True):
    """Return the state of a loop after five steps on three examples."""
    return LoopState(
        visits=np.array([3, 0, 2]),
        multiplier=Multiplier(4.0, 0.5, 1.5, 2, steps=5) if multiplier else None,
        step=5,
        round_number=2,
        step_size=StepSize(-1, 2, 4),
        scores={"log_likelihood": np.array([-1.5, -2.5, -3.5]), "stale": np.array([False, True, False])},
        history=[{"step": 5, "forget_loss": -1.25, "utility_rise": None}],
    )


def trained_layer(width=3, seed=0):
    """Return (a linear layer, its weights after one step)."""
    torch.manual_seed(seed)
    model = nn.Linear(width, 2)
    state = TrainedWeights(model, 1e-2, resumable=True, mask={"bias": torch.tensor([True, False])})
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    state.optimizer.step()
    state.accept()
    return model, state


# ---------------------------------------------------------------- the state of the loop


def test_restore_returns_to_the_snapshot_in_place():
    """The same array and the same multiplier, for the two terms of the loss hold them too."""
    state = state_of()
    visits, multiplier, snapshot = state.visits, state.multiplier, state.snapshot()
    visits += 1
    multiplier.update(9.0)
    assert multiplier != Multiplier(4.0, 0.5, 1.5, 2, steps=5)
    state.restore(snapshot)
    assert state.visits is visits
    assert visits.tolist() == [3, 0, 2]
    assert state.multiplier is multiplier == Multiplier(4.0, 0.5, 1.5, 2, steps=5)


def test_a_snapshot_can_be_restored_twice():
    """Neither the steps after it nor those after a restore change it."""
    state = state_of()
    snapshot = state.snapshot()
    for _ in range(2):
        state.visits[0] = 99
        state.multiplier.value = 99.0
        state.restore(snapshot)
        assert (state.visits[0], state.multiplier.value) == (3, 4.0)


def test_a_state_without_a_multiplier_has_none_after_restore():
    """Only PDU has one."""
    state = state_of(multiplier=False)
    snapshot = state.snapshot()
    state.visits[:] = 0
    state.restore(snapshot)
    assert state.visits.tolist() == [3, 0, 2]
    assert state.multiplier is None


# ---------------------------------------------------------------- the file


def test_a_checkpoint_loads_what_was_saved(tmp_path):
    """Weights, moments, mask, and the state of the loop, in place; the next step is the same."""
    path = tmp_path / "deep" / "out.checkpoint.pt"
    (model, saved), state = trained_layer(), state_of()
    Checkpoint(path, FINGERPRINT, {"alternates": [1, 2]}).save(saved, state)
    assert [p.name for p in path.parent.iterdir()] == ["out.checkpoint.pt"]
    assert sampled_texts(path) == {"alternates": [1, 2]}
    (other, loaded), visits = trained_layer(seed=1), np.zeros(3, dtype=np.int64)
    resumed = LoopState(visits, Multiplier(50.0, 1.0, 1.0, 0))
    Checkpoint(path, FINGERPRINT, {}).load(loaded, resumed)
    assert same(model, other)
    assert {name: values.tolist() for name, values in resumed.scores.items()} == {
        "log_likelihood": [-1.5, -2.5, -3.5],
        "stale": [False, True, False],
    }
    loaded_arrays, arrays = {"visits": visits.tolist(), "scores": None}, {"visits": [3, 0, 2], "scores": None}
    assert asdict(resumed) | loaded_arrays == asdict(state) | arrays
    assert resumed.visits is visits
    for m, w in ((model, saved), (other, loaded)):
        for p in m.parameters():
            p.grad = torch.full_like(p, 3.0)
        w.optimizer.step()
        w.restore_masked()
    assert same(model, other)
    Checkpoint(path, FINGERPRINT, {}).delete()
    assert not path.exists()
    assert sampled_texts(path) == {}
    Checkpoint(path, FINGERPRINT, {}).delete()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "was made with seed=0, not 1"),
        ({"method": "ga"}, "was made with method='pdu', not 'ga'"),
        ({"mask": "a1b2"}, "was made with mask=None, not 'a1b2'"),
        ({"forget set": [-1.5, -2.6]}, "was made with another model or forget set"),
        ({"forget set": [-1.5]}, "was made with another model or forget set"),
    ],
)
def test_a_checkpoint_with_another_fingerprint_is_refused(tmp_path, change, message):
    """One sentence names the setting or the text; weights and state stay as they are."""
    path = tmp_path / "out.checkpoint.pt"
    Checkpoint(path, FINGERPRINT, {}).save(trained_layer()[1], state_of())
    (model, loaded), state = trained_layer(seed=1), LoopState(np.zeros(3, dtype=np.int64))
    before = weights(model)
    with pytest.raises(DataError, match=message):
        Checkpoint(path, FINGERPRINT | change, {}).load(loaded, state)
    assert same(model, before)
    assert (state.step, state.visits.tolist(), state.history) == (0, [0, 0, 0], [])


def test_scores_that_differ_by_rounding_are_the_same(tmp_path):
    """The same texts on other hardware; a difference of a thousandth is another model."""
    path = tmp_path / "out.checkpoint.pt"
    Checkpoint(path, FINGERPRINT, {}).save(trained_layer()[1], state_of())
    Checkpoint(path, FINGERPRINT | {"forget set": [-1.50005, -2.5]}, {}).load(trained_layer()[1], state_of())
    with pytest.raises(DataError, match="forget set"):
        Checkpoint(path, FINGERPRINT | {"forget set": [-1.5015, -2.5]}, {}).load(trained_layer()[1], state_of())


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path):
    """It belongs to another model, and no weight has been changed."""
    path = tmp_path / "out.checkpoint.pt"
    Checkpoint(path, FINGERPRINT, {}).save(trained_layer()[1], state_of())
    model, loaded = trained_layer(width=4)
    before = weights(model)
    with pytest.raises(DataError, match="belongs to another model: delete it, or give the model"):
        Checkpoint(path, FINGERPRINT, {}).load(loaded, state_of())
    assert same(model, before)


def test_a_run_without_an_output_folder_writes_no_file(tmp_path, monkeypatch):
    """Save and delete do nothing then."""
    monkeypatch.chdir(tmp_path)
    checkpoint = Checkpoint(None, FINGERPRINT, {})
    checkpoint.save(trained_layer()[1], state_of())
    checkpoint.delete()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_save_that_fails_warns_and_leaves_the_last_checkpoint(tmp_path, monkeypatch, error):
    """The file is written under another name first, and a run continues without it."""
    path, warnings = tmp_path / "out.checkpoint.pt", []
    assert Checkpoint(path, FINGERPRINT, {}).save(trained_layer()[1], state_of())
    before = path.read_bytes()

    def half(data, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", half)
    monkeypatch.setattr(logger, "warning", warnings.append)
    assert not Checkpoint(path, FINGERPRINT, {}).save(trained_layer()[1], state_of())
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out.checkpoint.pt"]
    assert warnings == [f"the checkpoint {path} could not be written ({error})"]


def test_only_its_owner_can_read_a_checkpoint(tmp_path):
    """And a link that was planted under the name is replaced, not followed."""
    path, other = tmp_path / "out.checkpoint.pt", tmp_path / "other"
    other.write_bytes(b"mine")
    path.symlink_to(other)
    Checkpoint(path, FINGERPRINT, {}).save(trained_layer()[1], state_of())
    assert path.stat().st_mode & 0o777 == 0o600
    assert not path.is_symlink()
    assert other.read_bytes() == b"mine"


@pytest.mark.parametrize("count", [100, *in_full(1000)])
def test_a_damaged_checkpoint_is_refused(tmp_path, count):
    """Bytes are cut, flipped, overwritten or added: one sentence, and nothing has changed."""
    path, rng = tmp_path / "out.checkpoint.pt", np.random.default_rng(0)
    Checkpoint(path, FINGERPRINT, {}).save(trained_layer()[1], state_of())
    data = path.read_bytes()
    (model, loaded), state = trained_layer(seed=1), LoopState(np.zeros(3, dtype=np.int64))
    before = weights(model)
    for _ in range(count):
        path.write_bytes(damaged(rng, data))
        for read in (lambda: sampled_texts(path), lambda: Checkpoint(path, FINGERPRINT, {}).load(loaded, state)):
            with pytest.raises(DataError, match="delete it and start again without resume"):
                read()
    assert same(model, before)
    assert state.step == 0


def test_a_foreign_file_is_no_checkpoint(tmp_path):
    """Nor is an empty one, a pickle, or one of another version."""
    path = tmp_path / "out.checkpoint.pt"
    for data in (b"", b"x" * 1000, pickle.dumps({"weights": 1})):
        path.write_bytes(data)
        with pytest.raises(DataError, match="is no whole checkpoint of pyunlearn, or one of an older version"):
            sampled_texts(path)
    Checkpoint(path, FINGERPRINT, {}).save(trained_layer()[1], state_of())
    path.write_bytes(path.read_bytes().replace(b"checkpoint 3 sha256", b"checkpoint 2 sha256"))
    with pytest.raises(DataError, match="is of another version of pyunlearn"):
        sampled_texts(path)


# ---------------------------------------------------------------- in a run


RESUMED = {
    "plain": {},
    "many batches": {"batch_size": 1, "retain": None},
    "rolled-back steps": {"learning_rate": 2e-2},
    "bfloat16": {"offload_optimizer": True},
    "moments in 8 bits": {"moments_in_8bit": True},
    "a loss that is scaled": {"method": "kto"},
    "a loss that stops by token": {"method": "wtnpo"},
    "answers that are held": {"batch_size": 1, "learning_rate": 5e-5},
}


@pytest.mark.parametrize(
    ("at", "setting"),
    [(4, "rolled-back steps"), (0, "bfloat16"), *in_full(*((at, setting) for at in (0, 2, 4) for setting in RESUMED))],
)
def test_an_interrupted_run_resumes_to_the_numbers_of_an_uninterrupted_one(story, tmp_path, monkeypatch, at, setting):
    """Weights, optimizer, order, step size, history and steps are those of the checkpoint, also within a round."""
    if setting == "answers that are held":
        monkeypatch.setattr(utility_set, "_KNOWN", 99.0)  # the retain set counts as known by heart
    options = {"method": "ga", "max_steps": 8, **RESUMED[setting]}
    method = options["method"]
    model = story.fresh().bfloat16() if setting == "bfloat16" else story.fresh()
    start, forget = weights(model), story.forget + story.unseen
    whole = run(story, forget, **options, model=model)
    assert len(whole.history) > at
    if setting == "rolled-back steps":
        assert not whole.history[0]["accepted"]

    model.load_state_dict(start)
    out = tmp_path / "out"
    cut = tiny.with_loss(method, Interrupted(method, at))
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, method, cut)
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
