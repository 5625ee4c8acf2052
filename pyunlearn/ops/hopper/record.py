"""The outcome of the Hopper kernels' self-test is remembered on disk for each build, GPU and torch."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from pyunlearn.ops import _backend

_PASSED = "passed"  # an empty file may be what a crash has left
DAY = 24 * 3600  # seconds for which a failure is remembered; a pass is remembered for good


class Record(NamedTuple):
    """A file with the outcome: a word after a pass, the sentence after a failure. Without a path nothing is remembered.

    A folder that cannot be read or written is no error: then each process tests for itself.
    """

    path: Path | None

    def outcome(self) -> str | None:
        """Return "" for a pass, the sentence of a failure of the last day, or None where nothing is known."""
        try:
            if self.path is None:
                return None
            text = self.path.read_text(errors="replace")
            if text == _PASSED:
                return ""
            return text if text and time.time() - self.path.stat().st_mtime <= DAY else None
        except OSError:
            return None

    def write(self, outcome: str) -> None:
        """Remember an outcome, where that is possible."""
        try:
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                fresh = self.path.with_name(f"{self.path.name}.{os.getpid()}")
                fresh.write_text(outcome or _PASSED)
                fresh.replace(self.path)
        except OSError:
            pass

    @contextmanager
    def alone(self, seconds: float) -> Iterator[None]:
        """Wait for other processes that test the same, at most that long, and make further ones wait."""
        lock = None
        try:
            import fcntl

            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                lock = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
                deadline = time.monotonic() + seconds
                while not _locked(lock, fcntl) and time.monotonic() < deadline:
                    time.sleep(0.1)
        except (ImportError, OSError):
            pass  # no locks here: each process tests for itself
        try:
            yield
        finally:
            if lock is not None:
                os.close(lock)


def record_of(index: int) -> Record:
    """Return the record of the extension's kernels on that GPU."""
    built = Path(_backend.extension().__file__)
    about = (hashlib.sha256(built.read_bytes()).hexdigest(), torch.cuda.get_device_name(index), torch.__version__)
    driver = _backend.build_info().get("cuda_driver")
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no home
        return Record(None)
    name = f"hopper-{hashlib.sha256(repr((*about, driver)).encode()).hexdigest()[:24]}"
    return Record(caches / "pyunlearn" / name)


def _locked(number: int, fcntl: object) -> bool:
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)  # type: ignore[attr-defined]
        return True
    except BlockingIOError:
        return False
