"""Checkpoint of a sharded model: each process writes its part to a file of its own, and any number reads them.

The files are in a folder next to the checkpoint, which names it and their SHA-256. So the checkpoint is replaced at
once, when its file is; and no pickle is read, as torch.distributed.checkpoint would for its metadata.
"""

from __future__ import annotations

import os
import shutil
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyunlearn.errors import DataError, OutputError, first_line
from pyunlearn.models.sharding import part_like
from pyunlearn.output import make_private_folder
from pyunlearn.unlearning.hashing import Hashing, sha256

KINDS = ("weights", "rests", "moments")
"""Tensors by the names of parameters in a checkpoint."""


def write_parts(checkpoint: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Write this process's part; all processes call it. Nothing that an earlier checkpoint needs is replaced.

    Returns:
        The name of the folder and the SHA-256 of each file, in the order of the parts.

    Raises:
        OutputError: in all processes, where one could not write.
    """
    rank = torch.distributed.get_rank()
    names = [str(next(n for n in count() if not (_folder(checkpoint) / str(n)).exists())) if rank == 0 else ""]
    torch.distributed.broadcast_object_list(names, src=0)
    folder = _folder(checkpoint) / names[0]
    digest, fault = "", ""
    try:
        make_private_folder(folder, owned=2)
        with (folder / f"{rank}.pt").open("xb") as file:
            os.chmod(file.name, 0o600)
            hashing: Any = Hashing(file)
            torch.save({kind: state[kind] for kind in KINDS}, hashing)
            file.flush()
            os.fsync(file.fileno())
        digest = hashing.digest.hexdigest()
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        fault = first_line(error)
    written = _from_all((digest, fault))
    faults = [fault for _, fault in written if fault]
    if faults:
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise OutputError(faults[0])
    return {"folder": folder.name, "sha256": [digest for digest, _ in written]}


def read_parts(checkpoint: Path, shards: dict[str, Any], parameters: dict[str, nn.Parameter]) -> dict[str, Any]:
    """Return what this process holds of the weights, their rests and the moments; all processes call it.

    Raises DataError where a file is missing or damaged.
    """
    folder = _folder(checkpoint) / Path(shards["folder"]).name
    paths = [folder / f"{rank}.pt" for rank in range(len(shards["sha256"]))]
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, size = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if together else (0, 1)
    own = list(zip(paths, shards["sha256"], strict=True))[rank::size]
    missing = [path.name for path in paths if not path.exists()]
    bad = [path.name for path, digest in own if path.exists() and sha256(path, path.stat().st_size) != digest]
    missing, bad = (list(chain(*_from_all(each))) if together else each for each in (missing, bad))
    if missing:
        raise DataError(
            f"a part of the checkpoint {checkpoint} is missing ({folder / missing[0]}): copy the folder to where all "
            "processes can read it, or delete the checkpoint and start again without resume"
        )
    if bad:
        raise DataError(
            f"the checkpoint {checkpoint} is damaged (the SHA-256 of {folder / bad[0]} is another): delete "
            "it and start again without resume"
        )
    parts = [torch.load(path, map_location="cpu", weights_only=True, mmap=True) for path in paths]
    return {
        kind: {name: _joined([each[kind][name] for each in parts], parameters[name]) for name in parts[0][kind]}
        for kind in KINDS
    }


def remove_parts(checkpoint: Path, *, but: str | None = None) -> None:
    """Remove the parts of earlier checkpoints, or all of them; `but` is the folder that the present one names."""
    folder = _folder(checkpoint)
    if but is None:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for each in folder.iterdir():
        if each.name != but:
            shutil.rmtree(each, ignore_errors=True)


def _folder(checkpoint: Path) -> Path:
    return checkpoint.with_suffix(".shards")


def _from_all(value: Any) -> list[Any]:
    """Return the value of every process, in every process."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _joined(parts: list[Any], parameter: nn.Parameter) -> Any:
    """Return this process's rows of a tensor that was saved in parts, or of those in dicts; numbers as they are."""
    if isinstance(parts[0], dict):
        return {name: _joined([each[name] for each in parts], parameter) for name in parts[0]}
    if not isinstance(parts[0], Tensor):
        return parts[0]
    rows = part_like(torch.arange(sum(map(len, parts))), parameter)
    start, stop, at, own = (int(rows[0]), int(rows[-1]) + 1, 0, []) if len(rows) else (0, 0, 0, [])
    for each in parts:
        own.append(each[max(start - at, 0) : max(stop - at, 0)])
        at += len(each)
    return torch.cat(own)
