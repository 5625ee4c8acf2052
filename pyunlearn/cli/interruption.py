"""Ctrl-C on the command line: one sentence and exit code 130, also where Ctrl-C comes twice."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import typer

_ANYWHERE = "run the same command again; it starts again, resumes, or says how to resume"
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


@contextmanager
def explained() -> Iterator[None]:
    """Print a sentence where the block is interrupted and has printed none; then Ctrl-C works as before the block."""
    listens = threading.current_thread() is threading.main_thread()
    before, token = signal.getsignal(signal.SIGINT), _EXPLAINED.set(False)
    try:
        yield
    except SystemExit as end:
        if end.code == 130:
            explain()
        raise
    except KeyboardInterrupt:
        explain()
        sys.exit(130)
    finally:
        _EXPLAINED.reset(token)
        if listens:
            signal.signal(signal.SIGINT, before)
