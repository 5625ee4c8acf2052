"""Commands in forked processes that are faulted: by a signal, or by a disk on which nothing more can be written.

The parent imports everything once and computes nothing, so that a forked child starts at once. A fault comes at a
moment of the clock, or at one of the child's file operations (opened for writing, renamed, removed, made), so that the
short moments between two of these are tried as often as the long ones of computing.
"""

from __future__ import annotations

import mmap
import os
import resource
import select
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

_TIME_LIMIT = 600.0  # seconds after which a child counts as hanging
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")


class Fault(NamedTuple):
    """A fault: signals one after the other, or without any a full disk."""

    name: str
    signals: tuple[signal.Signals, ...] = ()


FAULTS = (
    Fault("kill -9", (signal.SIGKILL,)),
    Fault("SIGTERM", (signal.SIGTERM,)),
    Fault("SIGINT", (signal.SIGINT,)),
    Fault("SIGINT twice", (signal.SIGINT, signal.SIGINT)),
    Fault("disk full"),
)


class Moment(NamedTuple):
    """When a fault comes: at one of these, the others None."""

    seconds: float | None = None  # after the start; signals alone
    operation: int | None = None  # number of a file operation, from 1
    bytes: int | None = None  # size that no file can exceed; full disk alone
    gap: float = 0.0  # seconds between two signals


class Outcome(NamedTuple):
    """How a process ended."""

    code: int  # exit code, or minus the number of the signal that ended it
    text: str  # both outputs
    seconds: float
    operations: int  # on files


def run_forked(
    work: Callable[[], Any], folder: Path, fault: Fault | None = None, moment: Moment | None = None
) -> Outcome:
    """Call a function in a forked child, in that folder; send it a fault at that moment, and wait for its end."""
    counter = mmap.mmap(-1, 9)  # operations on files; whether the child is ready
    read, write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    began = time.monotonic()
    child = os.fork()
    if not child:
        os.close(read)
        _child(work, folder, write, counter, fault, moment)
    os.close(write)
    pending = list(fault.signals) if fault and moment and moment.seconds is not None else []  # once it is ready
    due, text, hangs = (moment.seconds or 0.0) if moment else 0.0, bytearray(), False
    while True:
        if pending and not counter[8]:
            began = time.monotonic()
        now = time.monotonic() - began
        if pending and now >= due:
            os.kill(child, pending.pop(0))
            due = now + (moment.gap if moment else 0.0)
            continue
        if now > _TIME_LIMIT:
            os.kill(child, signal.SIGKILL)
            hangs = True
        ready, _, _ = select.select([read], [], [], min(due - now, 0.005) if pending else 1.0)
        if ready:
            part = os.read(read, 1 << 16)
            if not part:
                break
            text += part
    os.close(read)
    _, status = os.waitpid(child, 0)
    if hangs:
        text += b"\nTraceback: it hangs"
    number = struct.unpack("q", counter[:8])[0]
    return Outcome(os.waitstatus_to_exitcode(status), text.decode(errors="replace"), time.monotonic() - began, number)


def _child(
    work: Callable[[], Any],
    folder: Path,
    output: int,
    counter: mmap.mmap,
    fault: Fault | None,
    moment: Moment | None,
) -> None:
    """Run the function with standard output and error in the pipe, and end the process with its exit code."""
    code, running = 70, True

    def interrupt(*_: Any) -> None:
        if running:
            raise KeyboardInterrupt

    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", errors="replace")  # noqa: SIM115
        os.chdir(folder)
        _watch_files(folder, counter, fault, moment)
        if fault and not fault.signals and moment and moment.bytes is not None:
            _no_file_above(moment.bytes)
        signal.signal(signal.SIGINT, interrupt)
        counter[8] = 1
        work()
        code = 0
    except KeyboardInterrupt:  # after the command's own end
        code = 130
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    running = False  # a signal after the command's end changes nothing
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _watch_files(folder: Path, counter: mmap.mmap, fault: Fault | None, moment: Moment | None) -> None:
    """Count the file operations within a folder, and fault the process at the one that the moment names."""
    at = moment.operation if moment else None
    signals = list(fault.signals) if fault else []
    inside = str(folder)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & _WRITES:
                return
        elif event in _CHANGES:
            path = arguments[0]
        else:
            return
        if not isinstance(path, (str, os.PathLike)) or not os.path.abspath(path).startswith(inside):
            return
        number = struct.unpack("q", counter[:8])[0] + 1
        counter[:8] = struct.pack("q", number)
        if at is None or fault is None or number < at:
            return
        if signals:
            os.kill(os.getpid(), signals.pop(0))
        elif not fault.signals:
            _no_file_above(0)

    sys.addaudithook(watch)


def _no_file_above(size: int) -> None:
    """Let every write beyond that size of a file fail from now on, also those of libraries that are no Python."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
