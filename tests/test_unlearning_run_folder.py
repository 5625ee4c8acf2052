"""The output folder of a run: one run at a time, writable, with room, and nothing of a run is lost at its end."""

import multiprocessing
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import tiny
import torch
from unlearning_runs import run, same, timeless

from pyunlearn.errors import ArgumentError, OutputError
from pyunlearn.methods import METHODS
from pyunlearn.progress import logger
from pyunlearn.unlearning import api, result
from pyunlearn.unlearning.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_checkpoint_is_next_to_the_output_folder(tmp_path):
    """It must exist to resume, and must not exist to start; without an output folder there is none."""
    path = tmp_path / "out.checkpoint.pt"
    assert RunFolder(None, resume=False).checkpoint is None
    assert RunFolder(tmp_path / "out", resume=False).checkpoint == path
    with pytest.raises(ArgumentError, match="does not exist: give that run's output_dir"):
        RunFolder(tmp_path / "out", resume=True)
    path.write_bytes(b"")
    assert RunFolder(tmp_path / "out", resume=True).checkpoint == path
    with pytest.raises(ArgumentError, match="holds an interrupted run: continue it with resume=True"):
        RunFolder(tmp_path / "out", resume=False)


def claim(path, answers):
    """Try to claim a folder, and put what happened into a queue."""
    try:
        with RunFolder(path, resume=False).claimed():
            answers.put("claimed")
    except OutputError as error:
        answers.put(str(error))


def test_a_folder_is_one_run_s_at_a_time(tmp_path):
    """Another process is told at once; afterwards the folder is free and nothing is left."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()

    def answer():
        other = context.Process(target=claim, args=(tmp_path / "out", answers))
        other.start()
        other.join()
        return answers.get(timeout=10)

    with RunFolder(tmp_path / "out", resume=False).claimed():
        assert "another run writes to" in answer()
    assert answer() == "claimed"
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    """Its own alone: a folder of a longer name is another run's."""
    for name in (".out.partial-ab", ".out.checkpoint.pt.partial-cd", ".out2.partial-ef"):
        (tmp_path / name).mkdir()
    with RunFolder(tmp_path / "out", resume=False).claimed():
        pass
    assert [p.name for p in tmp_path.iterdir()] == [".out2.partial-ef"]


def test_a_lock_of_a_killed_run_is_removed(tmp_path):
    """Also where its result is whole, so that no other run follows."""
    (tmp_path / ".out.lock").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "result.json").touch()
    with pytest.raises(OutputError, match="is not empty"):
        RunFolder(tmp_path / "out", resume=False)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_or_a_folder_that_cannot_be_written_is_known_before_the_first_step(tmp_path, monkeypatch):
    """One sentence with what is needed; the model is unchanged."""
    model, folder = torch.nn.Linear(1000, 1000), RunFolder(tmp_path / "out", resume=False)
    folder.require_room(model)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=13 * 2**20))
    with pytest.raises(OutputError, match=r"need 13 MiB, and .* has 13 MiB free: make room"):
        folder.require_room(model)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=16 * 2**20))
    folder.require_room(model)
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(OutputError, match="nothing can be written to"),
        RunFolder(tmp_path / "file" / "out", resume=False).claimed(),
    ):
        pytest.fail("claimed a folder in a file")


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt(), RuntimeError("what is it")])
def test_a_result_that_cannot_be_written_leaves_the_checkpoint(story, tmp_path, monkeypatch, error):
    """resume=True then writes the result of an uninterrupted run."""
    out, warnings = tmp_path / "out", []
    whole = run(story, max_steps=4)

    def fails(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(result, "save_folder", fails)
        patch.setattr(logger, "warning", warnings.append)
        with pytest.raises(type(error)):
            run(story, max_steps=4, output_dir=out)
    assert warnings == [f"{out}.checkpoint.pt holds the run: resume=True (--resume) continues it"]
    assert [p.name for p in tmp_path.iterdir()] == ["out.checkpoint.pt"]
    resumed = run(story, max_steps=4, output_dir=out, resume=True)
    assert timeless(resumed.history) == timeless(whole.history)
    assert same(resumed.model, whole.model)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_run_that_was_killed_after_its_end_is_finished_by_resume(story, tmp_path, monkeypatch):
    """The result is on the disk, and the checkpoint too."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(api.Checkpoint, "delete", lambda self: None)
        whole = run(story, max_steps=4, output_dir=out)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(ArgumentError, match="holds an interrupted run: continue it with resume=True"):
        run(story, max_steps=4, output_dir=out)
    resumed = run(story, max_steps=4, output_dir=out, resume=True)
    assert resumed.stopped == whole.stopped
    assert (out / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def breaking(error, at):
    """Return the loss of ga, which raises at its call number `at`."""
    calls, loss = [], METHODS["ga"].function

    def broken(*args, **kwargs):
        calls.append(1)
        if len(calls) == at + 1:
            raise error
        return loss(*args, **kwargs)

    return tiny.with_loss("ga", broken)


@pytest.mark.full
def test_an_error_in_a_step_leaves_the_last_good_state(story, tmp_path, monkeypatch):
    """The model has the accepted weights and no gradients, and the checkpoint resumes to the same numbers."""
    options, out = {"max_steps": 6, "batch_size": 1, "learning_rate": 2e-4}, tmp_path / "out"
    whole, model = run(story, **options), story.fresh()
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "ga", breaking(ZeroDivisionError("a bug"), 3))
        with pytest.raises(ZeroDivisionError):
            run(story, **options, model=model, output_dir=out)
    assert all(p.grad is None for p in model.parameters())
    resumed = run(story, **options, output_dir=out, resume=True)
    assert timeless(resumed.history) == timeless(whole.history)
    assert same(resumed.model, whole.model)


def test_out_of_memory_halves_the_examples_of_a_pass(story, monkeypatch):
    """The round is repeated: the numbers are those of that micro_batch_size, up to rounding."""
    whole, warnings = run(story, micro_batch_size=1, max_steps=4), []
    monkeypatch.setattr(logger, "warning", warnings.append)
    monkeypatch.setitem(METHODS, "ga", breaking(torch.OutOfMemoryError("out of memory"), 0))
    halved = run(story, micro_batch_size=2, max_steps=4)
    assert warnings == ["out of memory: the run continues with 1 examples in a pass"]
    for name in ("examples", "forget_loss", "retain_nll", "utility_rise"):
        for a, b in zip(halved.history, whole.history, strict=True):
            assert a.get(name) == pytest.approx(b.get(name), rel=1e-3, abs=1e-6)
    assert all(p.grad is None for p in halved.model.parameters())


def test_out_of_memory_with_one_example_ends_the_run(story, monkeypatch):
    """Nothing smaller is left."""
    model = story.fresh()
    monkeypatch.setitem(METHODS, "ga", breaking(RuntimeError("DefaultCPUAllocator: can't allocate memory"), 0))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        run(story, model=model, micro_batch_size=1)
    assert same(model, story.model)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_end_leaves_a_checkpoint_and_ends_the_process(story, tmp_path, monkeypatch, number):
    """The step is completed, the checkpoint written, and then the signal arrives, before anything is scored."""
    arrived, out = [], tmp_path / "out"
    loss, refresh = METHODS["ga"].function, api.refresh

    def signalled(*args, **kwargs):
        if not arrived and not (tmp_path / "sent").exists():
            (tmp_path / "sent").write_text("")
            os.kill(os.getpid(), number)
        return loss(*args, **kwargs)

    before = signal.signal(number, lambda *_: arrived.append((tmp_path / "out.checkpoint.pt").exists()))
    try:
        with monkeypatch.context() as patch:
            patch.setitem(METHODS, "ga", tiny.with_loss("ga", signalled))
            patch.setattr(api, "refresh", lambda session: (arrived.append("scored"), refresh(session)))
            assert run(story, max_steps=4, output_dir=out).stopped == "interrupted"
    finally:
        signal.signal(number, before)
    assert arrived == [True, "scored"]
    resumed = run(story, max_steps=4, output_dir=out, resume=True)
    assert timeless(resumed.history) == timeless(run(story, max_steps=4).history)
