"""The progress bar of a run, on standard error, so that results on standard output stay clean."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

logger = logging.getLogger("pyunlearn")
"""Lines about a run, at level INFO; the command line shows them on standard error."""


@contextmanager
def without_lines() -> Iterator[None]:
    """Drop the lines at level INFO of what runs within, one of many runs."""
    logger.addFilter(_is_warning)
    try:
        yield
    finally:
        logger.removeFilter(_is_warning)


def _is_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


class Progress:
    """One line on standard error: the stage, and how much of it is done.

    Args:
        wanted: True or False; None: only where standard error is a terminal.
        doing: the description in front of the bar.
    """

    def __init__(self, wanted: bool | None, doing: str = "unlearning") -> None:
        self.shown = sys.stderr.isatty() if wanted is None else wanted
        if not self.shown:
            return
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[say]}"),
            TimeElapsedColumn(),
        )
        self.bar = Bar(*columns, console=Console(stderr=True))
        self.bar.start()
        self.task = self.bar.add_task(doing, total=None, say="")

    def say(self, what: str) -> None:
        """Name the present stage, whose length is unknown."""
        if self.shown:
            self.bar.update(self.task, say=what)

    def begin(self, what: str, total: int) -> None:
        """Name the present stage, which has `total` texts."""
        if self.shown:
            self.bar.reset(self.task, total=total, say=what)

    def advance(self, texts: int) -> None:
        """Count `texts` more as done."""
        if self.shown:
            self.bar.advance(self.task, texts)

    def update(
        self,
        step: int,
        max_steps: int,
        memorized: int,
        left: int,
        costs: Sequence[tuple[str, float, float]],
        exponent: int,
        share: float,
        remaining: str,
    ) -> None:
        """Show the state of an unlearning run after a round.

        Args:
            step: optimizer steps so far.
            max_steps: the largest number of them.
            memorized: examples that were memorized at the start.
            left: those of them that are not settled.
            costs: of each budget the name of its texts, the upper end of the relative rise of their negative
                log-likelihood, and the rise that is allowed.
            exponent: the learning rate is 2^exponent times its start.
            share: how far the examples have come, 0 to 1.
            remaining: the time that is left.
        """
        if self.shown:
            factor = f"{2**exponent} times" if exponent > 0 else f"1/{2**-exponent} of"
            rate = f" · learning rate {factor} its start" if exponent else ""
            spent = " · ".join(f"{name} at most {upper:+.1%} of {allowed:.0%}" for name, upper, allowed in costs)
            done = f"step {step} of at most {max_steps} · {memorized - left} of {memorized} settled"
            say = f"{done} · about {remaining} left · {spent} allowed{rate}"
            self.bar.update(self.task, total=1.0, completed=share, say=say)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the line."""
        if self.shown:
            self.bar.stop()
