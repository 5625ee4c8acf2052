"""What a study is made of, and the four sizes it comes in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from pyunlearn.errors import ArgumentError, nearest
from pyunlearn.methods import METHODS

KINDS = ("id", "mismatched", "canary", "random")
"""Forget sets: ordinary examples; fluent answers to another's prompt; template and random tokens; random tokens alone."""

SETUPS = ("translation", "qa", "text")
SIZES = {"tiny": (128, 256, 2, 4), "small": (256, 1024, 4, 4), "base": (512, 2048, 6, 8)}
"""Models trained from scratch: hidden size, feed-forward size, layers (of each side), attention heads."""


@dataclass(frozen=True)
class Config:
    """Every choice of a study. The same choices, corpus and machine give the same numbers."""

    preset: str = "smoke"
    setup: str = "translation"
    """translation: encoder-decoder from scratch; qa: a causal checkpoint, fine-tuned; text: causal from scratch."""
    size: str = "tiny"
    checkpoint: str | None = None
    """Of setup qa: the model to fine-tune, a folder or a name."""
    corpus_size: int = 1200
    """Examples of the built-in corpus, where no other is given."""
    vocabulary: int = 400
    max_tokens: int = 48
    """Longer prompts and completions are cut."""
    test_examples: int = 100
    """Held-out examples on which utility is measured."""
    bleu_examples: int = 50
    kinds: tuple[str, ...] = KINDS
    repetitions: tuple[int, ...] = (1, 3, 10)
    examples: int = 12
    """In one forget set."""
    references: int = 99
    """Of each kind, never trained on: exposure is measured up to log2(references + 1) bits."""
    draws: int = 1
    """Independent forget sets of every kind, each with a model of its own."""
    subset_models: int = 4
    """Models trained on random halves of all forget sets, for memorization, difficulty and calibrated scores."""
    shared_epochs: int = 10
    """Epochs without any forget set that all models share; 0: each model is trained from the beginning."""
    epochs: int = 3
    """Epochs with the forget sets."""
    background: int | None = 300
    """Ordinary examples in each of these, drawn anew; None: all."""
    batch_size: int = 32
    learning_rate: float = 2e-3
    warmup: int = 50
    dropout: float = 0.1
    weight_decay: float = 0.01
    method: str = "ga"
    unlearning_rates: tuple[float, ...] = (1e-3,)
    steps: int = 10
    """Unlearning steps of one run."""
    every: int = 1
    """Steps between two measurements."""
    bleu_every: int = 5
    """Measurements between two of BLEU."""
    unlearning_batch: int = 12
    budget: float = 0.1
    """Rise of the test NLL, nats a token, at which trade-offs are compared."""
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]


PRESETS = {
    "smoke": Config(),
    "cpu": Config(
        "cpu", vocabulary=2000, test_examples=100, bleu_examples=60, examples=24, references=199, draws=3, subset_models=4, shared_epochs=4,
        background=2000, batch_size=64, learning_rate=1.5e-3, warmup=200, unlearning_rates=(3e-4, 1e-4), steps=30, every=2, bleu_every=5,
        unlearning_batch=24,
    ),
    "gpu": Config(
        "gpu", size="small", vocabulary=8000, test_examples=500, bleu_examples=300, examples=64, references=499, draws=3, subset_models=8,
        shared_epochs=20, epochs=5, background=10000, batch_size=256, learning_rate=1e-3, warmup=400, dropout=0.3,
        unlearning_rates=(3e-5, 1e-4), steps=100, every=4, bleu_every=5, unlearning_batch=64,
    ),
    "paper": Config(
        "paper", size="base", vocabulary=16000, max_tokens=96, test_examples=1000, bleu_examples=1000, examples=200, references=999, draws=5,
        subset_models=16, shared_epochs=0, epochs=30, background=None, batch_size=256, learning_rate=7e-4, warmup=1000, dropout=0.3,
        unlearning_rates=(1e-5, 3e-5, 1e-4), steps=200, every=2, bleu_every=5, unlearning_batch=64,
    ),
}  # fmt: skip
"""smoke: seconds to two minutes on a CPU; cpu: half an hour on two cores; gpu: one card; paper: a day or more of one card."""


def configured(preset: str, changes: dict[str, Any]) -> Config:
    """The preset with some choices changed.

    Raises ArgumentError for a name that is none, and for a value that cannot be.
    """
    if preset not in PRESETS:
        raise ArgumentError(f"there is no preset {preset!r}; {nearest(preset, PRESETS)}")
    known = {f.name: f for f in fields(Config)}
    for name in changes:
        if name not in known or name == "preset":
            raise ArgumentError(
                f"a study has no setting {name!r}; {nearest(name, [n for n in known if n != 'preset'])}"
            )
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
    found = replace(PRESETS[preset], **given)
    _check(found)
    return found


def parsed(changes: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE, as the command line takes them: the value is JSON, or else a string. Raises ArgumentError without "="."""
    found = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise ArgumentError(f"--set takes NAME=VALUE, got {change!r}")
        try:
            found[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            found[name.strip()] = value
    return found


def _check(c: Config) -> None:
    for name, choices in (("setup", SETUPS), ("size", SIZES)):
        if getattr(c, name) not in choices:
            raise ArgumentError(f"{name} must be one of {', '.join(choices)}, got {getattr(c, name)!r}")
    for name, default in asdict(PRESETS["smoke"]).items():
        value, least = getattr(c, name), 0 if name in ("shared_epochs", "warmup", "seed") else 1
        if isinstance(default, tuple):
            if not isinstance(value, tuple) or not value or len(set(value)) < len(value):
                raise ArgumentError(f"{name} must be a list of different values, got {value!r}")
        elif isinstance(default, int) and not (name == "background" and value is None):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ArgumentError(f"{name} must be a whole number, {least} or more, got {value!r}")
        elif isinstance(default, float) and (not isinstance(value, (int, float)) or not 0 <= value < 1e3):
            raise ArgumentError(f"{name} must be a number, 0 or more, got {value!r}")
    if unknown := [k for k in c.kinds if k not in KINDS]:
        raise ArgumentError(f"kinds has no {unknown[0]!r}; {nearest(str(unknown[0]), KINDS)}")
    if "id" not in c.kinds or len(c.kinds) < 2:
        raise ArgumentError(f'kinds must hold "id" and at least one other to compare it with, got {", ".join(c.kinds)}')
    if any(not isinstance(r, int) or r < 1 for r in c.repetitions):
        raise ArgumentError(f"repetitions must be whole numbers, 1 or more, got {list(c.repetitions)}")
    if any(not isinstance(r, (int, float)) or not 0 < r < 1 for r in c.unlearning_rates):
        raise ArgumentError(f"unlearning_rates must lie between 0 and 1, got {list(c.unlearning_rates)}")
    if c.examples < 4 or c.references < 19 or c.subset_models < 2 or c.bleu_examples > c.test_examples:
        raise ArgumentError(
            "a study needs examples of 4 or more, references of 19 or more, subset_models of 2 or more, and bleu_examples of at most test_examples"
        )
    usable = [
        m.name
        for m in METHODS.values()
        if m.reads == ("forget",) and m.kind in ("example", "token") and set(m.needs) <= {"reference"}
    ]
    if c.method not in usable:
        raise ArgumentError(
            f"method must be one that reads the forget text alone ({', '.join(usable)}), got {c.method!r}"
        )
    if (c.setup == "qa") != (c.checkpoint is not None):
        raise ArgumentError(
            f"setup qa, and only it, fine-tunes a checkpoint: got setup {c.setup!r} and checkpoint {c.checkpoint!r}; give both or neither"
        )
