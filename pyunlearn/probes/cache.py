"""Cache of model outputs on disk, which can give the texts back, so that an interrupted audit resumes.

A folder for each model, named by a hash of its weights and configuration; in it a folder for each kind of output; in
that, shards: files of many records, each under a hash of its tokenized text. A shard is written under a temporary name
and renamed, so no partial shard is ever read. No text is stored, but the token ids of continuations are, and with the
model the log-likelihood or the rank of a token leads to the token. So nobody else can read the folder, and a README.txt
in it says what it is.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Hashable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyunlearn.data import Tokens
from pyunlearn.errors import DataError, ModelError, OutputError
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.options import require_path
from pyunlearn.output import (
    make_private_folder,
    new_private_file,
    packed_arrays,
    read_arrays,
    remove_partial,
    replacing,
)

WARNING = (
    "This cache can give back the texts that were audited: treat it like the texts.\n\n"
    "It holds the token ids of continuations, and the rank and log-likelihood of each token, which lead to the token\n"
    "with the model. Delete it when it is not needed.\n"
)
"""Content of README.txt."""

Record = tuple[NDArray[Any], ...]
_EVERY = 10.0  # seconds of work that a crash may cost
_DIGITS = 24  # of the hash of a model's weights, the name of its folder


class RecordStore:
    """Records of one kind under one model: arrays of equal length for each text.

    Args:
        folder: where shards are read and written; None: in memory alone.
        names: one for each array of a record.
    """

    def __init__(self, folder: Path | None, names: Sequence[str]) -> None:
        self.folder, self.names = folder, tuple(names)
        self._records: dict[Hashable, Record] = {}
        self._unsaved: dict[Hashable, Record] = {}
        self._saved_at = time.monotonic()
        if folder is not None:
            remove_partial(folder)
        for path in sorted(folder.glob("*.safetensors")) if folder is not None and folder.is_dir() else []:
            self._records |= _read(path, self.names)

    def key(self, tokens: Tokens, *more: object) -> Hashable:
        """Return the key of a text's record; `more` is everything else that the record depends on."""
        return (tokens, *more) if self.folder is None else _digest(tokens, more)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._records

    def __getitem__(self, key: Hashable) -> Record:
        return self._records[key]

    def add(self, key: Hashable, record: Record) -> None:
        """Store a record; new ones are written to disk every ten seconds."""
        self._records[key] = record
        if self.folder is not None:
            self._unsaved[key] = record
            if time.monotonic() - self._saved_at > _EVERY:
                self.flush()

    def flush(self) -> None:
        """Write the new records as a shard. Raises OutputError where that is impossible."""
        if self.folder is None or not self._unsaved:
            return
        keys, records = list(self._unsaved), list(self._unsaved.values())
        digests = np.array([list(bytes.fromhex(str(key))) for key in keys], dtype=np.uint8)
        arrays = {"keys": digests, "counts": np.array([len(r[0]) for r in records])}
        arrays |= {name: np.concatenate([r[i] for r in records]) for i, name in enumerate(self.names)}
        name = f"{hashlib.sha256(''.join(map(str, keys)).encode()).hexdigest()[:24]}.safetensors"
        try:
            make_private_folder(self.folder)
            with replacing(self.folder / name) as file:
                file.write(packed_arrays(arrays))
        except OSError as error:
            raise OutputError(f"the cache could not be written to {self.folder}: {error}") from error
        self._unsaved, self._saved_at = {}, time.monotonic()


class Cache:
    """The record stores of one model.

    Args:
        folder: the cache's folder; None: in memory alone.
        model: a transformers language model or a LanguageModel; its weights are read once, for their hash.
    """

    def __init__(self, folder: str | Path | None, model: Any) -> None:
        self.folder = None if folder is None else Path(folder) / weights_digest(model)[:_DIGITS]
        self._stores: dict[str, RecordStore] = {}

    def store(self, kind: str, names: Sequence[str]) -> RecordStore:
        """Return the record store for `kind`; a record is one array per name."""
        if self.folder is not None and not self._stores:
            self._make()
        if kind not in self._stores:
            self._stores[kind] = RecordStore(None if self.folder is None else self.folder / kind, names)
        return self._stores[kind]

    def _make(self) -> None:
        """Make the folder, with a README.txt that says what it is. Raises OutputError where that is impossible."""
        assert self.folder is not None
        readme = self.folder.parent / "README.txt"
        try:
            make_private_folder(self.folder, owned=2)
            if not readme.exists():
                new_private_file(readme)
                readme.write_text(WARNING, encoding="utf-8")
        except OSError as error:
            raise OutputError(f"the cache could not be written to {self.folder}: {error}") from error


def require_cache(name: str, folder: Any) -> None:
    """Raise unless a value is None or a path where a folder is or can be made.

    Raises ArgumentError for a value of another type, OutputError where a file has that path.
    """
    require_path(name, folder)
    if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
        raise OutputError(f"{name} must be a folder, and {folder} is a file: choose another name")


def remove_cache(folder: Path) -> None:
    """Remove a cache, and its folder where nothing else is in it; what `Cache` did not make stays."""
    for model in folder.glob(f"{'[0-9a-f]' * _DIGITS}/"):
        shutil.rmtree(model, ignore_errors=True)
    readme = folder / "README.txt"
    with suppress(OSError):  # it is not there, cannot be removed, or holds more
        if readme.is_file() and readme.read_bytes() == WARNING.encode():
            readme.unlink()
        folder.rmdir()


def weights_digest(model: Any) -> str:
    """Return the SHA-256, in hex, of a model's configuration, weights and buffers; tied weights count once.

    Of adapters it contains, too, which are active, and the factors on them.

    Raises ModelError where weights are offloaded.
    """
    inner = LanguageModel.of(model, needs_tokenizer=False).inner
    digest, seen = hashlib.sha256(), set()
    digest.update(type(inner).__name__.encode())
    config = inner.config.to_dict()
    for irrelevant in ("_name_or_path", "transformers_version"):  # the same model at another path has the same hash
        config.pop(irrelevant, None)
    digest.update(repr(sorted((str(k), repr(v)) for k, v in config.items())).encode())
    for name, module in inner.named_modules():
        if isinstance(factors := getattr(module, "scaling", None), dict):  # a layer with LoRA adapters
            state = sorted(factors.items()), list(module.active_adapters), module.disable_adapters
            digest.update(f"{name} {state}".encode())
    for name, tensor in inner.state_dict(keep_vars=True).items():
        if not torch.is_tensor(tensor):
            continue
        at = (tensor.data_ptr(), tuple(tensor.shape))
        if at in seen and tensor.numel():
            continue
        seen.add(at)
        if tensor.is_meta:
            raise ModelError(f"the cache is named by the weights, and {name} is offloaded: leave out cache")
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def _digest(tokens: Tokens, more: tuple[object, ...]) -> str:
    digest = hashlib.sha256(np.array(tokens.ids, dtype=np.int64).tobytes())
    digest.update(np.array([-1, tokens.first, -2, *(tokens.decoder or ())], dtype=np.int64).tobytes())
    chosen = () if tokens.chosen is None else (tokens.chosen,)
    digest.update(repr((tokens.decoder is None, more, *chosen)).encode())
    return digest.hexdigest()


def _read(path: Path, names: tuple[str, ...]) -> dict[Hashable, Record]:
    """Return the records of a shard; none if it is damaged, since they can be computed again."""
    try:
        arrays = read_arrays(path)
        ends = np.cumsum(arrays["counts"])[:-1]
        parts = [np.split(arrays[name], ends) for name in names]
    except (DataError, KeyError):  # damaged, or of a kind with other names
        return {}
    return dict(zip([key.tobytes().hex() for key in arrays["keys"]], zip(*parts, strict=True), strict=True))
