"""Silence the log lines and progress bars of the libraries below the command line, and show pyunlearn's own."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

from pyunlearn.errors import printable
from pyunlearn.progress import logger

if TYPE_CHECKING:
    from rich.console import Console


def quiet_libraries() -> None:
    """The chatter of the libraries below would bury the table."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.root.addHandler(_NOWHERE)  # with a handler there, a library's logging.basicConfig() changes nothing
    warnings.filterwarnings("ignore", category=FutureWarning)
    # notes on the texts are printed with the result; they are issued where a command calls the package
    warnings.filterwarnings("ignore", category=UserWarning, module=r"pyunlearn\.cli\.")
    from pyunlearn.models.loading import quiet_transformers

    quiet_transformers()


class _OnStandardError(logging.Handler):
    """Prints lines on standard error as it is at the time, above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        print(printable(record.getMessage()), file=sys.stderr)


_HANDLER = _OnStandardError()
_NOWHERE = logging.NullHandler()


def show_lines(*, quiet: bool) -> None:
    """Show pyunlearn's own lines on standard error, unless quiet."""
    logger.addHandler(_HANDLER)
    logger.propagate = False  # a handler of the root logger would print each line once more
    logger.setLevel(logging.WARNING if quiet else logging.INFO)


def terminal(*, stderr: bool = False) -> Console:
    """Return a console on which control characters in a line are shown, not obeyed; a table's cells see to theirs."""
    from rich.console import Console

    class Terminal(Console):
        def print(self, *objects: Any, **options: Any) -> None:
            lines = ["\n".join(map(printable, each.split("\n"))) if isinstance(each, str) else each for each in objects]
            super().print(*lines, **options)

    return Terminal(stderr=stderr)
