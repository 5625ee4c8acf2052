"""Renderings: the form in which the model reads a record that has a prompt, as an Example that `encode` takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pyunlearn.data.examples import Example, Message, seam
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
    >>> Rendering("plain", "plain").of(question)
    Example(prompt='Question: Who?\\nAnswer: ', completion='He.', messages=None, winner=None)
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
        if not example.prompt or not (example.messages or self.everything):
            return example
        turns = example.messages or (Message("user", example.prompt.strip()), Message("assistant", example.completion))
        if self.key in ("chat", "file"):
            return replace(example, messages=turns)
        return replace(example, prompt=self._prompt(example, turns), messages=None)

    def _prompt(self, example: Example, turns: Sequence[Message]) -> str:
        if self.key == "none":
            return example.prompt
        if self.key == "alone":
            return ""
        contents = [turn.content for turn in turns]
        if self.key == "joined":
            text = ""
            for content in contents[:-1]:
                text += (seam(text, content) if text and content else "") + content
        else:
            labels = _LABELS[self.key]
            lines = [f"{labels.get(turn.role, '').strip()} {turn.content}".strip() for turn in turns[:-1]]
            text = "\n".join([*lines, labels["assistant"]])
        return text + (seam(text, example.completion) if text else "")


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
