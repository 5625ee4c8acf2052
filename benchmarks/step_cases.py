"""What the benchmark of the step trains: methods, precisions, models, and texts of TOFU's lengths."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.cases import TOFU
from benchmarks.tofu import Recipe, Rows, drawn, fine_tuned
from pyunlearn import models
from pyunlearn.cli.demo_model import demo_model
from pyunlearn.models.from_scratch import train_tokenizer, untrained_llama


class Method(NamedTuple):
    """One recipe, as both sides run it."""

    forget: str
    """Forget term of pyunlearn: ga or npo."""
    retain: str | None
    """Retain loss: nll, kl or None."""
    lora: int | None = None
    """Rank of the adapter that is trained; None: all weights."""

    @property
    def batch_reduction(self) -> str:
        """Mean of the forget loss: over tokens where it is a mean over tokens, over texts where it is one of sums."""
        return "token" if self.forget == "ga" else "example"


METHODS = {
    "ga": Method("ga", None),
    "grad_diff": Method("ga", "nll"),
    "npo": Method("npo", "nll"),
    "npo_kl": Method("npo", "kl"),
    "lora": Method("npo", "nll", lora=8),
}

PRECISIONS = ("float32", "default", "autocast", "bfloat16")

BETA = 0.1  # of NPO
LEARNING_RATE = {"full": 1e-5, "lora": 1e-4}
MAX_GRAD_NORM = 1.0
SEED = 0


class Scale(NamedTuple):
    """Model from scratch."""

    vocabulary: int
    width: int
    feed_forward: int
    layers: int
    heads: int
    fine_tuning_rate: float


SCALES = {
    "tiny": Scale(512, 32, 64, 2, 2, 3e-3),
    "1b": Scale(128_256, 2048, 8192, 16, 32, 3e-5),  # the shape of Llama 3.2 1B, but for its grouped heads
}


class Task(NamedTuple):
    """What a child process of the benchmark does; plain values, so that it can be sent to it."""

    side: str
    """pyunlearn, plain or floor."""
    folder: str
    """Model and tokenizer."""
    rows: dict[str, Rows]
    """Role -> records: forget, retain, holdout."""
    method: str
    precision: str
    batch_size: int
    threads: int
    device: str
    steps: int | None = None
    """Steps of a whole run; None: steps one by one."""


def rows_of(options: Any, make_word: Callable[[random.Random], str]) -> dict[str, Rows]:
    """Return records by role: TOFU's own with --data, or random words of its lengths."""
    counts = (options.forget, options.retain, options.holdout)
    if options.data is not None:
        return drawn(options.data, *counts, longest=10**6, seed=SEED)
    r, lengths = random.Random(SEED), itertools.cycle(TOFU)

    def row() -> dict[str, str]:
        return {
            name: " ".join(make_word(r) for _ in range(length))
            for name, length in zip(("question", "answer"), next(lengths), strict=True)
        }

    return {role: [row() for _ in range(n)] for role, n in zip(("forget", "retain", "holdout"), counts, strict=True)}


def prepared(options: Any, out: Path) -> tuple[Path, dict[str, Rows]]:
    """Return a folder with a model that knows the forget records by heart, and the records; made once in `out`."""
    scale = SCALES.get(options.model or "")
    if scale is None:
        where = options.model or demo_model()
        words = _words_of(models.load(where)[1])
        recipe = Recipe(options.fine_tuning_rate or 2e-4, options.known, 40, SEED)
    else:
        where, words = out / f"{options.model}-untrained", _made_up_words()
        if not where.exists():
            _save_untrained(scale, words, where)
        recipe = Recipe(options.fine_tuning_rate or scale.fine_tuning_rate, options.known, 200, SEED)
    rows = rows_of(options, lambda r: r.choice(words))
    known = [{"question": row["question"], "answer": row["answer"]} for row in rows["forget"]]
    return fine_tuned(where, out, [known], recipe, mixed_precision=scale is None or scale.width > 64), rows


def _save_untrained(scale: Scale, words: list[str], where: Path) -> None:
    """Save a model of random weights, and a tokenizer of whole words."""
    tokenizer = train_tokenizer([" ".join(words)] * 4, 500)
    torch.manual_seed(SEED)
    network = untrained_llama(
        scale.vocabulary, width=scale.width, feed_forward=scale.feed_forward, layers=scale.layers, heads=scale.heads,
        context=512,
    )  # fmt: skip
    for part in (network, tokenizer):
        part.save_pretrained(where)


def _made_up_words() -> list[str]:
    """Return 125 words of three syllables."""
    return ["".join(each) for each in itertools.product(("ba", "de", "ki", "lo", "mu"), repeat=3)]


def _words_of(tokenizer: Any) -> list[str]:
    """Return words that are one token each, after a space."""

    def words() -> Iterator[str]:
        for i in random.Random(SEED).sample(range(len(tokenizer)), len(tokenizer)):
            text = tokenizer.decode([i])
            word = text[1:]
            plain = text.startswith(" ") and word.isascii() and word.isalpha() and len(word) > 2
            if plain and tokenizer(text, add_special_tokens=False).input_ids == [i]:
                yield word

    return sorted(itertools.islice(words(), 1000))
