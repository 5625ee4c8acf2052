"""The settings that every edit shares; each edit's own are the keywords of its function."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyunlearn.data.config import TEMPLATE_OPTION, TRUNCATE_OPTION, TURNS_OPTION
from pyunlearn.models.config import WORKSPACE_OPTION
from pyunlearn.options import Config, Whole, option


@dataclass(frozen=True, kw_only=True)
class EditConfig(Config):
    """The shared settings of the functions in `pyunlearn.edits`."""

    batch_size: int = option(8, Whole(1), "Texts in one forward pass.", group="Model")
    turns: str | None = option(**TURNS_OPTION)
    template: str | Path = option(**TEMPLATE_OPTION)
    truncate: bool = option(**TRUNCATE_OPTION)
    workspace: int | None = option(**WORKSPACE_OPTION)
    seed: int = option(0, Whole(0), "Seed of what is drawn: the same seed gives the same edit.", group="Method")
