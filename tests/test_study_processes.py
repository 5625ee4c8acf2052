"""Studies in several processes, and processes that end before their work does."""

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from study_settings import TINY

from pyunlearn.errors import ModelError
from pyunlearn.study import seeds

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

pytestmark = pytest.mark.full
PROGRAM = """
from pyunlearn.study import run_study, training
import json, sys
training.CHECKPOINT_SECONDS = 0.0
if __name__ == "__main__":
    run_study(sys.argv[1], processes=int(sys.argv[2]), **json.loads(sys.argv[3]))
"""


def start(tmp_path, out, processes):
    """Start a study in a process of its own, with one thread."""
    import json

    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(out), str(processes), json.dumps(TINY)]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)


def digests(folder):
    """Hash everything but the page, which shows the number of processes, and the weights."""
    files = [f for f in folder.rglob("*") if f.is_file() and f.suffix != ".html" and "models" not in f.parts]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(files)}


@pytest.mark.slow
def test_two_processes_and_kill_9_change_no_byte(tmp_path):
    """Killed while both processes train, which then end by themselves, and resumed by two others."""
    whole = start(tmp_path, tmp_path / "whole", 1)
    assert whole.wait() == 0
    killed = start(tmp_path, tmp_path / "killed", 2)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("models/*")):
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    time.sleep(1)  # the processes notice at once
    resumed = start(tmp_path, tmp_path / "killed", 2)
    assert resumed.wait() == 0
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob("*.checkpoint"))


def test_a_process_that_ends_without_a_word_is_one_sentence():
    """Its exit code and the way out; the study resumes."""

    class Ended:
        exitcode = -9

        def join(self):
            pass

    class Closed:
        def recv(self):
            raise EOFError

    workers = {Closed(): Ended()}
    with pytest.raises(ModelError, match="ended with exit code -9"):
        seeds._receive(next(iter(workers)), workers, print)
    assert not workers


def test_an_error_in_a_process_is_raised_here(monkeypatch):
    """The sentence of the error arrives, whichever process has it."""

    def broken(*_):
        raise ModelError("seed 3 is broken")

    monkeypatch.setattr(seeds, "run_seed", broken)
    ours, theirs = multiprocessing.Pipe(duplex=False)
    seeds._work(None, [3], torch.get_num_threads(), theirs)
    with pytest.raises(ModelError, match="seed 3 is broken"):
        seeds._receive(ours, {ours: None}, print)
