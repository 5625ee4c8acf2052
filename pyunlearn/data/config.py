"""Options on texts that several functions share: which turns are scored, in which form, and what is shown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyunlearn.options import Choice, Flag, Kind


@dataclass(frozen=True)
class ChoiceOrFile(Kind):
    """One of a few names, or the path of a file that exists, which `other` describes."""

    names: tuple[str, ...]
    other: str

    @property
    def wanted(self) -> str:
        return f"{', '.join(self.names)} or {self.other}"

    def accepts(self, value: Any) -> bool:
        if isinstance(value, str) and value in self.names:
            return True
        try:
            return isinstance(value, (str, Path)) and Path(value).expanduser().is_file()
        except (OSError, RuntimeError, ValueError):  # too long, no such home, a NUL
            return False


TURNS_OPTION: dict[str, Any] = {
    "default": None,
    "kind": Choice(("all", "assistant", "last")),
    "help": "What is scored of records with prompts: all, the prompts and earlier turns too; assistant, each turn of "
    "the assistant; last, the completion or last turn. Default: all of chat messages, and else the completion.",
    "group": "Data",
}
"""The option `turns`."""

TEMPLATE_OPTION: dict[str, Any] = {
    "default": "auto",
    "kind": ChoiceOrFile(("auto", "chat", "plain", "none"), "the path of a Jinja chat template"),
    "help": "Form in which the model reads questions with answers and chats: chat, the tokenizer's chat template; "
    'plain, "Question: ..." and "Answer: ..." on two lines; none, the texts alone on their lines; a path, the Jinja '
    "chat template in that file; auto, the form in which the answers of the forget set are likeliest, where a test "
    "favours it, and else chat, or none without a chat template. auto also tries forms for prompts with completions, "
    "which the others leave as they are.",
    "group": "Data",
}
"""The option `template`."""

TRUNCATE_OPTION: dict[str, Any] = {
    "default": False,
    "kind": Flag(),
    "help": "Cut texts that are longer than the model's context, instead of reading them in windows; a note says how "
    "many tokens are not looked at.",
    "group": "Data",
}
"""The option `truncate`."""

SHOW_TEXT_OPTION: dict[str, Any] = {
    "default": False,
    "kind": Flag(),
    "help": "Show the texts. Without it what is printed, logged and written masks them, so that it can be passed on.",
    "group": "Output",
}
"""The option `show_text`."""
