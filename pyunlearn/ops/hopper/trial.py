"""The first use of the Hopper kernels on a GPU: their self-test, in a subprocess with a timeout."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import suppress

import torch

from pyunlearn.ops.hopper import selftest
from pyunlearn.ops.hopper.record import record_of

SECONDS = 180  # a cold start of torch included
_NOT_TRIED = 75  # exit code of a subprocess that could not use the GPU


def run_trial(index: int) -> str | None:
    """Test the kernels on that GPU in a subprocess; return a sentence if they failed.

    They are tested once for each build, GPU, torch and CUDA version of the driver: the outcome is remembered, and of
    several processes one tests while the others wait. Where a second process cannot use the GPU (no memory, exclusive
    mode), or none can be started, the quick test runs in this one.
    """
    record = record_of(index)
    with record.alone(SECONDS):
        outcome = record.outcome()
        if outcome is None:
            outcome = _run_in_subprocess(f"trial({index})")
            if outcome is None:
                return selftest.compare(torch.device("cuda", index))
            record.write(outcome)
    return outcome or None


def trial(index: int) -> None:
    """Test the kernels on that GPU, and end this process: with 0, a sentence, or _NOT_TRIED."""
    device = torch.device("cuda", index)
    try:
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except RuntimeError:  # busy, or no memory for a second context
        sys.exit(_NOT_TRIED)
    try:
        sys.exit(selftest.compare(device, selftest.SMALL + selftest.WIDE, times=3))
    except RuntimeError:  # the memory is full
        sys.exit(_NOT_TRIED)


def _run_in_subprocess(statement: str, seconds: float = SECONDS) -> str | None:
    """Run a statement that sees this module's names, with the Hopper kernels turned off for all else.

    Returns "" if it ends with 0, the last line of standard error if it fails, None if it was not tried.
    """
    if getattr(sys, "frozen", False):
        return None  # sys.executable is an application, which would start again
    code = f"import sys\nsys.path[:] = {sys.path!r}\nfrom pyunlearn.ops.hopper.trial import *\n{statement}"
    environment = {**os.environ, "PYUNLEARN_HOPPER": "0"}
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, env=environment,
            )  # fmt: skip
        except OSError:
            return None
        try:
            ended = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)  # and no longer: where the driver hangs, it does not end
            return f"their self-test did not finish within {seconds:g} s"
        errors.seek(0)
        lines = errors.read().decode(errors="replace").strip().splitlines()
    if ended in (0, _NOT_TRIED):
        return None if ended else ""
    return lines[-1] if lines else f"the process that tested them ended with {ended}"
