"""Files written completely or not at all."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from coverings import in_full
from damage import damaged
from safetensors import SafetensorError

from pyunlearn.errors import DataError, OutputError
from pyunlearn.output import (
    check_output,
    locked,
    packed_arrays,
    read_arrays,
    remove_partial,
    require_writable,
    write_json,
    write_whole,
)


def tree(folder):
    """Return name -> content of every file in a folder."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_file_or_folder_replaces_the_one_before(tmp_path):
    """Missing parents are made, and nothing else is left."""
    target = tmp_path / "deep" / "run"
    write_whole(target, lambda path: path.write_text("first"))
    write_whole(target, lambda path: path.write_text("second"))
    assert tree(tmp_path) == {"deep/run": "second"}
    folder = tmp_path / "deep" / "folder"
    for name in ("a", "b"):
        write_whole(folder, lambda path, name=name: (path.mkdir(), (path / name).write_text(name)))
    assert tree(tmp_path) == {"deep/run": "second", "deep/folder/b": "b"}


@pytest.mark.parametrize(("error", "raised"), [(OSError("disk full"), OutputError), (KeyboardInterrupt(), None)])
def test_what_fails_half_way_leaves_the_one_before(tmp_path, error, raised):
    """A full disk is one sentence; an interrupt stays one."""

    def half(path):
        path.write_text("half")
        raise error

    target = tmp_path / "result.json"
    target.write_text("before")
    with pytest.raises(raised or type(error)):
        write_whole(target, half)
    assert tree(tmp_path) == {"result.json": "before"}


def test_the_file_is_not_there_before_it_is_complete(tmp_path):
    """A process that is killed meanwhile leaves no half of it under its name."""
    target = tmp_path / "result.json"
    seen = []

    def write(path):
        path.write_text("half")
        seen.append(target.exists())
        path.write_text("whole")

    write_whole(target, write)
    assert seen == [False]
    assert tree(tmp_path) == {"result.json": "whole"}


def test_what_a_killed_process_left_half_written_is_removed_by_the_next(tmp_path):
    """In place of the same name alone; a folder that holds nothing else counts as empty."""
    for name in (".a.json.partial-xy", ".b.json.partial-xy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("{")
    assert check_output(tmp_path) == tmp_path
    write_json(tmp_path / "a.json", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.json.partial-xy", "a.json"]
    check_output(tmp_path / "b.json")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_where_a_file_can_be_written_is_known_without_a_trace(tmp_path):
    """Also in a missing folder, which is not made; in a place that is a file nothing can be."""
    (tmp_path / ".new.partial-xy").mkdir()  # of a process that was stopped while it looked
    for target in (tmp_path, tmp_path / "new", tmp_path / "new" / "a.json"):
        require_writable(target)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        OutputError, match=r"nothing can be written to .*file, .* Not a directory; choose another folder"
    ):
        require_writable(tmp_path / "file" / "new" / "a.json")


@pytest.mark.parametrize(
    "command", ["attack", "audit", "bench tofu", "compare --retain keep.txt", "edit --edit ekfac_step"]
)
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(call, command):
    """Before a model is looked for; the sentence names the folder."""
    Path("file").write_text("text")
    data = ("--data", "data") if "bench" in command else ("--forget", "forget.txt")
    code, out, err = call(*command.split(), "no-model", *data, "--out", "file/out")
    assert (code, out) == (2, "")
    assert err.startswith("pyunlearn: nothing can be written to ")
    assert "/file, where the result would be: " in err


@pytest.mark.parametrize("kind", [OSError, RuntimeError, SafetensorError])
def test_a_full_disk_is_one_sentence_from_whichever_library(tmp_path, kind):
    """Each has an error of its own; nothing is left. A bug in what writes is no full disk."""

    def fails(path):
        path.mkdir()
        raise kind("File too large")

    with pytest.raises(OutputError, match=r"model could not be written to .*: File too large"):
        write_whole(tmp_path / "model", fails)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError):
        write_whole(tmp_path / "model", lambda path: 1 / 0)


def write_slowly(target, started, end):
    """Write a file while another process writes the same."""

    def write(path):
        started.set()
        end.wait(20)
        path.write_text("whole")

    write_whole(target, write)


def test_what_another_process_is_writing_stays(tmp_path):
    """It is locked as long as that process lives."""
    context = multiprocessing.get_context("fork")
    started, end = context.Event(), context.Event()
    other = context.Process(target=write_slowly, args=(tmp_path / "a", started, end))
    other.start()
    assert started.wait(20)
    (partial,) = tmp_path.iterdir()
    with locked(partial) as mine:
        assert mine is False
    remove_partial(tmp_path)
    assert partial.exists()
    end.set()
    other.join()
    assert (tmp_path / "a").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with locked(tmp_path / "missing") as mine:
        assert mine is False


def test_a_half_written_file_is_removed_as_a_folder_is(tmp_path):
    """So that the output folder that holds nothing else can be written."""
    target = tmp_path / "out"
    (target / ".x.partial-2").mkdir(parents=True)
    (target / ".x.partial-1").write_text("half")
    remove_partial(target)
    assert list(target.iterdir()) == []


ARRAYS = {
    "numbers": np.arange(6, dtype=np.float32).reshape(2, 3).T,  # not contiguous
    "flags": np.array([True, False]),
    "none": np.zeros((0, 4), dtype=np.int64),
    "one": np.array(2.5),
}


def _same_arrays(a, b):
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and np.array_equal(a[k], b[k]) for k in a
    )


def test_arrays_come_back_as_they_were_written(tmp_path):
    """With dtype and shape."""
    (tmp_path / "a").write_bytes(packed_arrays(ARRAYS))
    assert _same_arrays(read_arrays(tmp_path / "a"), ARRAYS)


@pytest.mark.parametrize("count", [100, *in_full(1000)])
def test_damaged_arrays_are_refused(tmp_path, count):
    """Bytes are cut, flipped, overwritten or added: a sentence, or (in the spaces of the header) the same numbers."""
    path, rng, refused = tmp_path / "a", np.random.default_rng(0), 0
    data = packed_arrays(ARRAYS)
    for _ in range(count):
        path.write_bytes(damaged(rng, data))
        try:
            assert _same_arrays(read_arrays(path), ARRAYS)
        except DataError:
            refused += 1
    assert refused > count * 0.9
