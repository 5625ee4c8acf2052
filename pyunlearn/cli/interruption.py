"""Ctrl-C on the command line: one sentence and exit code 130, also where Ctrl-C comes twice."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

_ANYWHERE = "run the same command again; it starts again, resumes, or says how to resume"
_TOGETHER = 0.05  # seconds within which two Ctrl-C are one
_SOON = 2 * _TOGETHER
_EXPLAINED = ContextVar("_EXPLAINED", default=False)


def explain(what_next: str = _ANYWHERE) -> None:
    """Print, once, that the command was interrupted and what to do; further Ctrl-C are ignored from here on."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not _EXPLAINED.get():
        _EXPLAINED.set(True)
        print(f"interrupted; {what_next}", file=sys.stderr)


def interrupted(what_next: str) -> typer.Exit:
    """Return the exception that ends an interrupted command, after one sentence."""
    explain(what_next)
    return typer.Exit(130)


def _sent_again(lost: UnraisableHookArgs) -> None:
    """Send Ctrl-C again where it came while an object was deleted: Python prints a traceback then and continues."""
    if not isinstance(lost.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    threading.Timer(_SOON, os.kill, (os.getpid(), signal.SIGINT)).start()  # not within this function


def _once(handler: Callable[[int, FrameType | None], object]) -> Callable[[int, FrameType | None], None]:
    """Return a handler of Ctrl-C that passes over one soon after another, as a terminal and a launcher both send it."""
    last = -_TOGETHER

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before >= _TOGETHER:
            handler(number, frame)

    return handle


@contextmanager
def explained() -> Iterator[None]:
    """Print a sentence where the block is interrupted and has printed none; then the process is to end.

    After an interruption Ctrl-C stays ignored; otherwise it works as before the block.
    """
    listens = threading.current_thread() is threading.main_thread()
    before, token, hook = signal.getsignal(signal.SIGINT), _EXPLAINED.set(False), sys.unraisablehook
    try:
        sys.unraisablehook = _sent_again
        if listens and callable(before):
            signal.signal(signal.SIGINT, _once(before))
        yield
    except SystemExit as end:
        if end.code == 130:
            explain()
        raise
    except KeyboardInterrupt:
        explain()
        sys.exit(130)
    finally:
        sys.unraisablehook = hook
        if listens and not _EXPLAINED.get():
            signal.signal(signal.SIGINT, before)
        _EXPLAINED.reset(token)
