"""The settings of a study, and its four presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pyunlearn.data.config import SHOW_TEXT_OPTION
from pyunlearn.errors import ArgumentError, nearest
from pyunlearn.options import Choice, Config, Number, Several, Text, Whole, option, read_settings

KINDS = ("id", "mismatched", "canary", "random")
OUTSIDE = "canary"
"""The kind that the claims compare with in-distribution sets."""
SETUPS = ("translation", "qa", "text", "twins")
SIZES = {"tiny": (128, 256, 2, 4), "small": (256, 1024, 4, 4), "base": (512, 2048, 6, 8)}
"""Name -> hidden size, feed-forward size, layers (of encoder and decoder each), attention heads."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig(Config):
    """The settings of `pyunlearn.study.run_study`. The same settings, corpus and machine give the same numbers.

    >>> StudyConfig.of(None, {"preset": "cpu", "steps": 60}, "run_study").seeds
    12
    """

    preset: str = option(
        "smoke",
        Choice(("smoke", "cpu", "gpu", "paper")),
        "The settings to start from: smoke (3 models, a minute of one core, decides nothing), cpu (12 models, two "
        "cores), gpu (16 models, one GPU) or paper (24 models, one GPU).",
    )
    setup: str = option(
        "translation",
        Choice(SETUPS),
        "The task: translation (encoder-decoder from scratch), qa (a causal checkpoint, fine-tuned), text (causal "
        "from scratch) or twins (nothing is trained: a causal checkpoint that saw the texts of the corpus, and a twin "
        "that did not).",
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
        "The model that setup qa fine-tunes, or of setup twins the one that saw the texts: a folder, or a name on the "
        "Hugging Face hub.",
        group="Model",
    )
    twin: str | None = option(
        None,
        Text("the folder or name of a model"),
        "Setup twins: the model of the same training without the texts of the corpus.",
        group="Model",
    )
    corpus_size: int = option(
        600, Whole(1), "Examples in the built-in corpus, where no other corpus is given.", group="Data"
    )
    vocabulary: int = option(
        400,
        Whole(1),
        "Tokens of the tokenizer that is trained on the corpus (setups translation and text).",
        group="Data",
    )
    max_tokens: int = option(48, Whole(1), "Longer prompts and completions are cut to this many tokens.", group="Data")
    test_examples: int = option(50, Whole(1), "Held-out examples on which utility is measured.", group="Data")
    kinds: tuple[str, ...] = option(
        ("id", "canary"),
        Several(Choice(KINDS)),
        "Kinds of forget set: id (in distribution: ordinary examples), canary (a template, then random tokens); also "
        "mismatched (fluent completions of another prompt), random (random tokens alone). id and canary are needed; in "
        "setup twins only id is needed, and kinds that the corpus lacks are left out.",
        group="Data",
    )
    doses: tuple[int, ...] = option(
        (1, 4, 16),
        Several(Whole(1)),
        "Times that a forget example is seen in the whole training, drawn at random for each example; at least two. In "
        "setup twins those of the corpus that are used.",
        group="Data",
    )
    examples: int = option(4, Whole(2), "Forget examples of each kind and dose, unlearned together.", group="Data")
    non_members: int = option(
        49,
        Whole(19),
        "Examples of each kind from the other seeds' forget sets (in setup twins of dose 0) that are scored during "
        "unlearning, at most: for exposure, which is shown and decides nothing.",
        group="Data",
    )
    seeds: int = option(
        3,
        Whole(3),
        "Models, each with its own initial weights, order of the data and forget sets; in setup twins draws of forget "
        "sets of the one checkpoint. Fewer than 6 decide nothing.",
        group="Model",
    )
    epochs: int = option(4, Whole(1), "Epochs of each training.", group="Model")
    batch_size: int = option(32, Whole(1), "Examples in one training step.", group="Model")
    learning_rate: float = option(2e-3, Number(0, below=1), "Learning rate of the training.", group="Model")
    warmup: int = option(20, Whole(0), "Training steps over which the learning rate rises.", group="Model")
    dropout: float = option(0.0, Number(0, below=1), "Dropout of a model trained from scratch.", group="Model")
    weight_decay: float = option(0.01, Number(0), "Weight decay of the training.", group="Model")
    method: str = option(
        "ga",
        Text('the name of a method, such as "ga"'),
        "The unlearning method: one that reads the forget text alone.",
        group="Method",
    )
    unlearning_rates: tuple[float, ...] = option(
        (3e-4,),
        Several(Number(above=0, below=1)),
        "Learning rates of the unlearning. The first decides; the others are shown as sensitivity.",
    )
    steps: int = option(16, Whole(4), "Unlearning steps of one run, each on all examples of the set.")
    processes: int = option(
        1, Whole(1), "Processes that work at the same time, each on seeds of its own; they share the cores."
    )
    seed: int = option(0, Whole(0), "Seed of everything that is drawn: the same seed, the same study.")
    show_text: bool = option(**SHOW_TEXT_OPTION)

    def check(self) -> None:
        """Raise ArgumentError where two settings exclude each other."""
        if "id" not in self.kinds or (self.setup != "twins" and OUTSIDE not in self.kinds):
            raise ArgumentError(
                f'kinds must hold "id" and "canary", which the claims compare (in setup twins "id"), got '
                f"{', '.join(self.kinds)}"
            )
        if len(self.doses) < 2:
            raise ArgumentError(
                f"doses must hold at least two, so that memorization can be told from them, got {list(self.doses)}"
            )
        if (self.setup == "twins") != (self.twin is not None):
            raise ArgumentError(
                f"setup twins, and only it, has a twin: got setup {self.setup!r} and twin {self.twin!r}; give both, "
                "with the checkpoint that saw the texts, or neither"
            )
        if (self.setup in ("qa", "twins")) != (self.checkpoint is not None):
            raise ArgumentError(
                f"setup qa, which fine-tunes a checkpoint, and setup twins need one, and only they: got setup "
                f"{self.setup!r} and checkpoint {self.checkpoint!r}; give both or neither"
            )
        if self.checkpoint is not None and self.twin is not None and Path(self.checkpoint) == Path(self.twin):
            raise ArgumentError(
                f"checkpoint and twin must be two models, one that saw the texts and one that did not, got "
                f"{self.checkpoint!r} for both: name the other one"
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
        corpus_size=28000,
        vocabulary=2000,
        test_examples=100,
        kinds=("id", "mismatched", "canary"),
        examples=12,
        seeds=12,
        epochs=2,
        batch_size=64,
        learning_rate=1.5e-3,
        warmup=100,
        unlearning_rates=(1e-4,),
        steps=64,
        processes=2,
    ),
    "gpu": StudyConfig(
        preset="gpu",
        size="small",
        corpus_size=28000,
        vocabulary=8000,
        test_examples=500,
        kinds=("id", "mismatched", "canary"),
        examples=64,
        non_members=199,
        seeds=16,
        epochs=14,
        batch_size=256,
        learning_rate=1e-3,
        warmup=400,
        dropout=0.3,
        unlearning_rates=(1e-4, 3e-5),
        steps=96,
    ),
    "paper": StudyConfig(
        preset="paper",
        size="base",
        corpus_size=200000,
        vocabulary=16000,
        max_tokens=96,
        test_examples=1000,
        kinds=KINDS,
        examples=200,
        non_members=499,
        seeds=24,
        epochs=30,
        batch_size=256,
        learning_rate=7e-4,
        warmup=1000,
        dropout=0.3,
        unlearning_rates=(1e-4, 3e-5, 1e-5),
        steps=192,
    ),
}
"""Name -> settings, from seconds on a CPU to days on a GPU."""
