"""Ctrl-C as a wish that the loop asks for between its steps, so that it never falls into the middle of one."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Interruptible:
    """While it lasts, the first Ctrl-C is noted, for `check` to raise where the state is whole; the second raises at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interruptible:
        self._mine = threading.current_thread() is threading.main_thread()  # Python lets no other thread listen
        if self._mine:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._mine:
            signal.signal(signal.SIGINT, self._before if self._before is not None else signal.SIG_DFL)

    def check(self) -> None:
        """Raises KeyboardInterrupt if there was a Ctrl-C."""
        if self.asked:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.check()
        self.asked = True
