"""The output folder of a run: claimed for one run at a time, writable and large enough, before the first step."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyunlearn.errors import ArgumentError, OutputError
from pyunlearn.output import check_output, locked, remove_partial, require_writable
from pyunlearn.unlearning.distributed import is_main_process

RESULT = "result.json"


class RunFolder:
    """Output folder of a run, and the checkpoint next to it; None: the run writes nothing.

    Args:
        output_dir: the folder, new or empty; of a finished run whose checkpoint is still there, its own.
        resume: True where the run continues from the checkpoint.

    Raises:
        ArgumentError: no checkpoint to resume from, or one that a new run would overwrite.
        OutputError: the folder is not empty.
    """

    def __init__(self, output_dir: str | Path | None, *, resume: bool) -> None:
        self.path: Path | None = None
        self.checkpoint: Path | None = None
        if output_dir is None:
            if resume:
                raise ArgumentError(
                    "resume continues from the checkpoint of an interrupted run, and no output_dir was given: give "
                    "that run's output_dir, or start again without it"
                )
            return
        path = Path(output_dir).resolve()
        self.checkpoint = path.parent / f"{path.name}.checkpoint.pt"
        self._lock = path.parent / f".{path.name}.lock"
        if self._lock.exists() and is_main_process():
            with locked(self._lock) as free:
                if free:  # its run was killed
                    self._lock.unlink(missing_ok=True)
        there = self.checkpoint.exists()
        if there and not resume:
            raise ArgumentError(
                f"{self.checkpoint} holds an interrupted run: continue it with resume=True (--resume), or delete it to "
                "start again"
            )
        # a run that was killed between saving and deleting its checkpoint writes the same once more
        self.path = check_output(output_dir, marker=RESULT if there and resume else None)
        if resume and not there:
            raise ArgumentError(
                f"resume continues from the checkpoint of an interrupted run, and {self.checkpoint} does not exist: "
                "give that run's output_dir, or start again without it"
            )

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the folder for this run alone, and remove what a killed run has left half-written.

        Raises OutputError where another run holds it, or where nothing can be written next to it.
        """
        if self.path is None or not is_main_process():
            yield
            return
        require_writable(self.path.with_name(f".{self.path.name}.probe"))
        try:
            self._lock.parent.mkdir(parents=True, exist_ok=True)
            self._lock.touch()
        except OSError as error:  # a lock that another user left
            raise OutputError(f"{self._lock} cannot be made: {error.strerror}; choose another folder") from error
        with locked(self._lock) as free:
            if free is False:
                raise OutputError(f"another run writes to {self.path}: wait for its end, or choose another folder")
            try:
                for name in (self.path.name, f"{self.path.name}.checkpoint.pt"):
                    remove_partial(self.path.parent, name)
                yield
            finally:
                self._lock.unlink(missing_ok=True)

    def require_room(self, model: Any, *, merge: bool = False) -> None:
        """Raise OutputError unless there is room for the result and a checkpoint.

        `merge`: an adapter is merged, so that the result is the whole model.
        """
        if self.path is None or not is_main_process():
            return
        parent = self.path.parent
        adapted = hasattr(model, "peft_config") and not merge  # only the adapter is saved
        tensors = [p for p in model.parameters() if p.requires_grad or not adapted]
        # of each weight that is trained: itself, its rest, the second moment, see `Adam`
        stored = sum(p.numel() * max(10, 2 * p.element_size()) for p in model.parameters() if p.requires_grad)
        needed = sum(t.numel() * t.element_size() for t in tensors) + stored
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise OutputError(
                f"the result and a checkpoint need {needed / 2**20:,.0f} MiB, and {parent} has {free / 2**20:,.0f} MiB "
                "free: make room, or choose a folder on another disk"
            )
