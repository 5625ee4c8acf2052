"""Checkpoints: the state of a run in a file next to its output folder."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyunlearn.errors import ArgumentError, DataError
from pyunlearn.methods import Multiplier
from pyunlearn.unlearning.optimizer import TrainedWeights
from pyunlearn.unlearning.step_size import StepSize


@dataclass
class LoopState:
    """State of the loop except the weights. A rollback restores the visits and the multiplier of `snapshot`."""

    visits: NDArray[np.int64]
    """(B,) accepted optimizer steps that took each example."""
    multiplier: Multiplier | None = None
    """PDU's dual variable."""
    step: int = 0
    round_number: int = 0
    step_size: StepSize = field(default_factory=StepSize)
    """The learning rate, relative to its start."""
    scores: dict[str, NDArray[Any]] = field(default_factory=dict)
    """The examples' numbers after the last accepted round, see `StoppingRule.scores`; empty before."""
    history: list[dict[str, Any]] = field(default_factory=list)

    def snapshot(self) -> tuple[NDArray[np.int64], Multiplier | None]:
        """Return copies of the visits and the multiplier."""
        return self.visits.copy(), None if self.multiplier is None else replace(self.multiplier)

    def restore(self, snapshot: tuple[NDArray[np.int64], Multiplier | None]) -> None:
        """Restore a `snapshot` in place, since other objects share the array and the multiplier."""
        self.visits[:] = snapshot[0]
        if self.multiplier is not None and snapshot[1] is not None:
            for name, value in asdict(snapshot[1]).items():
                setattr(self.multiplier, name, value)


class Checkpoint:
    """File in which an interrupted run is stored, OUTPUT.checkpoint.pt.

    Args:
        path: the file; None where the run has no output folder and stores nothing.
        fingerprint: settings and scores in which a run that resumes from it must agree.
        sampled: name -> texts that were sampled before the first step; sampling is not reproducible on every device.
    """

    def __init__(self, path: Path | None, fingerprint: dict[str, Any], sampled: dict[str, Any]) -> None:
        self.path, self.fingerprint, self.sampled = path, fingerprint, sampled

    def save(self, weights: TrainedWeights, state: LoopState) -> None:
        """Write the state under a temporary name, then rename the file."""
        if self.path is None:
            return
        partial = self.path.with_name(self.path.name + ".partial")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        progress = {
            "step": state.step,
            "round": state.round_number,
            "step_size": tuple(state.step_size),
            "scores": {name: values.tolist() for name, values in state.scores.items()},
            "fingerprint": self.fingerprint,
            "history": json.dumps(state.history),
            "visits": state.visits.tolist(),
            "multiplier": None if state.multiplier is None else asdict(state.multiplier),
            "sampled": self.sampled,
        }
        torch.save(weights.state_dict() | {"progress": progress}, partial)
        os.replace(partial, self.path)

    def load(self, weights: TrainedWeights, state: LoopState) -> None:
        """Restore weights and state in place from the file.

        Raises DataError where it was made with another model, other texts or settings; nothing has been changed then.
        """
        assert self.path is not None
        saved: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        shapes = {name: tuple(w.shape) for name, w in saved["weights"].items()}
        if shapes != {name: tuple(p.shape) for name, p in weights.parameters.items()}:
            raise DataError(
                f"the checkpoint {self.path} belongs to another model: delete it, or give the model it was made with"
            )
        progress = saved["progress"]
        require_same(self.path, progress["fingerprint"], self.fingerprint)
        weights.load_state_dict(saved)
        state.step, state.round_number = progress["step"], progress["round"]
        state.step_size = StepSize(*progress["step_size"])
        state.scores = {name: np.array(values) for name, values in progress["scores"].items()}
        state.history = json.loads(progress["history"])
        multiplier = progress["multiplier"]
        state.restore((np.array(progress["visits"]), multiplier and Multiplier(**multiplier)))

    def delete(self) -> None:
        """Remove the file, if there is one."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def checkpoint_path(output_dir: str | Path | None, *, resume: bool) -> Path | None:
    """Return the path of a run's checkpoint, next to its output folder, or None if the run has no output folder.

    Raises ArgumentError if the run is to resume and has no checkpoint, or if a new run would overwrite one.
    """
    if output_dir is None:
        if resume:
            raise ArgumentError(
                "resume continues from the checkpoint of an interrupted run, and no output_dir was given: give that "
                "run's output_dir, or start again without it"
            )
        return None
    folder = Path(output_dir).resolve()
    path = folder.with_name(folder.name + ".checkpoint.pt")
    if resume and not path.exists():
        raise ArgumentError(
            f"resume continues from the checkpoint of an interrupted run, and {path} does not exist: give that run's "
            "output_dir, or start again without it"
        )
    if path.exists() and not resume:
        raise ArgumentError(
            f"{path} holds an interrupted run: continue it with resume=True (--resume), or delete it to start again"
        )
    return path


def sampled_texts(path: Path | None) -> dict[str, Any]:
    """Return name -> texts that a checkpoint's run had sampled."""
    if path is None or not path.exists():
        return {}
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return dict(saved["progress"].get("sampled") or {})


def require_same(path: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise DataError unless a checkpoint was made with these texts, this model and these settings."""
    for name, value in now.items():
        if isinstance(value, list):
            same = len(saved[name]) == len(value) and np.allclose(saved[name], value, rtol=1e-4)
            other = f"another model or {name}"
        else:
            same, other = saved[name] == value, f"{name}={saved[name]!r}, not {value!r}"
        if not same:
            raise DataError(f"the checkpoint {path} was made with {other}: give the same, or delete it and start again")
