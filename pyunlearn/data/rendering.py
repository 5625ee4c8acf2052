"""Renderings: the form in which the model reads a record that has a prompt, as an Example that `encode` takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pyunlearn.data.examples import Example, Message, seam, spans_of_turns, wide_spans_of
from pyunlearn.errors import ArgumentError

__all__ = ["Rendering", "other_renderings", "rendering_of"]

_LABELS = {"plain": {"user": "Question: ", "assistant": "Answer:"}, "short": {"user": "Q: ", "assistant": "A:"}}
_NAMES = {
    "chat": "the tokenizer's chat template",
    "plain": '"Question: ... Answer: ..."',
    "short": '"Q: ... A: ..."',
    "none": "the texts alone on lines of their own",
    "joined": "prompt and answer as one text",
    "alone": "the answer alone",
}


@dataclass(frozen=True)
class Rendering:
    """One form of records with a prompt.

    >>> question = Example("Who?\\n", "He.", (Message("user", "Who?"), Message("assistant", "He.")))
    >>> Rendering("plain", "plain").of(question).prompt
    'Question: Who?\\nAnswer: '
    """

    key: str
    """chat, file, plain, short, none, joined or alone."""
    name: str
    """Description for notes and results."""
    chat_template: str | None = None
    """Jinja source in place of the tokenizer's chat template."""
    everything: bool = False
    """True where prompts with completions are rendered too, and not only questions with answers and chats."""

    def of(self, example: Example) -> Example:
        """Return the example in this form; one without a prompt is returned unchanged."""
        if not example.prompt or example.spans or not (example.messages or self.everything):
            return example
        turns = example.messages or (Message("user", example.prompt.strip()), Message("assistant", example.completion))
        if self.key in ("chat", "file"):
            return replace(example, messages=turns)
        if self.key == "alone":
            return replace(example, prompt="", messages=None, turns="last", spans=())
        if self.key == "none":
            spans = () if example.turns == "last" else wide_spans_of(example)
            return replace(example, messages=None, spans=spans)
        prompt, contents = self._prompt(example, turns)
        spans = () if example.turns == "last" else spans_of_turns(example.turns, turns, contents)
        return replace(example, prompt=prompt, messages=None, spans=spans)

    def _prompt(self, example: Example, turns: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """Return the text before the completion, and the ranges of characters of the turns' contents."""
        text = ""
        contents: list[tuple[int, int]] = []
        labels = _LABELS.get(self.key, {})
        for turn in turns[:-1]:
            if self.key == "joined":
                content = turn.content
                text += seam(text, content) if text and content else ""
            else:
                label = labels.get(turn.role, "").strip()
                content = turn.content.rstrip() if label else turn.content.strip()
                text += ("\n" if contents else "") + label + (" " if label and content else "")
            contents.append((len(text), len(text) + len(content)))
            text += content
        if self.key != "joined":
            text += "\n" + labels["assistant"]
        text += seam(text, example.completion) if text else ""
        return text, [*contents, (len(text), len(text) + len(example.completion))]


def rendering_of(template: str | Path, tokenizer: Any) -> Rendering:
    """Return the rendering that `template` stands for; of "auto", the one to compare others with.

    Args:
        template: auto, chat, plain, none, or the path of a Jinja chat template.
        tokenizer: of the model.

    Raises ArgumentError for chat where the tokenizer has no chat template; for a file that cannot be read.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if template == "auto":
        template = "chat" if has_template else "none"
    elif template == "chat" and not has_template:
        raise ArgumentError(
            "template='chat' is the tokenizer's chat template, and this tokenizer has none: choose plain or none, or "
            "give the path of a chat template"
        )
    if template in _NAMES:
        return Rendering(str(template), _NAMES[str(template)])
    return Rendering("file", f"the chat template {Path(template).name}", read_template(template))


def read_template(template: str | Path) -> str:
    """Return the text of a chat template's file.

    Raises ArgumentError where it cannot be read, is not UTF-8 or is empty.
    """
    path = Path(template).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        fault = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ArgumentError(f"template: the chat template {path} cannot be read: {fault}") from error
    if not text.strip():
        raise ArgumentError(f"template: the chat template {path} is empty: give one that writes the messages")
    return text


def other_renderings(tokenizer: Any) -> list[Rendering]:
    """Return the renderings that are compared with the records' own, which is among them, in order of preference."""
    keys = [key for key in _NAMES if key != "chat" or getattr(tokenizer, "chat_template", None)]
    return [Rendering(key, _NAMES[key], everything=True) for key in keys]
