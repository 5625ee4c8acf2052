"""The numbers of each step during a run: for a function of the user, and in trackers."""

import struct

import pytest
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from unlearning_runs import run, same, timeless

from pyunlearn.errors import ArgumentError, DependencyError, OutputError
from pyunlearn.unlearning import trackers

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_function_gets_the_record_of_every_step(story):
    """While the run is under way, as copies: what it does to them changes nothing."""
    calls = []

    def listen(record):
        calls.append(dict(record))
        record.clear()

    result = run(story, learning_rate=1e-3, on_step=listen)
    assert calls == result.history
    assert len(calls) > 1
    assert timeless(calls) == timeless(run(story, learning_rate=1e-3).history)


def test_an_error_of_the_function_ends_a_run_that_can_be_resumed(story, tmp_path):
    """Its own error, and a checkpoint; the resumed run reports the later steps alone, and ends the same."""
    whole = run(story, learning_rate=1e-3)
    assert whole.history[-1]["round"] > 1

    def fails(record):
        if record["round"] == 1:
            raise ConnectionError("the tracker is away")

    options = {"learning_rate": 1e-3, "output_dir": tmp_path / "out"}
    with pytest.raises(ConnectionError, match="the tracker is away"):
        run(story, on_step=fails, **options)
    steps = []
    result = run(story, resume=True, on_step=lambda record: steps.append(record["step"]), **options)
    assert same(result.model, whole.model)
    first = next(record["step"] for record in whole.history if record["round"] == 2)
    assert steps == list(range(first, len(whole.history) + 1))


def test_the_numbers_of_each_step_are_in_the_tracker(story, tmp_path, monkeypatch):
    """In files of TensorBoard next to the result, which holds none of them."""
    pytest.importorskip("tensorboardX")
    result = run(story, learning_rate=1e-3, log_with=["tensorboard"], output_dir=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.logs"}
    scalars = read_scalars(tmp_path / "out.logs")
    for record in result.history:
        for name, value in trackers.numbers(record).items():
            assert scalars[name, record["step"]] == pytest.approx(value, rel=1e-5)
    assert ("gradient_norm", 1) in scalars
    monkeypatch.chdir(tmp_path)
    run(story, story.unseen, learning_rate=1e-3, log_with=["tensorboard"])
    assert (tmp_path / "pyunlearn.logs").is_dir()


def test_a_tracker_that_fails_is_left_out(story, monkeypatch, tmp_path):
    """A run is not lost with its network; one that cannot start is refused, and no path is sent to any."""
    pytest.importorskip("tensorboardX")
    lines, settings = [], {}
    monkeypatch.setattr(trackers.logger, "warning", lines.append)
    monkeypatch.chdir(tmp_path)
    tracker = LOGGER_TYPE_TO_CLASS["tensorboard"]

    def fails(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(tracker, "log", fails)
    monkeypatch.setattr(tracker, "store_init_configuration", lambda _, values: settings.update(values))
    (tmp_path / "form.jinja").write_text("{{ messages[0].content }}{{ messages[1].content }}")
    result = run(story, learning_rate=1e-3, log_with=["tensorboard"], template=str(tmp_path / "form.jinja"))
    assert result.stopped == "forgotten"
    assert lines == ["the tracker tensorboard failed and is left out from here on: no network"]
    assert (settings["method"], settings["learning_rate"]) == ("ga", 1e-3)
    assert str(tmp_path) not in str(settings)
    Accelerator(mixed_precision="no")  # the state is the user's
    monkeypatch.setattr(tracker, "log", lambda *_, **__: None)
    monkeypatch.setattr(tracker, "finish", fails)
    assert run(story, story.unseen, log_with=["tensorboard"]).stopped == "nothing memorized"
    assert len(lines) == 2
    monkeypatch.setattr(tracker, "store_init_configuration", fails)
    with pytest.raises(OutputError, match="the tracker tensorboard could not be started: no network"):
        run(story, story.unseen, log_with=["tensorboard"])


def read_scalars(folder):
    """(name, step) -> value, of the event files in a folder: records of length, check sum, message, check sum."""
    from tensorboardX.proto.event_pb2 import Event

    values = {}
    for path in folder.rglob("events.*"):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (size,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + size])
            values |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
            at += 12 + size + 4
    return values


def test_what_cannot_listen_is_refused_before_anything_is_read(story):
    """With one sentence each."""
    with pytest.raises(ArgumentError, match=r"on_step must be a function of one step's record.*got str"):
        run(story, on_step="wandb")
    with pytest.raises(DependencyError, match="the tracker dvclive is not installed: pip install dvclive"):
        run(story, log_with=["dvclive"])
    with pytest.raises(ArgumentError, match="log_with"):
        run(story, log_with=["nothing"])
