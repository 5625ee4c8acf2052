"""The settings of `pyunlearn.attack`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyunlearn.data.config import SHOW_TEXT_OPTION, TEMPLATE_OPTION, TRUNCATE_OPTION, TURNS_OPTION
from pyunlearn.models.config import WORKSPACE_OPTION
from pyunlearn.options import Choice, Config, Number, Several, Whole, option

NAMES = (
    "prefix",
    "quantization",
    "relearning",
    "relearning-retain",
    "relearning-unrelated",
    "instruction",
    "rendering",
    "paraphrase",
    "recitation",
    "sampling",
    "merging",
    "adapter",
    "layers",
)
"""Every attack; what each does is in `attacks.registry`."""

BY_DEFAULT = ("prefix", "quantization", "relearning", "relearning-retain", "adapter")
"""The attacks that need no generated text; those that a model or the texts do not allow are left out."""

QUICK = ("quantization", "relearning", "relearning-retain", "adapter")
"""Those of them that have a quick form, which takes less time: the one that `default` tries."""

DEFAULT = ("default",)

_WORDS = ("default", "all", *NAMES)

GATE_OPTION: dict[str, Any] = {
    "default": None,
    "kind": Several(Choice(_WORDS)),
    "help": "Attacks which a text has to withstand as well, see `pyunlearn attack`: default, all, or some of their "
    "names. Default: none.",
    "group": "Method",
}
"""The option `attacks` of functions that measure more than attacks."""


@dataclass(frozen=True, kw_only=True)
class AttackConfig(Config):
    """The settings of `pyunlearn.attack`.

    >>> AttackConfig(attacks=["all"]).chosen == NAMES, AttackConfig(attacks=["default", "layers"]).chosen[-1]
    (True, 'layers')
    >>> config = AttackConfig(attacks=["default", "relearning"])
    >>> config.is_quick("quantization"), config.is_quick("relearning")
    (True, False)
    """

    attacks: tuple[str, ...] = option(
        DEFAULT,
        Several(Choice(_WORDS)),
        "prefix (the text's rest after its first eighth, quarter, half), quantization (weights rounded to 8 and 4 "
        "bits), relearning (fine-tuning on the other forget texts), relearning-retain and relearning-unrelated "
        "(fine-tuning on other text), instruction (recited word for word on request, and after retained neighbours), "
        "rendering (records with a prompt in the other forms of template), paraphrase (the same in other words), "
        "recitation (greedy continuations), sampling (continuations at temperature 1), merging (with the original), "
        "adapter (the model without it), layers (what inner layers predict), all, or default: prefix, quantization, "
        "relearning, relearning-retain and adapter in a quick form "
        "(4 bits, fewer steps, fewer non-members).",
        group="Method",
    )
    texts: int = option(
        200,
        Whole(1),
        "Attack at most this many of the forget texts, drawn at random; the others are untested.",
        group="Method",
    )
    relearning_steps: int | None = option(
        None,
        Whole(1),
        "Optimizer steps of relearning on forget texts. Default: 20, and 5 in the quick form.",
        group="Method",
    )
    retain_steps: int | None = option(
        None,
        Whole(1),
        "Optimizer steps of relearning on retain texts and on unrelated text. Default: 20, and 5 in the quick form.",
        group="Method",
    )
    relearning_rate: float | None = option(
        None,
        Number(above=0),
        "Learning rate of relearning (AdamW). Default: of six from 1e-5 to 3e-3 the one at which half of a sample of "
        "the text that is trained on is likeliest after five steps on the other half; in the quick form half of the "
        "one that is best for the first step.",
        group="Method",
    )
    relearning_lora: int | None = option(
        None,
        Whole(1),
        "Relearn in a temporary LoRA adapter of this rank, for less memory. Default: in all weights, or where these "
        "are quantized in an adapter of rank 8.",
        group="Method",
    )
    folds: int = option(
        2,
        Whole(2),
        "Parts of the forget set, and of as many non-members, in relearning: each is tested after relearning on the "
        "others.",
        group="Method",
    )
    samples: int = option(8, Whole(1), "Continuations of each text in sampling.", group="Method")
    false_discovery_rate: float = option(
        0.05,
        Number(above=0, below=1),
        "Expected share of unseen texts among those that are named as coming back, over the whole forget set "
        "(Benjamini-Hochberg); a model that never saw the texts fails at most this often.",
        group="Method",
    )
    batch_size: int = option(
        8,
        Whole(1),
        "Texts in one step of relearning; a step on the forget set's other parts has twice as many but in the quick "
        "form, and four times as many are scored at once.",
    )
    template: str | Path = option(**TEMPLATE_OPTION)
    turns: str | None = option(**TURNS_OPTION)
    truncate: bool = option(**TRUNCATE_OPTION)
    workspace: int | None = option(**WORKSPACE_OPTION)
    show_text: bool = option(**SHOW_TEXT_OPTION)
    seed: int = option(0, Whole(0), "Seed of what is drawn: the same seed gives the same attack.")

    @property
    def chosen(self) -> tuple[str, ...]:
        """The attacks to try, in the order of NAMES."""
        names = {*self.attacks, *(BY_DEFAULT if "default" in self.attacks else ())}
        return NAMES if "all" in names else tuple(name for name in NAMES if name in names)

    def is_quick(self, name: str) -> bool:
        """Return whether an attack is tried in its quick form: where it is tried by default, and not by its name."""
        return not {"all", name} & {*self.attacks}
