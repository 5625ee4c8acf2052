"""Read texts, files and datasets as a list of `Example(prompt, completion)`; no tokenizer and no tensor yet."""

import csv
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from pyunlearn.errors import DataError, missing_packages

__all__ = ["Example", "Message", "excerpt", "parse_examples", "read_examples", "seam"]

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")
WANTED = '"text", "prompt" and "completion", "question" and "answer", or "messages"'
_PAIRS = (("prompt", "completion"), ("question", "answer"))
_LONGEST_FIELD = 2**31 - 1  # the default of csv, 131,072 characters, is shorter than many chapters

Rows = Iterator[tuple[str, object]]  # (the row's name in messages, the row)


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One text, of which the completion is scored.

    The text is `prompt + completion` with nothing put in between, so an Example made by hand can even divide a word. A
    plain text has the prompt ''. `messages`, if any, is the same exchange as chat turns: a tokenizer with a chat
    template renders those, any other gets prompt and completion. `winner`, if any, is the answer that `dpo` prefers to
    the completion.

    >>> Example("Who wrote it? ", "Thomas Jefferson.")
    Example(prompt='Who wrote it? ', completion='Thomas Jefferson.', messages=None, winner=None)
    """

    prompt: str
    completion: str
    messages: tuple[Message, ...] | None = None
    winner: str | None = None


def read_examples(source: object, *, role: str) -> list[Example]:
    """Read a text, file, list or dataset as a list of examples.

    A dict, a row or a JSON object has one of these, looked up in this order; other columns are ignored:

        messages           the last turn, the assistant's, is scored; without a chat template: lines "{role}: {content}"
        prompt/completion  a space joins the two where neither has one at the seam (none between two wide characters, as
                           in Chinese); both may also be lists of messages
        question/answer    a user's and an assistant's turn; without a chat template: "{question}\\n{answer}"
        text               a plain text, all of it scored

    In addition to any of them, `winner` is an answer to prefer to the scored one, for the method that reads it.

    Files, all UTF-8: .jsonl (an object or string a line), .json (a list of these, {"data": [...]}, or JSON lines), .csv
    and .tsv (with a header), .parquet, and .txt: its paragraphs where blank lines separate them, and else its lines.

    Args:
        source: a string: a path if it names something that exists or ends, on one line, in one of `SUFFIXES`, and else
            a text (in a list, it is always a text); a pathlib.Path: always a path; a list of strings, dicts and
            Examples; one dict; one Example; a datasets.Dataset.
        role: "forget", "retain" or "holdout", for messages.

    Returns:
        The examples in order, at least one.

    Raises:
        DataError: no example; a file that is missing or malformed; a row without usable text.
        DependencyError: a .parquet file without pyarrow.

    >>> read_examples(["a text", {"prompt": "Who?", "completion": "He."}], role="forget")[1].prompt
    'Who? '
    """
    examples = [_example(row, where) for where, row in _rows(source, role)]
    if not examples:
        raise DataError(f"{role} holds no example: give at least one text")
    return examples


def parse_examples(text: str, suffix: str, *, name: str) -> list[Example]:
    """Parse the text of a file that ends in `suffix`, any of `SUFFIXES` but .parquet; errors call it `name`.

    >>> parse_examples("one\\n\\ntwo", ".txt", name="standard input")[1].completion
    'two'

    Raises DataError where it is empty or no such file.
    """
    if not text.strip():
        raise DataError(f"{name} is empty: give at least one text")
    return [_example(row, where) for where, row in _text_rows(text, suffix, name)]


def excerpt(example: Example) -> str:
    """Return the start of an example's text in quotes, 40 characters at most, for messages.

    >>> excerpt(Example("Who wrote it? ", "Thomas Jefferson, in Philadelphia."))
    '"Who wrote it? Thomas Jefferson, in Ph..."'
    """
    text = " ".join((example.prompt + example.completion)[:200].split())
    return f'"{text}"' if len(text) <= 40 else f'"{text[:37]}..."'


def _rows(source: object, role: str) -> Rows:
    columns = getattr(source, "column_names", None)
    if isinstance(source, os.PathLike) or (isinstance(source, str) and _is_path(source)):
        yield from _file_rows(Path(source).expanduser(), role)
    elif isinstance(columns, Mapping):
        splits = ", ".join(f'"{split}"' for split in columns)
        raise DataError(f"{role} is a dataset of several splits, {splits}: pass one of them, as in dataset[split]")
    elif isinstance(source, (str, Example, Mapping)):
        yield f"the {role} text" if isinstance(source, str) else f"the {role} example", source
    elif hasattr(source, "column_names") or (isinstance(source, Sequence) and not isinstance(source, bytes)):
        rows: Iterable[object] = source  # type: ignore[assignment]  # a datasets.Dataset iterates over its rows
        for number, row in enumerate(rows, 1):
            yield f"{role} example {number}", row
    else:
        wanted = "a text, a path, a list of texts or dicts, or a datasets.Dataset"
        raise DataError(f"{role} must be {wanted}, and is of type {type(source).__name__}")


def _is_path(text: str) -> bool:
    if not text.strip() or "\n" in text:
        return False
    try:
        return Path(text).suffix.lower() in SUFFIXES or Path(text).exists()
    except (OSError, ValueError):  # too long for a file name, or a NUL in it
        return False


# ---------------------------------------------------------------- rows -> examples


def _example(row: object, where: str) -> Example:
    if isinstance(row, Example):
        _string(row.completion, "completion", where)
        return row
    if isinstance(row, str):
        return Example("", _string(row, "text", where))
    if not isinstance(row, Mapping):
        raise DataError(f"{where} must be a string or an object with {WANTED}, and is of type {type(row).__name__}")
    if isinstance(winner := row.get("winner"), str) and winner.strip():
        rest = {key: value for key, value in row.items() if key != "winner"}
        return replace(_example(rest, where), winner=_string(winner, "winner", where))
    present = {key for key, value in row.items() if value is not None}
    if "messages" in present:
        return _chat(row["messages"], where)
    for first, second in _PAIRS:
        if {first, second} <= present:
            return _pair(first, row[first], second, row[second], where)
    if "text" in present:
        return Example("", _string(row["text"], "text", where))
    for first, second in _PAIRS:
        if first in present:
            raise _unanswered(first, second, where)
    columns = ", ".join(f'"{key}"' if key in present else f'"{key}" (empty)' for key in row) or "none"
    raise DataError(f"{where} has no usable column: wanted {WANTED}, found {columns}")


def _string(value: object, name: str, where: str, *, blank: bool = False) -> str:
    if not isinstance(value, str):
        raise DataError(f'{where} must have a string as "{name}", and has a value of type {type(value).__name__}')
    if not (blank or value.strip()):
        raise DataError(f'{where} has an empty "{name}": fill it in, or drop it')
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair: valid in JSON, in no tokenizer
        at = f"character {error.start + 1} is half of a surrogate pair"
        raise DataError(f'{where} has a "{name}" that is not valid Unicode: {at}; mend or remove it') from error
    return value


def _unanswered(first: str, second: str, where: str) -> DataError:
    return DataError(f'{where} has a "{first}" without "{second}": add the {second}, which is what is scored')


def _pair(first: str, prompt: object, second: str, completion: object, where: str) -> Example:
    if isinstance(prompt, (list, tuple)) and isinstance(completion, (list, tuple)):
        return _chat([*prompt, *completion], where)
    prompt = _string(prompt, first, where, blank=True)
    if prompt.strip() and completion == "":
        raise _unanswered(first, second, where)
    completion = _string(completion, second, where)
    if not prompt.strip():
        return Example("", completion)
    if first == "question":
        return Example(f"{prompt}\n", completion, (Message("user", prompt), Message("assistant", completion)))
    return Example(prompt + seam(prompt, completion), completion)


def seam(prompt: str, completion: str) -> str:
    """Return ' ' where two words would otherwise run together."""
    left, right = prompt[-1], completion[0]
    wide = all(unicodedata.east_asian_width(character) in "WF" for character in (left, right))
    return "" if wide or left.isspace() or right.isspace() else " "


def _chat(messages: object, where: str) -> Example:
    if not isinstance(messages, (list, tuple)):
        got = type(messages).__name__
        raise DataError(f'{where} must have a list of objects as "messages", and has a value of type {got}')
    turns = tuple(_message(message, f"message {number} of {where}") for number, message in enumerate(messages, 1))
    if len(turns) < 2 or turns[-1].role != "assistant":
        got = ", ".join(turn.role for turn in turns) or "none"
        raise DataError(
            f"{where} must have messages that end with one by the assistant after another's, and has: {got}"
        )
    lines = [f"{role}: {content}" for role, content in turns[:-1]]
    return Example("\n".join([*lines, "assistant: "]), turns[-1].content, turns)


def _message(message: object, where: str) -> Message:
    if isinstance(message, Message):
        message = message._asdict()
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        got = ", ".join(map(str, message)) if isinstance(message, Mapping) else type(message).__name__
        raise DataError(f'{where} must be an object with "role" and "content", and is {got or "empty"}')
    content = message["content"]
    if isinstance(content, (list, tuple)) and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    role = _string(message["role"], "role", where)
    return Message(role, _string(content, "content", where, blank=role == "system"))  # often empty, and harmless


def _is_text_part(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


# ---------------------------------------------------------------- files -> rows


def _file_rows(path: Path, role: str) -> Rows:
    name, suffix = f"the {role} file {path}", path.suffix.lower()
    if path.is_dir():
        raise DataError(f"{name} is a folder: wanted a file that ends in one of {', '.join(SUFFIXES)}")
    if not path.exists():
        raise DataError(f"{name} was not found: check the path, or put the string in a list if it is the text itself")
    if suffix not in SUFFIXES:
        raise DataError(f"{name} should end in one of {', '.join(SUFFIXES)}: rename it to what it holds")
    rows = list(_parquet(path, name) if suffix == ".parquet" else _text_rows(_read(path, name), suffix, name))
    if not rows:
        raise DataError(f"{name} holds no example: give at least one text")
    yield from rows


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


def _text_rows(text: str, suffix: str, name: str) -> Rows:
    if suffix in (".csv", ".tsv"):
        return _table(text, "\t" if suffix == ".tsv" else ",", name)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return {".jsonl": _json_lines, ".json": _json, ".txt": _paragraphs}[suffix](text, name)


def _paragraphs(text: str, name: str) -> Rows:
    kind, blocks = "paragraph", re.split(r"\n\s*\n", text.strip())
    if len(blocks) == 1:
        kind, blocks = "line", blocks[0].split("\n")
    return ((f"{name}, {kind} {number},", block.strip()) for number, block in enumerate(blocks, 1))


def _json_lines(text: str, name: str) -> Rows:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): U+2028 may stand inside a JSON string
        if line.strip():
            try:
                yield f"{name}, line {number},", json.loads(line)
            except json.JSONDecodeError as error:
                fault = f"{error.msg} at column {error.colno}"
                raise DataError(f"{name}, line {number}, is not JSON: {fault}; wanted one object a line") from error


def _json(text: str, name: str) -> Rows:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line, as datasets.Dataset.to_json writes it
            yield from _json_lines(text, name)
            return
        raise DataError(f"{name} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
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
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name} cannot be read as parquet: {str(error).splitlines()[0].rstrip('.')}") from error
    yield from ((f"{name}, row {number},", row) for number, row in enumerate(rows, 1))
