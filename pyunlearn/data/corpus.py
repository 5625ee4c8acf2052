"""Records of a training corpus, read one at a time: files larger than memory, folders of files, and iterables."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from pyunlearn.data.examples import WANTED, Example, Message
from pyunlearn.data.files import (
    SUFFIXES,
    column_names,
    expanded,
    has_usual_column,
    parse_json,
    parse_parquet,
    require_readable,
)
from pyunlearn.errors import DataError, first_line, missing_packages

__all__ = ["Corpus", "Record", "record_text"]

_COLUMNS = (("messages",), ("prompt", "completion"), ("question", "answer"), ("text",))
_KNOWN = frozenset(name for names in _COLUMNS for name in names)
_CONTENT = frozenset(("content", "text", "value"))  # names of what a turn of a chat says
_LONGEST_FIELD = 2**31 - 1  # of csv: its default, 131,072 characters, is shorter than many documents
_ROWS = 256  # of a .parquet file that are in memory at a time

Rows = Iterator[tuple[int, object]]  # (place in the file, the row)


class Record(NamedTuple):
    """One record of a corpus."""

    source: str
    """The file, or "corpus" for a record of an iterable."""
    row: int
    """Line of the file at which the record begins; in .json and .parquet, and of an iterable, its number from 1 on."""
    text: str


class Corpus:
    """All records of a corpus in order, one in memory at a time.

    .jsonl, .csv, .tsv, .txt and .parquet are read row by row, as is a .json of JSON lines; another .json is read whole.

    Args:
        source: a path, or a list of them: of a file, or of a folder with files that end in one of `SUFFIXES`, each
            file once; or an iterable of texts, dicts and Examples, such as a generator or a datasets.Dataset.

    Raises:
        DataError: no such file, another kind of file, a source of another type; during the iteration also a row that
            cannot be read.
        DependencyError: a .parquet file without pyarrow.

    >>> [record.text for record in Corpus(["one", {"question": "Who?", "answer": "He."}])]
    ['one', 'Who?\\nHe.']
    """

    def __init__(self, source: object) -> None:
        paths = _paths(source)
        self.files = None if paths is None else list({f.resolve(): f for path in paths for f in _files(path)}.values())
        self.rows: Iterable[object] = () if self.files is not None else _iterable(source)
        sizes = [file.stat().st_size for file in self.files or ()]
        self.size = sum(sizes)
        """Bytes of the files; 0 for an iterable."""
        self._finished = 0
        self._tell: Callable[[], int] = int
        if any(file.suffix.lower() == ".parquet" for file in self.files or ()):
            _pyarrow()

    @property
    def position(self) -> int:
        """Bytes of the files that are read so far."""
        return self._finished + self._tell()

    def __iter__(self) -> Iterator[Record]:
        if self.files is None:
            for row, content in enumerate(self.rows, 1):
                text = record_text(content)
                if text is None:
                    raise _unusable(f"corpus record {row}", content)
                yield Record("corpus", row, text)
            return
        self._finished = 0
        for file in self.files:
            source, kind = str(file), "row" if file.suffix.lower() in (".json", ".parquet") else "line"
            for row, content in self._file_rows(file):
                text = record_text(content)
                if text is None:
                    raise _unusable(f"the corpus file {source}, {kind} {row},", content)
                yield Record(source, row, text)
            self._finished += file.stat().st_size
            self._tell = int

    def _file_rows(self, file: Path) -> Rows:
        suffix = file.suffix.lower()
        if suffix == ".parquet":
            return self._parquet(file)
        kinds = {".csv": self._table, ".tsv": self._table, ".json": self._json, ".txt": self._paragraphs}
        return kinds.get(suffix, self._json_lines)(file)

    @contextmanager
    def _opened(self, file: Path, newline: str | None = None) -> Iterator[io.TextIOWrapper]:
        """Open a text file whose position counts as the corpus's. Raises DataError where it cannot be read."""
        try:
            with file.open("rb") as handle:
                self._tell = handle.tell
                yield io.TextIOWrapper(handle, encoding="utf-8-sig", newline=newline)
                end = handle.tell()
                self._tell = lambda: end
        except UnicodeDecodeError as error:
            raise DataError(f"the corpus file {file} is not UTF-8 text: {error.reason}; save it as UTF-8") from error
        except OSError as error:
            raise DataError(f"the corpus file {file} cannot be read: {error.strerror}") from error

    def _json_lines(self, file: Path) -> Rows:
        with self._opened(file) as lines:
            for number, line in enumerate(lines, 1):
                if not line.isspace():
                    try:
                        yield number, parse_json(line)
                    except json.JSONDecodeError as error:
                        fault = f"{error.msg} at column {error.colno}"
                        where = f"the corpus file {file}, line {number}"
                        raise DataError(f"{where}, is not JSON: {fault}; wanted one object a line") from error
                    except ValueError as error:
                        raise DataError(f"the corpus file {file}, line {number}, cannot be used: {error}") from error

    def _json(self, file: Path) -> Rows:
        """Yield the rows of a .json file, as it stands: JSON lines, a list, {"data": [...]}, or one object."""
        with self._opened(file) as text:
            first = next((line for line in text if not line.isspace()), "")
            by_line = _is_object(first) and any(not line.isspace() for line in text)
            if not by_line:
                text.seek(0)
                rows = _parsed(text.read(), file)
        yield from self._json_lines(file) if by_line else enumerate(rows, 1)

    def _paragraphs(self, file: Path) -> Rows:
        """Yield the paragraphs of a .txt file where blank lines separate them, and else its lines."""
        with self._opened(file) as lines:
            by_line = not _has_paragraphs(lines)
        start, block = 0, list[str]()
        with self._opened(file) as lines:
            for number, line in enumerate(lines, 1):
                if block and (by_line or line.isspace()):
                    yield start, "".join(block).strip()
                    block = []
                if not line.isspace():
                    start = start if block else number
                    block.append(line)
            if block:
                yield start, "".join(block).strip()

    def _table(self, file: Path) -> Rows:
        limit, line = csv.field_size_limit(_LONGEST_FIELD), 1
        name, delimiter = f"the corpus file {file}", "\t" if file.suffix.lower() == ".tsv" else ","
        try:
            with self._opened(file, newline="") as text:
                reader = csv.reader(text, delimiter=delimiter, strict=True)
                header = next(reader, [])
                if len(set(header)) < len(header):
                    raise DataError(f"{name} has two columns of the same name: rename one of them")
                if not has_usual_column(header):  # perhaps a table without a header
                    yield line, dict(enumerate(header))
                line = reader.line_num + 1
                for fields in reader:
                    if len(fields) > len(header):
                        got, mend = f"{len(fields)} fields under {len(header)} columns", "quote texts that hold the"
                        raise DataError(f"{name}, line {line}, has {got}: {mend} separator")
                    if fields:
                        yield line, dict(zip(header, fields, strict=False))
                    line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f'{name}, line {line}, is malformed: {error}; write a quote in a text as ""') from error
        finally:
            csv.field_size_limit(limit)

    def _parquet(self, file: Path) -> Rows:
        pyarrow, name, size, number = _pyarrow(), f"the corpus file {file}", file.stat().st_size, 0  # rows so far
        try:
            with parse_parquet(name, lambda: pyarrow.parquet.ParquetFile(file)) as table:
                total = table.metadata.num_rows
                names = parse_parquet(name, lambda: table.schema_arrow.names)
                if len(set(names)) < len(names):
                    raise DataError(f"{name} has two columns of the same name: rename one of them")
                types = map(str, table.schema_arrow.types)  # such as list<element: struct<role: string, ...>>
                columns = [
                    c
                    for c, kind in zip(names, types, strict=True)
                    if c in _KNOWN or any(part in kind for part in ("string", "binary"))
                ]
                if not columns:
                    raise _unusable(name, dict.fromkeys(names))
                self._tell = lambda: size * number // max(total, 1)
                for batch in table.iter_batches(_ROWS, columns=columns):
                    for row in parse_parquet(name, batch.to_pylist):
                        number += 1
                        yield number, row
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{name} cannot be read as parquet: {first_line(error).rstrip('.')}") from error


def record_text(row: object) -> str | None:
    """Return the whole text of a record: every string in it, also in lists and objects; "" where they are empty.

    Columns that `read_examples` reads come first, then the others; of a chat the contents of its turns, and at the end
    what else they hold, such as roles and the calls of tools.

    >>> record_text({"id": 3, "prompt": "Who?", "response": "He.", "meta": {"source": "a letter"}})
    'Who?\\nHe.\\na letter'

    Returns None where there is no such column, and no string: where all values are numbers.
    """
    try:
        return _record_text(row)
    except RecursionError:  # lists in lists, thousands deep
        return None


def _record_text(row: object) -> str | None:
    if isinstance(row, str):
        return row
    if isinstance(row, Example):
        return "\n".join(m.content for m in row.messages) if row.messages else row.prompt + row.completion
    if not isinstance(row, Mapping):
        return None
    if len(row) == 1 and isinstance(text := row.get("text"), str):
        return text
    if _KNOWN.isdisjoint(row) and all(isinstance(value, (int, float)) for value in row.values()):
        return None
    filled = {name for name, value in row.items() if value is not None}
    whole = [name for names in _COLUMNS if filled.issuperset(names) for name in names]
    texts, rest = list[str](), list[str]()
    for name in dict.fromkeys([*whole, *row]):
        value = row[name]
        if hasattr(value, "tolist"):  # numpy's arrays and numbers
            value = value.tolist()
        if not isinstance(value, (int, float)):
            _collect(value, texts, rest)
        elif name in _KNOWN:
            texts.append(str(value))
    return "\n".join(texts + list(dict.fromkeys(rest)))


def _collect(value: object, texts: list[str], rest: list[str]) -> None:
    """Append the strings in a value to `texts`, those next to the content of a message to `rest`."""
    if isinstance(value, str):
        texts.append(value)
    elif value is None or isinstance(value, (int, float)):
        return
    elif isinstance(value, Message):
        texts.append(value.content)
        rest.append(value.role)
    elif isinstance(value, (dict, Mapping)):  # dict: the usual one, and sooner recognized
        is_message = not _CONTENT.isdisjoint(value)
        for name, part in value.items():
            _collect(part, rest if is_message and name not in _CONTENT else texts, rest)
            if name == "arguments" and isinstance(part, str):  # of a tool's call: JSON, whose escapes hide words
                with suppress(ValueError, RecursionError):
                    _collect(json.loads(part), rest, rest)
    elif isinstance(value, (list, tuple)):
        for part in value:
            _collect(part, texts, rest)
    elif hasattr(value, "tolist"):
        _collect(value.tolist(), texts, rest)
    else:
        texts.append(value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value))


def _unusable(name: str, content: object) -> DataError:
    """Return the error about a record without text."""
    got = column_names(content) if isinstance(content, Mapping) else type(content).__name__
    return DataError(f"{name} has no text: wanted {WANTED}, or another column with strings, found {got}")


def _paths(source: object) -> list[Path] | None:
    """Return the paths that a source names; None for an iterable of records.

    A string names a path. A list names paths where each of its elements is a pathlib.Path, or a string that ends as a
    file of texts does.
    """
    if isinstance(source, (str, os.PathLike)):
        return [_path(source)]
    if isinstance(source, (list, tuple)) and source and all(map(_names_a_file, source)):
        return [_path(each) for each in source]
    return None


def _names_a_file(each: object) -> bool:
    return isinstance(each, os.PathLike) or (
        isinstance(each, str) and "\n" not in each and each.lower().endswith(SUFFIXES)
    )


def _path(source: str | os.PathLike[str]) -> Path:
    if not str(source).strip() or "\0" in str(source):
        raise DataError(f"corpus must be the path of a file or folder, got {str(source)!r}: give one")
    path = expanded(source)
    require_readable(path, "the corpus file")
    return path


def _files(path: Path) -> list[Path]:
    """Return the file at a path, or the files in the folder there. Raises DataError where there is none to read."""
    ends = ", ".join(SUFFIXES)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
        if not files:
            raise DataError(f"the corpus folder {path} has no file that ends in one of {ends}: give another")
        return files
    if path.suffix.lower() not in SUFFIXES and path.exists():
        raise DataError(f"the corpus file {path} should end in one of {ends}: rename it to what it holds")
    if not path.is_file():
        raise DataError(f"the corpus file {path} was not found: check the path; a corpus of texts is given as a list")
    return [path]


def _iterable(source: object) -> Iterable[object]:
    columns = getattr(source, "column_names", None)
    if isinstance(columns, Mapping):
        splits = ", ".join(f'"{split}"' for split in columns)
        raise DataError(f"corpus is a dataset of several splits, {splits}: pass one of them, as in dataset[split]")
    if isinstance(source, (bytes, Mapping, Example)) or not isinstance(source, Iterable):
        wanted = "a path, a list of paths, or an iterable of texts or dicts such as a datasets.Dataset"
        raise DataError(f"corpus must be {wanted}, and is of type {type(source).__name__}")
    return source


def _has_paragraphs(lines: Iterable[str]) -> bool:
    """Return True where a blank line has text above and below it."""
    above = blank = False
    for line in lines:
        if not line.isspace():
            if above and blank:
                return True
            above, blank = True, False
        else:
            blank = True
    return False


def _is_object(line: str) -> bool:
    """Return True where a line is a JSON object or string of its own."""
    try:
        return isinstance(parse_json(line), (dict, str))
    except json.JSONDecodeError:
        return False
    except ValueError:
        return True


def _parsed(text: str, file: Path) -> list[object]:
    try:
        content = parse_json(text)
    except json.JSONDecodeError as error:
        fault = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise DataError(f"the corpus file {file} is not JSON: {fault}") from error
    except ValueError as error:
        raise DataError(f"the corpus file {file} cannot be used: {error}") from error
    if isinstance(content, dict):
        content = content["data"] if isinstance(content.get("data"), list) else [content]
    if not isinstance(content, list):
        wanted, got = 'a list of objects or strings, or {"data": [...]}', type(content).__name__
        raise DataError(f"the corpus file {file} must hold {wanted}, and holds a value of type {got}")
    return content


def _pyarrow() -> Any:
    """Import pyarrow. Raises DependencyError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise missing_packages(
            "reading a corpus in .parquet files", "pyarrow", otherwise="save it as .jsonl"
        ) from error
    return pyarrow
