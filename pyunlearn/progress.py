"""The progress bar of a run, on standard error, so that results on standard output stay clean."""

from __future__ import annotations

import sys


class Progress:
    """One line: how many examples are left, how much of the utility budget is spent. Silent unless wanted or on a terminal."""

    def __init__(self, wanted: bool | None, doing: str = "unlearning") -> None:
        self.shown = sys.stderr.isatty() if wanted is None else wanted
        if not self.shown:
            return
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        self.bar = Bar(
            TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.fields[say]}"), TimeElapsedColumn(),
            console=Console(stderr=True),
        )  # fmt: skip
        self.bar.start()
        self.task = self.bar.add_task(doing, total=None, say="")

    def say(self, what: str) -> None:
        """Names the present stage, before the steps begin."""
        if self.shown:
            self.bar.update(self.task, say=what)

    def begin(self, what: str, total: int) -> None:
        """Names the present stage, which goes through so many texts."""
        if self.shown:
            self.bar.reset(self.task, total=total, say=what)

    def advance(self, texts: int) -> None:
        """So many texts more are done."""
        if self.shown:
            self.bar.advance(self.task, texts)

    def update(self, step: int, memorized: int, left: int, utility: float, budget: float, halvings: int) -> None:
        """Shows the state after a round."""
        if self.shown:
            slower = f" · learning rate halved {halvings}x" if halvings else ""
            say = f"step {step} · {left} of {memorized} still exposed · utility {utility:+.1%} of {budget:.0%} allowed{slower}"
            self.bar.update(self.task, total=memorized, completed=memorized - left, say=say)

    def close(self) -> None:
        """Ends the line."""
        if self.shown:
            self.bar.stop()
