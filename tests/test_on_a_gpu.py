"""benchmarks/on_a_gpu.sh: the order of its steps, their limits, what a failure or a kill leaves, and a second call."""

import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "on_a_gpu.sh"
STEPS = ["build", "selftest", "forced", "memcheck", "synccheck", "tests", "predictions", "peers", "step"]

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("timeout") is None, reason="needs bash and the GNU coreutils"
)


def run(*options, path="", **environment):
    """Run the script to its end; (exit code, standard output, standard error)."""
    settings = os.environ | {"PATH": f"{path}:{os.environ['PATH']}"} | environment
    done = subprocess.run([SCRIPT, *map(str, options)], capture_output=True, text=True, env=settings, timeout=300)
    return done.returncode, done.stdout, done.stderr


def outcomes(out):
    """Return {step: outcome} of the summary in a results folder."""
    lines = (out / "summary.txt").read_text().splitlines()[2:]
    return {line.split()[0]: re.split(r"\s{2,}", line[19:].strip())[0] for line in lines}


@pytest.fixture
def tools(tmp_path):
    """A folder of stand-ins for the programs of the steps; fail(name) makes one fail, hang(name) wait."""
    folder = tmp_path / "tools"
    folder.mkdir()

    def program(name, body):
        (folder / name).write_text(f"#!/bin/bash\necho {name} $* PYUNLEARN_HOPPER=$PYUNLEARN_HOPPER\n{body}\n")
        (folder / name).chmod(stat.S_IRWXU)

    for name in ("pip", "pytest", "compute-sanitizer", "python", "nvidia-smi", "nvcc"):
        program(name, "exit 0")
    program("pyunlearn", "echo ' Hopper kernels   used '")
    program.folder = folder
    return program


def test_the_steps_and_their_limits():
    """The dry run shows each step in order; their limits, with the time to end one by force, add up to nine minutes."""
    code, shown, _ = run("--dry-run")
    heads = re.findall(r"^([\w-]+) \(at most (\d+) \+ (\d+) s\)$", shown, re.MULTILINE)
    assert code == 0
    assert [name for name, *_ in heads] == STEPS
    assert sum(int(limit) + int(grace) for _, limit, grace in heads) <= 540
    assert "--no-build-isolation --no-deps --no-index" in shown
    for tool in ("racecheck", "initcheck"):
        assert tool not in shown
        assert tool in run("--dry-run", "--long")[1]
    assert re.findall(r"^([\w-]+) \(", run("--dry-run", "--only", "tests", "--only", "build")[1], re.MULTILINE) == [
        "build",
        "tests",
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "--out FOLDER is needed"),
        (("--out",), "--out needs a value"),
        (("--at-most", "1m"), "--at-most needs whole seconds, got 1m"),
        (("--fast",), "unknown option --fast"),
        (("--dry-run", "--only", "benchmark"), "no step benchmark: there are build selftest"),
    ],
)
def test_wrong_options(options, words):
    """A wrong option is one sentence and exit code 2."""
    code, _, error = run(*options)
    assert code == 2
    assert words in error
    assert len(error.splitlines()) == 1


@pytest.mark.full
def test_a_failure_stops_nothing_and_a_second_call_mends_it(tools, tmp_path):
    """The steps after a failure run, and the next call runs only what did not pass, or --again asks for."""
    out = tmp_path / "out"
    tools("compute-sanitizer", "[[ $* == *memcheck* ]] && exit 1; exit 0")
    code, _, _ = run("--out", out, path=tools.folder)
    expected = dict.fromkeys(STEPS, "passed") | {"memcheck": "FAILED (1)"}
    if not (ROOT / "benchmarks" / "step.py").exists():
        expected["step"] = "left out"
    assert code == 1
    assert outcomes(out) == expected
    assert "PYUNLEARN_HOPPER=1" in (out / "forced.log").read_text()
    assert "--tool memcheck python -m benchmarks.small_shapes" in (out / "memcheck.log").read_text()
    assert "commit" in (out / "environment.txt").read_text()
    tools("compute-sanitizer", "exit 0")
    tools("pyunlearn", "echo ' Hopper kernels   built, cannot run here '")
    code, shown, _ = run("--out", out, "--again", "forced", path=tools.folder)
    passed = {name: "passed before" for name in expected if expected[name] == "passed"}
    assert outcomes(out) == expected | passed | {"memcheck": "passed", "forced": "FAILED (1)"}
    assert code == 1
    assert "the Hopper kernels are not used: see above" in shown


@pytest.mark.full
def test_what_ran_on_an_older_build_runs_again(tools, tmp_path):
    """After a build that failed, no step has passed for these sources."""
    out = tmp_path / "out"
    tools("pip", "exit 1")
    run("--out", out, "--only", "build", "--only", "predictions", path=tools.folder)
    assert outcomes(out) == {"build": "FAILED (1)", "predictions": "passed"}
    tools("pip", "exit 0")
    run("--out", out, "--only", "build", "--only", "predictions", path=tools.folder)
    assert outcomes(out) == {"build": "passed", "predictions": "passed"}


@pytest.mark.full
def test_a_step_ends_at_its_limit(tools, tmp_path):
    """A step that hangs is ended at its limit, by force where it does not listen, and the next one runs."""
    out = tmp_path / "out"
    tools("pytest", "trap '' INT; echo one answer; sleep 60; sleep 60")
    began = time.monotonic()
    code, _, _ = run("--out", out, "--only", "tests", "--only", "predictions", "--at-most", 5, path=tools.folder)
    assert code == 1
    assert outcomes(out) == {"tests": "over its limit", "predictions": "passed"}
    assert "one answer" in (out / "tests.log").read_text()
    assert time.monotonic() - began < 5 + 5 + 10


@pytest.mark.full
def test_a_killed_call_leaves_what_it_had(tools, tmp_path):
    """A call that is ended leaves the logs and a table, and ends the step that was running."""
    out = tmp_path / "out"
    tools("pytest", f"echo one answer; echo $$ > {tmp_path}/pid; sleep 60; echo never")
    tools("python", "exit 1")  # the build is not there, so it is built again
    running = subprocess.Popen(
        [SCRIPT, "--out", out],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PATH": f"{tools.folder}:{os.environ['PATH']}"},
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    shown, _ = running.communicate(timeout=30)
    assert running.returncode == 1
    assert "one answer" in (out / "tests.log").read_text()
    assert outcomes(out)["tests"] == "interrupted"
    assert "interrupted" in shown
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.emulator
def test_the_chain_on_the_emulator(extension, tmp_path):
    """Each step that means something without a GPU passes on the emulator, in a minute of one core, once."""
    out, folder = tmp_path / "out", Path(extension[0].__file__).parent
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code, shown, error = run("--emulator", "--out", out, EMULATOR=str(folder))
    assert code == 0, shown + error
    left_out = dict.fromkeys(("forced", "synccheck", "tests", "step"), "left out")
    assert outcomes(out) == dict.fromkeys(STEPS, "passed") | left_out
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # not the clock's time, which other programs lengthen
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60
    assert "forward, kernel" in (out / "predictions.log").read_text()
    assert len((out / "predictions.jsonl").read_text().splitlines()) == 4
    assert list((out / "peers").glob("linear_log_likelihood_*.json"))
    code, shown, _ = run("--emulator", "--out", out, EMULATOR=str(folder))
    assert code == 0
    assert "passed before" in shown
