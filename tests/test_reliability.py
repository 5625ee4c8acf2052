"""Faults at random moments of the commands: a small form of benchmarks/reliability.py."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer import Exit

from pyunlearn.cli import interruption
from pyunlearn.cli import main as cli

ROOT = Path(__file__).parent.parent
PROGRAM = """
import sys
sys.path.append(sys.argv.pop(1))
import pyunlearn
from benchmarks.reliability import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def listens_to_ctrl_c():
    """Python's own handler, also where the tests run in the background, whose processes a shell makes ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def faulted(folder, *options):
    """Run the benchmark on the package that the tests import; return its table as dicts. Nothing must be lost."""
    command = [sys.executable, "-c", PROGRAM, str(ROOT), *map(str, options)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


@pytest.mark.full
def test_nothing_is_lost(tmp_path):
    """After each fault the command has the result of the undisturbed run, or says what to do."""
    table = faulted(tmp_path, "--commands", "unlearn,audit,compare,edit", "--moments", 1, "--seconds", 240)
    assert len(table) == 4 * 5
    for row in table:
        assert row["lost"] == "0"
        assert row["tried"] == "1"
        assert sum(int(row[end]) for end in ("survived", "resumed", "refused with a sentence")) == 1


@pytest.mark.parametrize("again", [False, True])
def test_an_interrupted_command_ends_with_one_sentence(call, monkeypatch, again):
    """Also where it has none of its own, and where Ctrl-C comes once more meanwhile; exit code 130."""

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("pyunlearn.edits.registry.edit_named", interrupt)
    if again:
        monkeypatch.setattr(cli, "program", lambda names: interrupt)
    code, out, err = call("edit", "model", "--forget", "x.jsonl", "--edit", "prune")
    assert (code, out) == (130, "")
    assert err == "interrupted; run the same command again; it starts again, resumes, or says how to resume\n"


def test_the_sentence_of_a_command_comes_once(capsys):
    """It knows better where the work is."""

    def stops():
        raise interruption.interrupted("the parts are in out: run it again")

    with pytest.raises(Exit), interruption.explained():
        stops()
    assert capsys.readouterr().err == "interrupted; the parts are in out: run it again\n"


def test_an_interrupt_while_an_object_is_deleted_is_not_lost(capsys):
    """Python itself prints a traceback then, and continues."""

    class Deleted:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)  # the handler runs here

    def work():
        Deleted()
        time.sleep(10)

    with pytest.raises(SystemExit) as end, interruption.explained():
        work()
    assert end.value.code == 130
    assert "Traceback" not in capsys.readouterr().err


def test_two_interrupts_at_once_are_one(capsys):
    """A terminal and a launcher send one each, some milliseconds apart."""

    def work():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            print("cleaned up", file=sys.stderr)

    with pytest.raises(SystemExit), interruption.explained():
        work()
    assert capsys.readouterr().err.startswith("cleaned up\ninterrupted; ")


def test_an_interrupt_after_the_sentence_changes_nothing(capsys):
    """The process is about to end, and a traceback would hide the sentence."""
    with pytest.raises(SystemExit) as end, interruption.explained():
        raise KeyboardInterrupt
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)  # the handler would run here
    assert end.value.code == 130
    assert capsys.readouterr().err.startswith("interrupted; ")
