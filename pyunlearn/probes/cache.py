"""What a model has already answered, on disk, so that an interrupted audit goes on where it stood.

A folder for each model, named by a hash of its weights and configuration; in it a folder for each kind of question; in that, shards: files of
many records, each under a hash of its tokenised text. A shard is written beside and renamed, so there is none by halves. No text is kept, but a
continuation's token ids are: treat the folder as you treat the texts.
"""

from __future__ import annotations

import hashlib
import os
import time
import zipfile
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyunlearn.data import Tokens
from pyunlearn.errors import OutputError
from pyunlearn.models import unwrapped

Record = tuple[NDArray[Any], ...]
_EVERY = 10.0  # seconds of work that a crash may cost


class Shelf:
    """The records of one kind under one model: a few arrays of equal length for each text. Without a folder they live in memory alone."""

    def __init__(self, folder: Path | None, names: Sequence[str]) -> None:
        self.folder, self.names = folder, tuple(names)
        self._found: dict[Hashable, Record] = {}
        self._fresh: dict[Hashable, Record] = {}
        self._saved = time.monotonic()
        for path in sorted(folder.glob("*.npz")) if folder is not None and folder.is_dir() else []:
            self._found |= _read(path, self.names)

    def key(self, tokens: Tokens, *more: object) -> Hashable:
        """What a text's record is found under; `more` is whatever else the answer hangs on."""
        return (tokens, *more) if self.folder is None else _digest(tokens, more)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._found

    def __getitem__(self, key: Hashable) -> Record:
        return self._found[key]

    def add(self, key: Hashable, record: Record) -> None:
        """Keeps a record; every ten seconds, what is new goes to disk."""
        self._found[key] = record
        if self.folder is not None:
            self._fresh[key] = record
            if time.monotonic() - self._saved > _EVERY:
                self.flush()

    def flush(self) -> None:
        """Writes what is new as a shard. Raises OutputError where that cannot be."""
        if self.folder is None or not self._fresh:
            return
        keys, records = list(self._fresh), list(self._fresh.values())
        arrays = {"keys": np.array(keys), "counts": np.array([len(r[0]) for r in records])}
        arrays |= {name: np.concatenate([r[i] for r in records]) for i, name in enumerate(self.names)}
        name = f"{hashlib.sha256(''.join(map(str, keys)).encode()).hexdigest()[:24]}.npz"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            beside = self.folder / f".{name}.partial-{os.getpid()}"
            with beside.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            os.replace(beside, self.folder / name)
        except OSError as error:
            raise OutputError(f"the cache could not be written to {self.folder}: {error}") from error
        self._fresh, self._saved = {}, time.monotonic()


class Cache:
    """The shelves of one model under `folder`; None keeps everything in memory. The weights are read once, for their hash."""

    def __init__(self, folder: str | Path | None, model: Any) -> None:
        self.folder = None if folder is None else Path(folder) / weights_digest(model)[:24]
        self._shelves: dict[str, Shelf] = {}

    def shelf(self, kind: str, names: Sequence[str]) -> Shelf:
        """The records of one kind, of which each is arrays of these names."""
        if kind not in self._shelves:
            self._shelves[kind] = Shelf(None if self.folder is None else self.folder / kind, names)
        return self._shelves[kind]


def weights_digest(model: Any) -> str:
    """SHA-256, in hex, of a model's configuration and of every weight and buffer; weights that are one tensor count once."""
    found, seen = hashlib.sha256(), set()
    found.update(type(unwrapped(model)).__name__.encode())
    config = unwrapped(model).config.to_dict()
    for passing in ("_name_or_path", "transformers_version"):  # where the model lies says nothing of what it is
        config.pop(passing, None)
    found.update(repr(sorted((str(k), repr(v)) for k, v in config.items())).encode())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not torch.is_tensor(tensor):
            continue
        at = (tensor.data_ptr(), tuple(tensor.shape))
        if at in seen and tensor.numel():
            continue
        seen.add(at)
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return found.hexdigest()


def _digest(tokens: Tokens, more: tuple[object, ...]) -> str:
    found = hashlib.sha256(np.array(tokens.ids, dtype=np.int64).tobytes())
    found.update(np.array([-1, tokens.first, -2, *(tokens.decoder or ())], dtype=np.int64).tobytes())
    found.update(repr((tokens.decoder is None, more)).encode())
    return found.hexdigest()


def _read(path: Path, names: tuple[str, ...]) -> dict[Hashable, Record]:
    """A shard's records; none if it is damaged, for they can be had again."""
    try:
        with np.load(path, allow_pickle=False) as file:
            ends = np.cumsum(file["counts"])[:-1]
            parts = [np.split(file[name], ends) for name in names]
            return dict(zip(file["keys"].tolist(), zip(*parts, strict=True), strict=True))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}
