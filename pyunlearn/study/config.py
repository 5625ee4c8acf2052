"""The settings of a study, and its four presets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pyunlearn.data.config import SHOW_TEXT_OPTION
from pyunlearn.errors import ArgumentError, nearest
from pyunlearn.options import Choice, Config, Number, Several, Text, Whole, option, read_settings

KINDS = ("id", "mismatched", "canary", "random")
SETUPS = ("translation", "qa", "text")
SIZES = {"tiny": (128, 256, 2, 4), "small": (256, 1024, 4, 4), "base": (512, 2048, 6, 8)}
"""Name -> hidden size, feed-forward size, layers (of encoder and decoder each), attention heads."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig(Config):
    """The settings of `pyunlearn.study.run_study`. The same settings, corpus and machine give the same numbers.

    >>> StudyConfig.of(None, {"preset": "cpu", "steps": 60}, "run_study").non_members
    199
    """

    preset: str = option(
        "smoke",
        Choice(("smoke", "cpu", "gpu", "paper")),
        "The settings to start from: smoke (one or two minutes on a CPU), cpu (half an hour on two cores), gpu (one "
        "GPU), paper (a day or more on one GPU).",
    )
    setup: str = option(
        "translation",
        Choice(SETUPS),
        "The task: translation (encoder-decoder from scratch), qa (a causal checkpoint, fine-tuned) or text (causal "
        "from scratch).",
        group="Model",
    )
    size: str = option(
        "tiny",
        Choice(tuple(SIZES)),
        "Size of a model that is trained from scratch: tiny, small or base.",
        group="Model",
    )
    checkpoint: str | None = option(
        None,
        Text("the folder or name of a model"),
        "The model that setup qa fine-tunes: a folder, or a name on the Hugging Face hub.",
        group="Model",
    )
    corpus_size: int = option(
        1200, Whole(1), "Examples in the built-in corpus, where no other corpus is given.", group="Data"
    )
    vocabulary: int = option(
        400, Whole(1), "Tokens of the tokenizer that is trained on the corpus (not in setup qa).", group="Data"
    )
    max_tokens: int = option(48, Whole(1), "Longer prompts and completions are cut to this many tokens.", group="Data")
    test_examples: int = option(100, Whole(1), "Held-out examples on which utility is measured.", group="Data")
    bleu_examples: int = option(50, Whole(1), "Test examples that are translated for BLEU.", group="Data")
    kinds: tuple[str, ...] = option(
        KINDS,
        Several(Choice(KINDS)),
        "Kinds of forget set: id (in distribution: ordinary examples), mismatched (fluent completions of another "
        "prompt), canary (a template, then random tokens), random (random tokens alone). id and at least one other.",
        group="Data",
    )
    repetitions: tuple[int, ...] = option(
        (1, 3, 10),
        Several(Whole(1)),
        "Times that each forget example is seen per epoch, a forget set of each kind for each.",
        group="Data",
    )
    examples: int = option(12, Whole(4), "Examples in one forget set.", group="Data")
    non_members: int = option(
        99,
        Whole(19),
        "Examples of each kind that are never trained on: exposure is measured up to log2(non_members + 1) bits.",
        group="Data",
    )
    draws: int = option(
        1, Whole(1), "Independent forget sets of every kind, each draw with a model of its own.", group="Data"
    )
    subset_models: int = option(
        4,
        Whole(2),
        "Models trained on random halves of all forget sets, for memorization, difficulty and calibrated scores.",
        group="Model",
    )
    shared_epochs: int = option(
        10,
        Whole(0),
        "Epochs without any forget set that all models share; 0: each model is trained from the beginning.",
        group="Model",
    )
    epochs: int = option(3, Whole(1), "Epochs with the forget sets.", group="Model")
    background: int | None = option(
        300,
        Whole(1),
        "Ordinary examples in each of these epochs, drawn again for each. None: all.",
        group="Model",
        optional=True,
    )
    batch_size: int = option(32, Whole(1), "Examples in one training step.", group="Model")
    learning_rate: float = option(2e-3, Number(0, below=1), "Learning rate of the training.", group="Model")
    warmup: int = option(50, Whole(0), "Training steps over which the learning rate rises.", group="Model")
    dropout: float = option(0.1, Number(0, below=1), "Dropout of a model trained from scratch.", group="Model")
    weight_decay: float = option(0.01, Number(0), "Weight decay of the training.", group="Model")
    method: str = option(
        "ga",
        Text('the name of a method, such as "ga"'),
        "The unlearning method: one that reads the forget text alone.",
        group="Method",
    )
    unlearning_rates: tuple[float, ...] = option(
        (1e-3,),
        Several(Number(above=0, below=1)),
        "Learning rates of the unlearning, a run of every forget set for each.",
    )
    steps: int = option(10, Whole(1), "Unlearning steps of one run.")
    every: int = option(1, Whole(1), "Steps between two measurements.")
    bleu_every: int = option(5, Whole(1), "Measurements between two of BLEU.")
    unlearning_batch: int = option(12, Whole(1), "Forget examples in one unlearning step.")
    budget: float = option(0.1, Number(0), "Rise of the test NLL, nats per token, at which trade-offs are compared.")
    seed: int = option(0, Whole(0), "Seed of corpus, forget sets, weights and order: the same seed, the same study.")
    show_text: bool = option(**SHOW_TEXT_OPTION)

    def check(self) -> None:
        """Raise ArgumentError where two settings exclude each other."""
        if "id" not in self.kinds or len(self.kinds) < 2:
            raise ArgumentError(
                f'kinds must hold "id" and at least one other to compare it with, got {", ".join(self.kinds)}'
            )
        if self.bleu_examples > self.test_examples:
            raise ArgumentError(
                f"bleu_examples must be at most test_examples, {self.test_examples}, got {self.bleu_examples}"
            )
        if (self.setup == "qa") != (self.checkpoint is not None):
            raise ArgumentError(
                f"setup qa, and only it, fine-tunes a checkpoint: got setup {self.setup!r} and checkpoint "
                f"{self.checkpoint!r}; give both or neither"
            )

    @classmethod
    def of(  # type: ignore[override]
        cls, config: Config | str | Path | None, settings: Mapping[str, Any], function: str
    ) -> StudyConfig:
        """Make the configuration of a call of `function`: `config`, a file or a preset, changed by keywords.

        Raises ArgumentError for a keyword that is no setting, and for a value that cannot be.
        """
        known = cls.options()
        for name in settings:
            if name not in known:
                raise ArgumentError(f"{function} has no option {name!r}: {nearest(name, known)}")
        if isinstance(config, (str, Path)):
            settings, config = read_settings(config, known) | dict(settings), None
        if config is None:
            preset = known["preset"].checked("preset", settings.get("preset", "smoke"), "smoke")
            return replace(PRESETS[preset], **settings)
        if not isinstance(config, cls):
            raise ArgumentError(f"config must be a {cls.__name__} or a path, got {type(config).__name__}")
        if "preset" in settings:
            raise ArgumentError("preset and config both say where to start: give one of them")
        return replace(config, **settings)

    @classmethod
    def read(cls, path: str | Path) -> StudyConfig:  # type: ignore[override]
        """Read a TOML file, or the config.json of a study; settings that it lacks are those of its preset.

        Raises DataError where there is no such file or it holds something else; ArgumentError for a wrong setting.
        """
        return cls.of(path, {}, "the settings file")


PRESETS = {
    "smoke": StudyConfig(),
    "cpu": StudyConfig(
        preset="cpu",
        vocabulary=2000,
        test_examples=100,
        bleu_examples=60,
        examples=24,
        non_members=199,
        draws=3,
        subset_models=4,
        shared_epochs=4,
        background=2000,
        batch_size=64,
        learning_rate=1.5e-3,
        warmup=200,
        unlearning_rates=(3e-4, 1e-4),
        steps=30,
        every=2,
        bleu_every=5,
        unlearning_batch=24,
    ),
    "gpu": StudyConfig(
        preset="gpu",
        size="small",
        vocabulary=8000,
        test_examples=500,
        bleu_examples=300,
        examples=64,
        non_members=499,
        draws=3,
        subset_models=8,
        shared_epochs=20,
        epochs=5,
        background=10000,
        batch_size=256,
        learning_rate=1e-3,
        warmup=400,
        dropout=0.3,
        unlearning_rates=(3e-5, 1e-4),
        steps=100,
        every=4,
        bleu_every=5,
        unlearning_batch=64,
    ),
    "paper": StudyConfig(
        preset="paper",
        size="base",
        vocabulary=16000,
        max_tokens=96,
        test_examples=1000,
        bleu_examples=1000,
        examples=200,
        non_members=999,
        draws=5,
        subset_models=16,
        shared_epochs=0,
        epochs=30,
        background=None,
        batch_size=256,
        learning_rate=7e-4,
        warmup=1000,
        dropout=0.3,
        unlearning_rates=(1e-5, 3e-5, 1e-4),
        steps=200,
        every=2,
        bleu_every=5,
        unlearning_batch=64,
    ),
}
"""Name -> settings, from seconds on a CPU to days on a GPU."""


def parsed(changes: Sequence[str]) -> dict[str, Any]:
    """Read NAME=VALUE words of the command line: the value is JSON, or else a string.

    >>> parsed(["steps=7", "size=base"])
    {'steps': 7, 'size': 'base'}

    Raises ArgumentError without "=".
    """
    settings = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise ArgumentError(f"--set takes NAME=VALUE, got {change!r}")
        try:
            settings[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            settings[name.strip()] = value
    return settings
