"""Read the rows of a file of texts: JSON lines, JSON, tables, paragraphs and Parquet."""

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pyunlearn.errors import DataError, missing_packages, path_fault

__all__ = [
    "SUFFIXES",
    "Rows",
    "column_names",
    "expanded",
    "file_rows",
    "has_usual_column",
    "parse_json",
    "parse_parquet",
    "require_readable",
    "text_rows",
]

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")
_LONGEST_FIELD = 2**31 - 1  # the default of csv, 131,072 characters, is shorter than many chapters

_AT_ONCE = 1024  # rows of a .parquet file that are in memory at a time
_DIGITS = 4300  # of a whole number: more take Python long to read
_USUAL = re.compile(
    "text|prompt|completion|question|answer|messages|forget|winner|paraphrases|role|content|instruction|input|output|"
    "response|sentence|title|label|source|target|context|chosen|rejected|id|index|data|system|user|assistant|tool",
    re.IGNORECASE,
)

Rows = Iterator[tuple[str, object]]  # (the row's name in messages, the row)
T = TypeVar("T")


def file_rows(path: Path, role: str) -> Rows:
    """Yield the rows of a file of texts, at least one. Raises DataError where it is missing or malformed.

    .jsonl and .parquet are read row by row, the others whole.
    """
    name, suffix = f"the {role} file {path}", path.suffix.lower()
    require_readable(path, f"the {role} file")
    if path.is_dir():
        raise DataError(f"{name} is a folder: wanted a file that ends in one of {', '.join(SUFFIXES)}")
    if not path.exists():
        raise DataError(f"{name} was not found: check the path, or put the string in a list if it is the text itself")
    if suffix not in SUFFIXES:
        raise DataError(f"{name} should end in one of {', '.join(SUFFIXES)}: rename it to what it holds")
    by_row = {".parquet": _parquet, ".jsonl": _lines_of}.get(suffix)
    rows = by_row(path, name) if by_row else text_rows(_read(path, name), suffix, name)
    row = None
    for row in rows:
        yield row
    if row is None:
        raise DataError(f"{name} {'is empty' if suffix == '.jsonl' else 'holds no example'}: give at least one text")


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return a path with ~ replaced, where there is such a home."""
    try:
        return Path(path).expanduser()
    except (RuntimeError, ValueError):  # no such home; a NUL, which `require_readable` refuses
        return Path(path)


def require_readable(path: Path, name: str) -> None:
    """Raise DataError for a name that the file system does not allow or that may not be looked up."""
    if fault := path_fault(path):
        raise DataError(f"{name} cannot be read: {fault}; check its path")


def column_names(names: Iterable[object]) -> str:
    """Return names of columns for a message: usual ones in quotes, others as a number, for they may be texts.

    A table without a header has its first text in place of them.

    >>> column_names([" Title ", "my secret"])
    '" Title " and 1 other'
    """
    every = [str(name) for name in names]
    usual = [f'"{name}"' for name in every if _USUAL.fullmatch(name.strip())]
    others = len(every) - len(usual)
    unusual = [f"{others} other{'s' if others > 1 else ''}"] if others else []
    return " and ".join([*([", ".join(usual)] if usual else []), *unusual]) or "none"


def has_usual_column(names: Iterable[object]) -> bool:
    """Return True where one of the names is usual for a column; else the first row of a table may be a text.

    >>> has_usual_column(["id", "my secret"]), has_usual_column(["my secret"])
    (True, False)
    """
    return any(_USUAL.fullmatch(str(name).strip()) for name in names)


def parse_json(text: str) -> Any:
    """Parse JSON that a reader can rely on: no key twice in an object, no number of thousands of digits.

    >>> parse_json('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: an object has a key twice, and one value would be lost

    Raises json.JSONDecodeError where it is not JSON, and another ValueError for what JSON allows and this does not.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_int=_whole)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("an object has a key twice, and one value would be lost")
    return content


def _whole(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def parse_parquet(name: str, read: Callable[[], T]) -> T:
    """Return what `read` reads from a Parquet file. Raises DataError, with the name of the file, where it cannot."""
    import pyarrow

    try:
        return read()
    except (pyarrow.ArrowException, OSError) as error:
        fault = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(f"{name} cannot be read as parquet: {fault}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{name} has a text or the name of a column that is not UTF-8: save it as UTF-8") from error
    except (ValueError, OverflowError, TypeError) as error:  # a date or a duration that Python's types do not hold
        raise DataError(
            f"{name} has a value that Python cannot hold: leave out columns of dates and durations"
        ) from error


def _read(path: Path, name: str) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text, as byte {error.start + 1} shows: save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}") from error
    if not text.strip():
        raise DataError(f"{name} is empty: give at least one text")
    return text


def text_rows(text: str, suffix: str, name: str) -> Rows:
    """Yield the rows in the text of a file that ends in `suffix`, any of SUFFIXES but .parquet; `name` is its name."""
    if suffix in (".csv", ".tsv"):
        return _table(text, "\t" if suffix == ".tsv" else ",", name)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return {".jsonl": _text_lines, ".json": _json, ".txt": _paragraphs}[suffix](text, name)


def _paragraphs(text: str, name: str) -> Rows:
    kind, blocks = "paragraph", re.split(r"\n\s*\n", text.strip())
    if len(blocks) == 1:
        kind, blocks = "line", blocks[0].split("\n")
    return ((f"{name}, {kind} {number},", block.strip()) for number, block in enumerate(blocks, 1))


def _lines_of(path: Path, name: str) -> Rows:
    try:
        with path.open(encoding="utf-8-sig") as lines:
            yield from _json_lines(lines, name)
    except UnicodeDecodeError:
        _read(path, name)  # says at which byte of the file
        raise
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}") from error


def _json_lines(lines: Iterable[str], name: str) -> Rows:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield f"{name}, line {number},", parse_json(line.removesuffix("\n"))
            except json.JSONDecodeError as error:
                fault = f"{error.msg} at column {error.colno}"
                raise DataError(f"{name}, line {number}, is not JSON: {fault}; wanted one object a line") from error
            except ValueError as error:
                raise DataError(f"{name}, line {number}, cannot be used: {error}") from error


def _text_lines(text: str, name: str) -> Rows:
    return _json_lines(text.split("\n"), name)  # not splitlines(): U+2028 may stand inside a JSON string


def _json(text: str, name: str) -> Rows:
    try:
        content = parse_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line, as datasets.Dataset.to_json writes it
            yield from _text_lines(text, name)
            return
        raise DataError(f"{name} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except ValueError as error:
        raise DataError(f"{name} cannot be used: {error}") from error
    if isinstance(content, dict):
        content = content["data"] if isinstance(content.get("data"), list) else [content]
    if not isinstance(content, list):
        wanted, got = 'a list of objects or strings, or {"data": [...]}', type(content).__name__
        raise DataError(f"{name} must hold {wanted}, and holds a value of type {got}")
    yield from ((f"{name}, row {number},", row) for number, row in enumerate(content, 1))


def _table(text: str, delimiter: str, name: str) -> Rows:
    number, limit = 0, csv.field_size_limit(_LONGEST_FIELD)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"{name} has two columns of the same name: rename one of them")
        for number, fields in enumerate((fields for fields in reader if fields), 1):
            if len(fields) > len(header):  # an unquoted comma in a text: reading on would cut the text short
                got, mend = f"{len(fields)} fields under {len(header)} columns", "quote texts that hold the separator"
                raise DataError(f"{name}, row {number}, has {got}: {mend}")
            yield f"{name}, row {number},", dict(zip(header, fields, strict=False))
    except csv.Error as error:
        raise DataError(f'{name}, row {number + 1}, is malformed: {error}; write a quote in a text as ""') from error
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path, name: str) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise missing_packages(f"reading {name}", "pyarrow", otherwise="save it as .jsonl") from error
    file = parse_parquet(name, lambda: pyarrow.parquet.ParquetFile(path))
    with file:
        names = parse_parquet(name, lambda: file.schema_arrow.names)
        if len(set(names)) < len(names):
            raise DataError(f"{name} has two columns of the same name: rename one of them")
        batches, number = file.iter_batches(_AT_ONCE), 0
        while (batch := parse_parquet(name, lambda: next(batches, None))) is not None:
            for row in parse_parquet(name, batch.to_pylist):
                number += 1
                yield f"{name}, row {number},", row
