"""Saving: files and folders written whole or not at all, and the names of model, settings and versions in them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pyunlearn.data.lazy import json_parts
from pyunlearn.errors import ArgumentError, DataError, OutputError, first_line

if TYPE_CHECKING:
    from pyunlearn.models.gguf_writing import GgufReport

_PARTIAL = ".partial-"


def new_private_file(path: Path) -> None:
    """Make an empty file that nobody else can read or has made before; what is at the path is removed."""
    path.unlink(missing_ok=True)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


def make_private_folder(path: Path, owned: int = 1) -> None:
    """Make a folder that nobody else can read, if it is missing, and so the `owned` - 1 above it."""
    for folder in reversed([path, *path.parents][:owned]):
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)


def model_name(model: Any) -> str | None:
    """Return the name of a model for a report, without its path on this machine, for reports are passed on."""
    from pyunlearn.models.language_model import LanguageModel  # here: files are written without torch too

    if model is None:
        return None
    inner = None if isinstance(model, (str, Path)) else LanguageModel.of(model, needs_tokenizer=False).inner
    where = str(model) if inner is None else str(getattr(inner, "name_or_path", "") or type(inner).__name__)
    return Path(where).name if Path(where).is_absolute() else where


def versions() -> dict[str, str]:
    """Return the versions of pyunlearn and torch, on which the numbers depend."""
    import torch

    from pyunlearn import __version__

    return {"pyunlearn": __version__, "torch": torch.__version__}


def save_folder(
    directory: str | Path,
    model: Any,
    tokenizer: Any,
    name: str,
    content: dict[str, Any],
    *,
    card: str | None = None,
    replace: bool = False,
) -> Path:
    """Write a model, its tokenizer and one JSON file into an empty or new directory; all of it or nothing.

    `card`: the model card, README.md. With `replace`, a directory that holds the JSON file is replaced. Of a sharded
    model all processes call it, and the main process writes.

    Raises OutputError when the directory holds something already or cannot be written.
    """
    from pyunlearn.models.sharding import whole_state_dict

    weights = whole_state_dict(model)
    if weights == {}:  # not the main process
        return Path(directory).resolve()
    target = check_output(directory, marker=name if replace else None)
    in_place = is_filled(target)
    try:
        with _workshop(target / target.name if in_place else target) as partial:
            partial.mkdir()
            model.save_pretrained(partial, **({} if weights is None else {"state_dict": weights}))
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            if card is not None:  # in place of what peft writes
                (partial / "README.md").write_text(card, encoding="utf-8")
            with (partial / name).open("w", encoding="utf-8") as file:
                file.writelines(json_parts(content))
            (partial / name).chmod(0o600)
            _synchronize(partial)
            if in_place:
                for part in sorted(partial.iterdir()):
                    part.replace(target / part.name)
            else:
                if target.exists():
                    remove_partial(target)
                    shutil.rmtree(target) if replace else target.rmdir()
                partial.replace(target)
    except Exception as error:  # safetensors has its own for a full disk
        raise OutputError(f"the result could not be written to {target}: {first_line(error)}") from error
    return target


def save_gguf(
    path: str | Path,
    model: Any,
    tokenizer: Any = None,
    *,
    like: str | Path | None = None,
    at_least: str | None = None,
    label: str = "unlearned",
    progress: bool | None = False,
) -> GgufReport:
    """Write a model as a GGUF file with the metadata, the tokenizer and the tensor formats of another.

    No tokenizer is converted. The file is read back before it gets its name: metadata and shapes are equal, and each
    tensor is the weights within its format's rounding. Formats that the package gguf cannot write (K-quants) become the
    next larger. The architectures are llama (Llama, Mistral), qwen2 and qwen3.

    Args:
        path: of the new file, which ends in .gguf.
        model: a transformers model without an adapter, or where to load it from.
        tokenizer: the model's, whose tokens are compared with the file's; None: that which is loaded with the model.
        like: a GGUF file of the model as it was before, which is served today; None: the file that it was loaded from.
        at_least: one of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, F16, BF16, F32, for tensors that have a smaller format in `like`:
            rounding to 4 bits can undo a run.
        label: ending of the model's name in the metadata.
        progress: a progress bar on standard error; None: where that is a terminal.

    Returns:
        GgufReport: the formats, the rounding, and `.sentences()` for a report.

    Raises:
        ModelError: `like` is of another model or of another architecture, or the weights do not fit its formats.
        ArgumentError: the model has an adapter, `like` is missing, or `at_least` is no such format.
        OutputError: there is a file already, or it cannot be written.
        DependencyError: without the package gguf.
    """
    from pyunlearn.models.gguf_formats import require_format
    from pyunlearn.models.gguf_writing import write_gguf
    from pyunlearn.models.language_model import LanguageModel
    from pyunlearn.progress import Progress

    require_format(at_least)
    target = check_gguf(path)
    if isinstance(model, (str, Path)):
        lm = LanguageModel.of(model, tokenizer)
        model, tokenizer = lm.module, lm.tokenizer
    own = str(getattr(LanguageModel.described(model, None).inner, "name_or_path", ""))
    source = like or (own if own.endswith(".gguf") else None)
    if source is None:
        raise ArgumentError(
            "like must name a GGUF file of the model as it was before, whose tokenizer and formats the new file gets: "
            "the model was not loaded from one"
        )
    reports = []
    with Progress(progress, "writing GGUF") as bar:
        write_whole(
            target,
            lambda file: reports.append(
                write_gguf(file, model, tokenizer, source, at_least=at_least, label=label, bar=bar)
            ),
        )
    shutil.copymode(Path(source).expanduser(), target)
    return reports[0]


def check_gguf(path: str | Path) -> Path:
    """Return the path of a new GGUF file. Raises OutputError where something is there, or its name ends otherwise."""
    target = Path(path).expanduser().resolve()
    if target.suffix != ".gguf":
        raise OutputError(f"the name of a GGUF file must end in .gguf, got {path}")
    if target.exists():
        raise OutputError(f"the GGUF file {path} is there already: choose another name, or remove it first")
    return target


def check_output(directory: str | Path, *, marker: str | None = None) -> Path:
    """Return the directory as a path, if it is new, empty, or holds the file `marker`. Raises OutputError otherwise.

    What a killed process has left half-written in its place is removed.
    """
    target = Path(directory).resolve()
    remove_partial(target.parent, target.name)
    if target.exists() and not target.is_dir():
        raise OutputError(f"the output folder {directory} is a file: choose another name")
    resumable = marker is not None and (target / marker).exists()
    there = target.iterdir() if target.is_dir() else ()
    if not resumable and not all(map(is_partial, there)):
        raise OutputError(f"the output folder {directory} is not empty: choose another, or empty it first")
    return target


def is_filled(target: Path) -> bool:
    """Return whether an output folder is filled and not replaced: one that is a mount, or where a shell may be."""
    return target.is_mount() or (target.is_dir() and target.samefile("."))


def require_writable(target: Path) -> None:
    """Raise OutputError unless a file can be made where `target` would be, by making one; missing folders stay so."""
    target = place = target.resolve()
    try:
        place = next(path for path in (target, *target.parents) if path.exists())
        remove_partial(place, target.name)  # of a process that was stopped here
        tempfile.TemporaryDirectory(prefix=f".{target.name}{_PARTIAL}", dir=place).cleanup()
    except OSError as error:
        fault = f"nothing can be written to {place}, where the result would be: {error.strerror}"
        raise OutputError(f"{fault}; choose another folder") from error


def write_whole(target: Path, write: Callable[[Path], Any]) -> None:
    """Have `write` make a file or folder under a temporary name, then rename it to `target`: all of it or nothing.

    A file is readable for its owner alone.

    Raises OutputError when it cannot be written.
    """
    try:
        with _workshop(target) as partial:
            write(partial)
            if partial.is_file():
                partial.chmod(0o600)
            _synchronize(partial)
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(partial, target)
    except Exception as error:
        if not (isinstance(error, (OSError, RuntimeError)) or type(error).__name__ == "SafetensorError"):
            raise
        # a full disk is a RuntimeError in torch, and no subclass of either in safetensors
        raise OutputError(f"{target.name} could not be written to {target.parent}: {first_line(error)}") from error


@contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """Open a new file next to `target`, which only its owner can read; at the end of the block it gets that name.

    It is on the disk then. After an error it is removed, and `target` stays as it was.
    """
    with _workshop(target) as partial:
        with partial.open("xb") as file:
            partial.chmod(0o600)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
        _synchronize(target.parent, deep=False)


@contextmanager
def _workshop(target: Path) -> Iterator[Path]:
    """Yield a path that nobody else can have prepared, in a new folder next to `target` that is removed at the end."""
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_partial(target.parent, target.name)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}{_PARTIAL}", dir=target.parent))
    with locked(folder):
        try:
            yield folder / target.name
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_partial(parent: Path, name: str | None = None) -> None:
    """Remove what a killed process has left half-written in a folder, in place of `name` or of any file or folder."""
    try:
        there = [path for path in parent.iterdir() if is_partial(path, name)]
    except OSError:  # missing, or unreadable: a later error says so where it matters
        return
    for left in there:
        with locked(left) as free:
            if free and left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            elif free:
                left.unlink(missing_ok=True)


def is_partial(path: Path, name: str | None = None) -> bool:
    """Return whether a path is where a file or folder is written before it gets its name, `name` or any."""
    own, partial, _ = path.name.partition(_PARTIAL)
    return bool(partial) and own.startswith(".") and (name is None or own == f".{name}")


@contextmanager
def locked(path: Path) -> Iterator[bool | None]:
    """Lock a file or folder within the block, or until this process ends, however it ends.

    Yields False where another process holds it, None where the system or the disk has no locks.
    """
    try:
        import fcntl
    except ImportError:
        yield None
        return
    mine: bool | None = False
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe that somebody planted there blocks nothing
    except OSError:  # it is gone: the other process has just ended
        yield mine
        return
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(number), os.stat(path))  # not one that was removed meanwhile
        except (BlockingIOError, FileNotFoundError):
            mine = False
        except OSError:
            mine = None
        yield mine
    finally:
        os.close(number)


def _synchronize(path: Path, *, deep: bool = True) -> None:
    """Write a file, or a folder and the files in it, from the system's memory to the disk."""
    for each in [*(path.rglob("*") if deep and path.is_dir() else ()), path]:
        if not each.is_symlink():
            number = os.open(each, os.O_RDONLY)
            try:
                os.fsync(number)
            finally:
                os.close(number)


def write_json(target: Path, content: Any) -> None:
    """Write a JSON file that nobody else can read, all of it or nothing. Raises OutputError where that fails."""
    write_bytes(target, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def write_bytes(target: Path, content: bytes) -> None:
    """Write a file that nobody else can read, all of it or nothing. Raises OutputError where that fails."""
    write_whole(target, lambda path: path.write_bytes(content))


def packed_arrays(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Return named arrays as a safetensors file, which can hold no code, with their SHA-256 in its header."""
    from safetensors.numpy import save

    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    return bytes(save(contiguous, metadata={"sha256": _arrays_digest(contiguous)}))


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return the named arrays in a file of `packed_arrays`. Raises DataError where it is damaged or another file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
            digest = (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no file of arrays, or damaged: {first_line(error)}") from error
    if digest != _arrays_digest(arrays):
        raise DataError(f"{path} is damaged: its SHA-256 is another")
    return arrays


def _arrays_digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()


def plain_json(value: Any) -> Any:
    """Return dataclasses and named tuples as dicts, tuples as lists, and infinity and NaN, unknown to JSON, as None."""
    if is_dataclass(value):
        return {f.name: plain_json(getattr(value, f.name)) for f in fields(value)}
    named = value._asdict() if hasattr(value, "_asdict") else value
    if isinstance(named, dict):
        return {name: plain_json(part) for name, part in named.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
