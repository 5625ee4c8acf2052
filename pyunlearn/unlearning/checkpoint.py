"""Checkpoints: the state of a run in a file next to its output folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyunlearn.errors import DataError, first_line
from pyunlearn.methods import Multiplier
from pyunlearn.output import replacing
from pyunlearn.progress import logger
from pyunlearn.unlearning.hashing import Hashing, sha256
from pyunlearn.unlearning.optimizer import TrainedWeights
from pyunlearn.unlearning.shards import read_parts, remove_parts, write_parts
from pyunlearn.unlearning.step_size import StepSize

_VERSION = b" 3 sha256 "
_SEAL = b"\npyunlearn checkpoint" + _VERSION
"""Precedes the SHA-256 of all before it, at the end of a checkpoint."""


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
    """File in which an interrupted run is stored, OUTPUT.checkpoint.pt, with a format version and a SHA-256.

    The weights of a sharded model are in files of their own, see `shards`; then all processes save and load. A run
    resumes in any number of processes, sharded or not.

    Only its owner can read it, for the weights and the sampled texts can give the forget set back.

    Args:
        path: the file; None where the run has no output folder and stores nothing.
        fingerprint: settings and scores in which a run that resumes from it must agree.
        sampled: name -> texts that were sampled before the first step; sampling is not reproducible on every device.
    """

    def __init__(self, path: Path | None, fingerprint: dict[str, Any], sampled: dict[str, Any]) -> None:
        self.path, self.fingerprint, self.sampled = path, fingerprint, sampled

    @property
    def exists(self) -> bool:
        """True where there is a state to resume from."""
        return self.path is not None and self.path.exists()

    def save(self, weights: TrainedWeights, state: LoopState) -> bool:
        """Write the state under a temporary name, then rename the file.

        Returns:
            False where it could not be written: a warning says why, and the last checkpoint stays.
        """
        if self.path is None:
            return True
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
        stored = weights.state_dict()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if weights.sharded:
                shapes = {name: tuple(p.shape) for name, p in weights.parameters.items()}
                stored = {"shards": write_parts(self.path, stored), "shapes": shapes, "mask": {}}
                if torch.distributed.get_rank():
                    return True
            with replacing(self.path) as file:
                hashing: Any = Hashing(file)
                torch.save(stored | {"progress": progress}, hashing)
                file.write(_SEAL + hashing.digest.hexdigest().encode())
            remove_parts(self.path, but=stored["shards"]["folder"] if weights.sharded else None)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            logger.warning(f"the checkpoint {self.path} could not be written ({first_line(error)})")
            return False
        return True

    def load(self, weights: TrainedWeights, state: LoopState) -> None:
        """Restore weights and state in place from the file.

        Raises DataError where it is damaged or was made with another model, other texts or settings; nothing has been
        changed then.
        """
        assert self.path is not None
        saved = _read(self.path)
        shapes = saved.get("shapes") or {name: tuple(w.shape) for name, w in saved["weights"].items()}
        if shapes != {name: tuple(p.shape) for name, p in weights.parameters.items()}:
            raise DataError(
                f"the checkpoint {self.path} belongs to another model: delete it, or give the model it was made with"
            )
        progress = saved["progress"]
        require_same(self.path, progress["fingerprint"], self.fingerprint)
        if "shards" in saved:
            saved |= read_parts(self.path, saved["shards"], weights.parameters)
        weights.load_state_dict(saved)
        state.step, state.round_number = progress["step"], progress["round"]
        state.step_size = StepSize(*progress["step_size"])
        state.scores = {name: np.array(values) for name, values in progress["scores"].items()}
        state.history = json.loads(progress["history"])
        multiplier = progress["multiplier"]
        state.restore((np.array(progress["visits"]), multiplier and Multiplier(**multiplier)))

    def delete(self) -> None:
        """Remove the file and the parts, if there are any."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
            remove_parts(self.path)


def _read(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds. Raises DataError where it is no checkpoint of this version, or damaged."""
    again = "delete it and start again without resume"
    size = path.stat().st_size - len(_SEAL) - 64
    with path.open("rb") as file:
        file.seek(max(0, size))
        seal = file.read()
        if size <= 0 or not seal.startswith(_SEAL[: -len(_VERSION)]):
            raise DataError(f"{path} is no whole checkpoint of pyunlearn, or one of an older version: {again}")
        if not seal.startswith(_SEAL):
            raise DataError(f"the checkpoint {path} is of another version of pyunlearn: resume with that, or {again}")
    if sha256(path, size).encode() != seal[len(_SEAL) :]:
        raise DataError(f"the checkpoint {path} is damaged (its SHA-256 is another): {again}")
    saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return saved


def sampled_texts(path: Path | None) -> dict[str, Any]:
    """Return name -> texts that a checkpoint's run had sampled. Raises DataError as `Checkpoint.load`."""
    if path is None or not path.exists():
        return {}
    return dict(_read(path)["progress"].get("sampled") or {})


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
