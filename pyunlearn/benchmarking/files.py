"""Read a benchmark's own files, check their columns, and name what was read by a hash."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pyunlearn.data.columns import string_of
from pyunlearn.data.files import expanded, file_rows
from pyunlearn.errors import DataError, brief
from pyunlearn.models.hub import download

SUFFIXES = (".jsonl", ".json", ".parquet")
_ON_THE_HUB = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*/[A-Za-z0-9_-][A-Za-z0-9_.-]*")


class Questions(NamedTuple):
    """The rows of one set, with the checked columns alone."""

    file: str
    """Name of the file."""
    rows: list[dict[str, Any]]

    @property
    def sha256(self) -> str:
        """Hash of the rows: two results with the same are of the same questions."""
        return hashlib.sha256(json.dumps(self.rows, sort_keys=True).encode()).hexdigest()

    def described(self) -> dict[str, Any]:
        """Return what a result says about the set."""
        return {"file": self.file, "questions": len(self.rows), "sha256": self.sha256}


class Folder(NamedTuple):
    """A folder with the files of a benchmark."""

    path: Path
    source: str | None
    """NAME@COMMIT of the data set on the hub that it was downloaded from; None for a folder that was given."""


def require_folder(data: Any, names: Sequence[str], inside: str = "") -> Folder:
    """Return the folder of a benchmark's files: the one that is given, or that of a data set on the hub.

    Args:
        data: path of a folder, or NAME or NAME@REVISION of a data set; a folder of that name comes first.
        names: of the benchmark's files, without suffix; of a data set no others are downloaded.
        inside: folder in the data set that has them.

    Raises DataError where there is neither.
    """
    if not isinstance(data, (str, Path)) or not str(data).strip():
        got = f"{data!r}" if isinstance(data, str) else f"a value of type {type(data).__name__}"
        raise DataError(f"data must be the path of a folder with the benchmark's files, got {got}")
    folder = expanded(data)
    if folder.is_dir():
        return Folder(folder, None)
    name, _, revision = str(data).partition("@")
    if isinstance(data, Path) or folder.exists() or not _ON_THE_HUB.fullmatch(name) or Path(name).parent.is_dir():
        problem = "is a file" if folder.is_file() else "was not found"
        raise DataError(
            f"the data folder {data} {problem}: give the folder that has the benchmark's files, or the name of a data "
            "set on the hub, such as locuslab/TOFU"
        )
    files = [(Path(inside) / file).as_posix() for each in names for file in candidates(each)]
    path, commit = download(name, revision or None, files)
    return Folder(path / inside, f"{name}@{commit}")


def candidates(name: str) -> list[str]:
    """Return the names that the file of a set can have, in a folder or in a data set on the hub.

    >>> candidates("wmdp-bio")[0], candidates("wmdp-bio")[-1]
    ('wmdp-bio-00000-of-00001.jsonl', 'wmdp-bio.parquet')
    """
    return [file for names in _names(name) for file in names]


def _names(name: str) -> tuple[list[str], list[str]]:
    """Return the names of a file as the hub's data sets number them, and plain."""
    numbered = [f"{name}{dash}00000-of-00001{suffix}" for dash in ("-", "/test-") for suffix in SUFFIXES]
    return numbered, [f"{name}{suffix}" for suffix in SUFFIXES]


def files_in(folder: Path, name: str) -> list[Path]:
    """Return the file of that name in a folder, with one of SUFFIXES, or as the hub's data sets name it, or nothing.

    The hub's own name comes first: MUSE-News had verbmem/forget.json before, and has it still.

    Raises DataError where there is more than one.
    """
    hub, plain = ([path for each in names if (path := folder / each).is_file()] for names in _names(name))
    there = hub or plain
    if len(there) > 1:
        names = " and ".join(path.relative_to(folder).as_posix() for path in there)
        raise DataError(f"the data folder {folder} has {names}: remove or rename all but one of them")
    return there


def file_in(folder: Path, name: str, wanted: Sequence[str]) -> Path:
    """Return the file of that name, see `files_in`.

    Raises DataError where there is none, or more than one; `wanted`: all files of the benchmark, for the message.
    """
    if there := files_in(folder, name):
        return there[0]
    raise DataError(
        f"the data folder {folder} has no {name} ({', '.join(SUFFIXES)}): wanted are the files {', '.join(wanted)}"
    )


def read_questions(
    path: Path, role: str, columns: Mapping[str, str], first: int | None, optional: Sequence[str] = ()
) -> Questions:
    """Read the first rows of a file.

    Args:
        path: the file.
        role: name of the set, for messages.
        columns: name -> "text", "answer" (a text that ROUGE can read), "texts" (a list of them, as many in each row) or
            "index" (a whole number, 0 or more).
        first: rows to read at most; None: all.
        optional: columns that all rows or none have.

    Raises:
        DataError: a missing or malformed file or column.
    """
    rows: list[dict[str, Any]] = []
    for where, row in file_rows(path, role):
        if isinstance(row, str) and list(columns) == ["text"]:
            row = {"text": row}
        if not isinstance(row, Mapping):
            raise DataError(f"{where} must be an object with {', '.join(columns)}, and is of type {type(row).__name__}")
        wanted = [name for name in columns if name not in optional or row.get(name) is not None]
        rows.append({name: _value(row, name, columns[name], where) for name in wanted})
        if rows[0].keys() != rows[-1].keys():
            raise DataError(f"{where} has other columns than the first row: {', '.join(optional)} in all rows or none")
        for name in (name for name in wanted if columns[name] == "texts"):
            if len(rows[0][name]) != len(rows[-1][name]):
                raise DataError(
                    f'{where} has {len(rows[-1][name])} texts as "{name}", and the first row has '
                    f"{len(rows[0][name])}: give each row as many"
                )
        if len(rows) == first:
            break
    return Questions(path.name, rows)


def _value(row: Mapping[str, Any], name: str, kind: str, where: str) -> Any:
    value = row.get(name)
    if value is None:
        raise DataError(f'{where} has no "{name}", which the benchmark needs: compare with the benchmark\'s own file')
    if kind == "index":
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise DataError(f'{where} must have a whole number, 0 or more, as "{name}", and has {brief(value)}')
        return value
    if kind == "texts":
        if not isinstance(value, (list, tuple)) or not value:
            got = "an empty list" if value == [] else f"a value of type {type(value).__name__}"
            raise DataError(f'{where} must have a list of texts as "{name}", and has {got}')
        return [string_of(each, name, where, blank=True) for each in value]
    text = string_of(value, name, where)
    if kind == "answer" and not any(c.isascii() and c.isalnum() for c in text):
        raise DataError(f'{where} has a "{name}" without Latin letter or digit, the only ones that ROUGE reads')
    return text
