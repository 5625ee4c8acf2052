"""Render the text of an example, and tell which of its characters are scored: Example -> ScoredText."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from pyunlearn.data.examples import Example, Span, occurrences, spans_of
from pyunlearn.data.redaction import MASK
from pyunlearn.errors import DataError

__all__ = ["ScoredText", "rendered_text", "shared_length"]

S = TypeVar("S", str, list[int])


class ScoredText(NamedTuple):
    """A text and which of its characters are scored."""

    prompt: str  # up to the first scored character
    completion: str
    templated: bool  # rendered by the chat template, which writes every special token itself
    answers: bool  # an answer, which the end of text follows
    spans: tuple[Span, ...] | None = None  # of prompt + completion, scored; None: the completion
    partial: bool = False  # strings within a text are scored, and the end of text is not

    @classmethod
    def of(
        cls, text: str, spans: Sequence[Span], *, templated: bool, answers: bool, partial: bool = False
    ) -> ScoredText:
        """Divide a text before its first scored character, given the ranges of scored characters."""
        first = spans[0][0] if spans else len(text)
        whole = len(spans) == 1 and spans[0][1] >= len(text) and not partial
        return cls(text[:first], text[first:], templated, answers, None if whole else tuple(spans), partial)

    @property
    def parts(self) -> list[str]:
        """The scored parts of the text."""
        text = self.prompt + self.completion
        return [self.completion] if self.spans is None else [text[start:end] for start, end in self.spans]


def rendered_text(example: Example, tokenizer: Any, where: str, chat_template: str | None) -> ScoredText:
    """Return the text of an example, rendered by the chat template where it has messages and the tokenizer has one.

    Raises DataError, with `where` as the name of the example, where the template refuses it or divides it badly.
    """
    if example.messages is None or example.spans or not (chat_template or getattr(tokenizer, "chat_template", None)):
        text = example.prompt + example.completion
        spans = spans_of(example, where)
        return ScoredText.of(text, spans, templated=False, answers=bool(example.prompt), partial=bool(example.forget))
    messages = [message._asdict() for message in example.messages]
    name = "the given chat template" if chat_template else "the tokenizer's chat template"
    mend = "give it as prompt and completion, or set template='none' (--template none)"
    apply = functools.partial(tokenizer.apply_chat_template, tokenize=False, chat_template=chat_template)
    specials = tuple(tokenizer.all_special_tokens)
    try:
        whole = str(apply(messages))
        prompt, contents = "", [(0, 0)]
        if example.turns == "last":
            prompt = str(apply(messages[:-1], add_generation_prompt=True))
        else:
            contents = [span for span in _contents(apply, messages, whole, example.turns) if span[0] < span[1]]
    except Exception as error:  # a template is a program: it can raise anything
        fault = _without(" ".join(str(error).split()), messages)
        raise DataError(f"{where} is refused by {name}: {fault}; {mend}") from error
    if example.turns == "last" and (not whole.startswith(prompt) or whole == prompt):
        fault = f"{name} does not write the prompt alone as it writes it before the answer"
        raise DataError(f"{where} cannot be split into prompt and answer, because {fault}; {mend}")
    if whole.rstrip().endswith(specials):  # "<|im_end|>\n": no model generates that newline
        whole = whole.rstrip()
    if not contents:
        raise DataError(f"{where} has no turn to score, because {name} does not write the messages; {mend}")
    if example.turns == "assistant":
        spans = tuple((start, _closing(whole, end, specials)) for start, end in contents)
    else:
        spans = ((len(prompt) if example.turns == "last" else contents[0][0], len(whole)),)
    spans = occurrences(whole, spans, example.forget, where)
    return ScoredText.of(whole, spans, templated=True, answers=True, partial=bool(example.forget))


def _without(fault: str, messages: list[dict[str, str]]) -> str:
    """Return the message of a chat template without the contents and roles that it quotes."""
    for quoted in sorted({part for message in messages for part in message.values()}, key=len, reverse=True):
        if quoted.strip() and quoted not in ("system", "user", "assistant", "tool"):
            fault = fault.replace(" ".join(quoted.split()), MASK)
    return fault


def _contents(apply: Callable[..., Any], messages: list[dict[str, str]], whole: str, turns: str) -> Iterator[Span]:
    """Yield where a chat template writes the messages' contents: what differs in the text with another content.

    The span is empty where the template leaves the message out. Of turns "assistant" only these are yielded.
    """
    for i, message in enumerate(messages):
        content = message["content"].strip()
        if not content or (turns == "assistant" and message["role"] != "assistant"):
            continue
        other = next(c for c in "xyz" if c not in (content[0], content[-1]))
        changed = str(apply([*messages[:i], {**message, "content": other}, *messages[i + 1 :]]))
        start = shared_length(whole, changed)
        yield start, len(whole) - shared_length(whole[start:][::-1], changed[start:][::-1])


def _closing(text: str, end: int, specials: tuple[str, ...]) -> int:
    """Return the end of the special token that closes a turn, if one follows, and else the end of the turn."""
    rest = text[end:].lstrip()
    token = next((s for s in sorted(specials, key=len, reverse=True) if s and rest.startswith(s)), None)
    return end if token is None else len(text) - len(rest) + len(token)


def shared_length(a: S, b: S) -> int:
    """Return the number of equal tokens or characters at the beginning of both, by bisection."""
    same, end = 0, min(len(a), len(b))
    while same < end:
        middle = (same + end + 1) // 2
        same, end = (middle, end) if a[:middle] == b[:middle] else (same, middle - 1)
    return same
