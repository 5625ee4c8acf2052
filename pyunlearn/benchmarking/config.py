"""The settings of a benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyunlearn.attacks.config import GATE_OPTION
from pyunlearn.data.config import ChoiceOrFile
from pyunlearn.errors import ArgumentError
from pyunlearn.models.config import WORKSPACE_OPTION
from pyunlearn.options import Choice, Config, Whole, option

NAMES = ("tofu", "wmdp", "muse", "rwku")
"""The benchmarks, in the order of the help."""

SPLITS = ("forget01", "forget05", "forget10")
_OWN = {
    "split": ("tofu",),
    "wrong_answers": ("tofu",),
    "template": ("tofu",),
    "max_new_tokens": ("tofu",),
    "attacks": ("tofu", "muse"),
}
"""Settings that not every benchmark has, and those that do."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig(Config):
    """The settings of `pyunlearn.bench`.

    >>> BenchConfig(first=20).first
    20
    """

    split: str = option(
        "forget10", Choice(SPLITS), "TOFU: the forget set that the model was made to forget.", group="Data"
    )
    first: int | None = option(
        None,
        Whole(1),
        "Only the first N questions of each set: fewer take less time, and numbers of another N do not compare. "
        "Default: 300 of TOFU, as its own evaluation takes; all of the others.",
        group="Data",
    )
    template: str | Path = option(
        "default",
        ChoiceOrFile(("default", "chat", "plain", "none"), "the path of a Jinja chat template"),
        "TOFU: form in which the model reads the questions, the one it was fine-tuned with: chat, the tokenizer's chat "
        'template; plain, "Question: ..." and "Answer: ..." on two lines; none, the texts alone on their lines; a '
        "path, the Jinja chat template in that file; default, chat where the tokenizer has a chat template, and else "
        "plain.",
        group="Data",
    )
    wrong_answers: str = option(
        "geometric",
        Choice(("geometric", "arithmetic")),
        "TOFU: mean over the wrong answers in the truth ratios of the columns. TOFU's leaderboard script and "
        "open-unlearning take the geometric one, the formula of its paper the arithmetic one. Forget quality takes the "
        "geometric one in all of them.",
        group="Method",
    )
    attacks: tuple[str, ...] | None = option(
        **GATE_OPTION
        | {
            "help": "TOFU and MUSE: attacks on the model and on the retrained one in the same way, see `pyunlearn "
            "attack`, with a column of the forget texts that come back under each: default, all, or some of their "
            "names. Default: none."
        }
    )
    max_new_tokens: int = option(
        200, Whole(1), "TOFU: tokens that the model writes for an answer, at most.", group="Method"
    )
    batch_size: int = option(16, Whole(1), "Texts in one forward pass, and answers written together.", group="Model")
    workspace: int | None = option(**WORKSPACE_OPTION)
    seed: int = option(0, Whole(0), "Seed of the resampled intervals: the same seed gives the same ends.")

    def require_for(self, benchmark: str) -> None:
        """Raise ArgumentError for a setting that the benchmark does not have."""
        for name, owners in _OWN.items():
            if benchmark not in owners and getattr(self, name) != getattr(BenchConfig(), name):
                raise ArgumentError(
                    f"{name} is an option of {' and '.join(owners)}, and {benchmark} has none of that name: leave it "
                    "out"
                )
