"""Deferred signals: Ctrl-C, SIGTERM and SIGHUP take effect at step boundaries."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class DeferredInterrupt:
    """Context in which the first signal waits for the next `check`, between two steps; a second one raises at once.

    `received` is its number, None before. Within `shielded` every signal waits, and always if `patient`: where several
    processes can only stop together.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self.received: int | None = None
        self._shields = int(patient)

    @property
    def pending(self) -> bool:
        """True after a signal."""
        return self.received is not None

    def __enter__(self) -> DeferredInterrupt:
        # Python allows signal handlers in the main thread only
        listens = threading.current_thread() is threading.main_thread()
        self._before = {number: signal.signal(number, self._note) for number in (_SIGNALS if listens else ())}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before if before is not None else signal.SIG_DFL)

    def check(self, any_process: Callable[[bool], bool] = bool) -> None:
        """Raise KeyboardInterrupt if there was a signal, to this process or, by `any_process`, to another one."""
        if any_process(self.pending):
            raise KeyboardInterrupt

    @contextmanager
    def shielded(self) -> Iterator[None]:
        """Let every signal wait until the end of the block, in which a file is written."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1

    def redeliver(self, any_process: Callable[[bool], bool] = bool) -> None:
        """Send the signal again, after the context, unless it was Ctrl-C: its sender wants the process to end.

        Where another process had one, by `any_process`, this one ends too.
        """
        ends = self.received not in (None, signal.SIGINT)
        if any_process(ends):
            signal.raise_signal(self.received if ends and self.received else signal.SIGTERM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._shields:
            self.check()
        self.received = number if self.received is None else self.received
