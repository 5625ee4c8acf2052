"""Read texts, files and datasets as a list of `Example(prompt, completion)`; no tokenizer and no tensor yet."""

import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from pyunlearn.data.columns import string_of, strings_of
from pyunlearn.data.files import SUFFIXES, Rows, column_names, expanded, file_rows, text_rows
from pyunlearn.errors import DataError

__all__ = [
    "TURNS",
    "Example",
    "Message",
    "Span",
    "examples_of",
    "occurrences",
    "parse_examples",
    "read_examples",
    "rows_of",
    "seam",
    "source_name",
    "spans_of",
    "spans_of_turns",
    "wide_spans_of",
    "with_completion",
]

Span = tuple[int, int]  # characters of a text, the end excluded

TURNS = ("all", "assistant", "last")
"""What is scored of a conversation: all of it from the first turn's content on, each turn of the assistant, or the last
turn alone."""

WANTED = '"text", "prompt" and "completion", "question" and "answer", or "messages"'
_PAIRS = (("prompt", "completion"), ("question", "answer"))


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One text, of which the completion is scored, or what `turns` and `spans` say.

    The text is `prompt + completion` with nothing put in between, so an Example made by hand can even divide a word. A
    plain text has the prompt ''. `messages`, if any, is the same exchange as chat turns: a tokenizer with a chat
    template renders those, any other gets prompt and completion. `winner`, if any, is the answer that `dpo` prefers to
    the completion. `turns` is one of TURNS. `spans`, if any, are the ranges of characters of prompt + completion that
    are scored, in order, and come before `turns`. Of these ranges only the strings in `forget` are scored, if there are
    any, wherever they occur. `paraphrases` are the same in other words, for the attack of that name.

    >>> Example("Who wrote it? ", "Thomas Jefferson.").turns
    'last'
    """

    prompt: str
    completion: str
    messages: tuple[Message, ...] | None = None
    winner: str | None = None
    turns: str = "last"
    spans: tuple[Span, ...] = ()
    forget: tuple[str, ...] = ()
    paraphrases: tuple["Example", ...] = ()

    @property
    def prompted(self) -> bool:
        """True where the whole completion is scored, and a prompt before it is not."""
        return bool(self.prompt) and self.turns == "last" and not (self.spans or self.forget)

    @property
    def scored_text(self) -> str:
        """Text that is scored where there is no chat template; separate parts of it are joined by spaces."""
        whole = self.prompt + self.completion
        return " ".join(whole[start:end] for start, end in spans_of(self))


def read_examples(source: object, *, role: str, turns: str | None = None) -> list[Example]:
    """Read a text, file, list or dataset as a list of examples.

    A dict, a row or a JSON object has one of these, looked up in this order; other columns are ignored:

        messages           turns of a chat, all scored; without a chat template: lines "{role}: {content}"
        prompt/completion  a space joins the two where neither has one at the seam (none between two wide characters, as
                           in Chinese); both may also be lists of messages
        question/answer    a user's and an assistant's turn; without a chat template: "{question}\\n{answer}"
        text               a plain text, all of it scored

    In addition to any of them, `winner` is an answer to prefer to the scored one, for the method that reads it, and
    `forget` a string, or a list of strings, of what is scored: only these are then, wherever they occur in it.
    `paraphrases` is the same in other words, one or a list: a string is another completion under the same prompt, or
    another text; an object is another record. Of a paraphrase with a prompt the completion alone is scored.

    Files, all UTF-8: .jsonl (an object or string a line), .json (a list of these, {"data": [...]}, or JSON lines), .csv
    and .tsv (with a header), .parquet, and .txt: its paragraphs where blank lines separate them, and else its lines.

    Args:
        source: a string: a path if it names something that exists or ends, on one line, in one of `SUFFIXES`, and else
            a text (in a list, it is always a text); a pathlib.Path: always a path; a list of strings, dicts and
            Examples; one dict; one Example; a datasets.Dataset.
        role: "forget", "retain" or "holdout", for messages.
        turns: one of TURNS, for all examples with a prompt; None: all turns of `messages`, and else the completion.

    Returns:
        The examples in order, at least one.

    Raises:
        DataError: no example; a file that is missing or malformed; a row without usable text.
        DependencyError: a .parquet file without pyarrow.

    >>> read_examples(["a text", {"prompt": "Who?", "completion": "He."}], role="forget")[1].prompt
    'Who? '
    """
    return examples_of(rows_of(source, role), role, turns)


def examples_of(rows: Rows, role: str, turns: str | None) -> list[Example]:
    """Return the examples in rows, as `read_examples` does."""
    examples = [_checked(_example(row, where), where, role, turns) for where, row in rows]
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
    return [_example(row, where) for where, row in text_rows(text, suffix, name)]


def spans_of(example: Example, where: str = "the example") -> tuple[Span, ...]:
    """Return the ranges of characters of prompt + completion that are scored.

    Raises DataError, with `where` as its name, where a string in `forget` does not occur in them.

    >>> spans_of(Example("Call ", "4711, not 0815.", forget=("4711",)))
    ((5, 9),)
    """
    return occurrences(example.prompt + example.completion, wide_spans_of(example), example.forget, where)


def occurrences(text: str, spans: tuple[Span, ...], strings: Sequence[str], where: str) -> tuple[Span, ...]:
    """Return the ranges of the strings wherever they occur within the spans of a text; without strings, the spans.

    Ranges that overlap or touch become one. Raises DataError, with `where` as the name of the example, where a string
    does not occur.
    """
    if not strings:
        return spans
    ranges: list[Span] = []
    for string in strings:
        own = [(at, at + len(string)) for start, end in spans for at in _positions(text, string, start, end)]
        if not own:
            raise DataError(
                f'{where} has a "forget" of {len(string)} characters that is not in what is scored of it: write it '
                'as it stands there, or score more of the record with turns="all" (--turns all)'
            )
        ranges += own
    merged: list[Span] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return tuple(merged)


def _positions(text: str, string: str, start: int, end: int) -> Iterator[int]:
    at = text.find(string, start, end)
    while at >= 0:
        yield at
        at = text.find(string, at + 1, end)


def wide_spans_of(example: Example) -> tuple[Span, ...]:
    """Return the ranges of characters of prompt + completion that are scored without `forget`.

    >>> turns = (Message("user", "Who?"), Message("assistant", "He."))
    >>> [wide_spans_of(Example("Who?\\n", "He.", turns, turns=each)) for each in TURNS]
    [((0, 8),), ((5, 8),), ((5, 8),)]
    """
    start, end = len(example.prompt), len(example.prompt) + len(example.completion)
    if example.spans:
        return example.spans
    if example.turns == "last" or not example.prompt:
        return ((start, end),)
    contents = _contents(example)
    if contents is None or example.messages is None:
        return ((0 if example.turns == "all" else start, end),)
    return spans_of_turns(example.turns, example.messages, contents)


def spans_of_turns(turns: str, messages: Sequence[Message], contents: Sequence[Span]) -> tuple[Span, ...]:
    """Return the ranges of characters that `turns` scores, given those of the contents of all messages."""
    if turns == "all":
        return ((contents[0][0], contents[-1][1]),)
    if turns == "last":
        return (contents[-1],)
    return tuple(span for message, span in zip(messages, contents, strict=True) if message.role == "assistant")


def _contents(example: Example) -> list[Span] | None:
    """Return the ranges of the messages' contents in prompt + completion, lines as the reader writes them, or None."""
    text, at, contents = example.prompt + example.completion, 0, []
    for role, content in example.messages or ():
        label = f"{role}: "
        at += len(label) if text.startswith(label + content, at) else 0
        if not text.startswith(content, at):
            return None
        contents.append((at, at + len(content)))
        at += len(content) + 1
    return contents if contents and contents[-1][1] == len(text) else None


def rows_of(source: object, role: str) -> Rows:
    """Yield the rows of a source that `read_examples` takes, each with its name in messages."""
    columns = getattr(source, "column_names", None)
    if isinstance(source, os.PathLike) or (isinstance(source, str) and _is_path(source)):
        yield from file_rows(expanded(source), role)
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


def source_name(source: object) -> str | None:
    """Return a source's name for a report: a path (its last part where it is absolute), or its type.

    >>> source_name("/home/ann/secrets.jsonl"), source_name("My pin is 4711."), source_name(["a"]), source_name(None)
    ('secrets.jsonl', 'str', 'list', None)
    """
    if isinstance(source, os.PathLike) or (isinstance(source, str) and _is_path(source)):
        return Path(source).name if Path(source).is_absolute() else str(source)
    return None if source is None else type(source).__name__


# ---------------------------------------------------------------- rows -> examples


def _checked(example: Example, where: str, role: str, turns: str | None) -> Example:
    """Return the example with the turns that are wanted. Raises DataError where its `forget` cannot be used."""
    if turns is not None and example.prompt:
        example = replace(example, turns=turns)
    if example.forget and role == "retain":
        raise DataError(f'{where} has a "forget", and a retain set is what must stay: take one of them out')
    if example.forget:
        spans_of(example, where)
    return example


def _example(row: object, where: str) -> Example:
    if isinstance(row, Example):
        string_of(row.completion, "completion", where)
        return _with_paraphrases(row, row.paraphrases, where) if row.paraphrases else row
    if isinstance(row, str):
        return Example("", string_of(row, "text", where))
    if not isinstance(row, Mapping):
        raise DataError(f"{where} must be a string or an object with {WANTED}, and is of type {type(row).__name__}")
    if isinstance(winner := row.get("winner"), str) and winner.strip():
        rest = {key: value for key, value in row.items() if key != "winner"}
        return replace(_example(rest, where), winner=string_of(winner, "winner", where))
    if row.get("paraphrases"):
        rest = {key: value for key, value in row.items() if key != "paraphrases"}
        return _with_paraphrases(_example(rest, where), row["paraphrases"], where)
    if row.get("forget"):
        rest = {key: value for key, value in row.items() if key != "forget"}
        return replace(_example(rest, where), forget=strings_of(row["forget"], where))
    present = {key for key, value in row.items() if value is not None}
    if "messages" in present:
        return replace(_chat(row["messages"], where), turns="all")
    for first, second in _PAIRS:
        if {first, second} <= present:
            return _pair(first, row[first], second, row[second], where)
    if "text" in present:
        return Example("", string_of(row["text"], "text", where))
    for first, second in _PAIRS:
        if first in present:
            raise _unanswered(first, second, where)
    filled, empty = (column_names(key for key in row if (key in present) is full) for full in (True, False))
    mend = f'{filled}; rename the column of the text to "text"'
    columns = mend if present else f"only empty ones: {empty}" if row else "none"
    raise DataError(f"{where} has no usable column: wanted {WANTED}, found {columns}")


def _with_paraphrases(record: Example, value: object, where: str) -> Example:
    """Return the record with its paraphrases, without repetitions. Raises DataError where one cannot be read."""
    values = (value,) if isinstance(value, (str, Mapping)) else value
    if not isinstance(values, (list, tuple)):
        got = type(value).__name__
        raise DataError(f'{where} must have a list of strings or objects as "paraphrases", and has one of type {got}')
    paraphrases = []
    for number, each in enumerate(values, 1):
        name = f"paraphrase {number} of {where}"
        if (isinstance(each, Mapping) and each.get("paraphrases")) or getattr(each, "paraphrases", ()):
            raise DataError(f"{name} has paraphrases of its own: list them with those of the record")
        if isinstance(each, str):
            other = with_completion(record, string_of(each, "paraphrases", where))
        else:
            other = replace(_example(each, name), turns="last", spans=())
            spans_of(other, name)
        paraphrases.append(other)
    return replace(record, paraphrases=tuple(dict.fromkeys(paraphrases)))


def with_completion(example: Example, text: str) -> Example:
    """Return the example with that text in place of its completion, which alone is scored.

    >>> with_completion(Example("Who? ", "He."), "She.").completion
    'She.'
    """
    messages = example.messages and (*example.messages[:-1], example.messages[-1]._replace(content=text))
    blank = example.completion[: len(example.completion) - len(example.completion.lstrip())]
    return Example(example.prompt, blank + text.lstrip(), messages or None)


def _unanswered(first: str, second: str, where: str) -> DataError:
    return DataError(f'{where} has a "{first}" without "{second}": add the {second}, which is what is scored')


def _pair(first: str, prompt: object, second: str, completion: object, where: str) -> Example:
    if isinstance(prompt, (list, tuple)) and isinstance(completion, (list, tuple)):
        return _chat([*prompt, *completion], where)
    prompt = string_of(prompt, first, where, blank=True)
    if prompt.strip() and completion == "":
        raise _unanswered(first, second, where)
    completion = string_of(completion, second, where)
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
        got = column_names(turn.role for turn in turns)
        raise DataError(
            f"{where} must have messages that end with one by the assistant after another's, and has: {got}"
        )
    lines = [f"{role}: {content}" for role, content in turns[:-1]]
    return Example("\n".join([*lines, "assistant: "]), turns[-1].content, turns)


def _message(message: object, where: str) -> Message:
    if isinstance(message, Message):
        message = message._asdict()
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        got = f"has {column_names(message)}" if isinstance(message, Mapping) else f"is {type(message).__name__}"
        raise DataError(f'{where} must be an object with "role" and "content", and {got}')
    content = message["content"]
    if isinstance(content, (list, tuple)) and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    role = string_of(message["role"], "role", where)
    return Message(role, string_of(content, "content", where, blank=role == "system"))  # often empty, and harmless


def _is_text_part(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
