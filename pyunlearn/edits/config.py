"""The settings that every edit shares; each edit's own are the keywords of its function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyunlearn.options import Choice, Config, Flag, Whole, option

TURNS: dict[str, Any] = {
    "default": None,
    "kind": Choice(("all", "assistant", "last")),
    "help": "What is scored of records with prompts: all, the prompts and earlier turns too; assistant, each turn of "
    "the assistant; last, the completion or last turn. Default: all of chat messages, and else the completion.",
    "group": "Data",
}
"""The option `turns`, which several functions share."""


@dataclass(frozen=True, kw_only=True)
class EditConfig(Config):
    """The shared settings of the functions in `pyunlearn.edits`."""

    batch_size: int = option(8, Whole(1), "Texts in one forward pass.", group="Model")
    turns: str | None = option(**TURNS)
    truncate: bool = option(
        False,
        Flag(),
        "Cut texts that are longer than the model's context, instead of reading them in windows; a note says how many "
        "tokens are not looked at.",
        group="Data",
    )
    workspace: int | None = option(
        None,
        Whole(0),
        "Bytes for cached logits: more memory for less time, with the same result. Default: chosen from what is free.",
        group="Model",
    )
    seed: int = option(0, Whole(0), "Seed of what is drawn: the same seed gives the same edit.", group="Method")
