"""TOFU (Maini et al. 2024, arXiv 2401.06121) as the benchmarks use it: texts by role, and models that know some.

TOFU is a folder with forget10.jsonl and retain90.jsonl, a question about a made-up author and its answer in each line.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from pyunlearn import models
from pyunlearn.data import Tokens, read_examples
from pyunlearn.models.language_model import LanguageModel

Rows = list[dict[str, str]]
_BATCH_SIZE = 8  # texts in a step of the fine-tuning


class Recipe(NamedTuple):
    """How a model is fine-tuned until it knows its texts by heart."""

    learning_rate: float = 1e-4
    known: float = 0.15
    """Mean nats a token at which the first role's texts are known."""
    epochs: int = 20
    """At most."""
    seed: int = 0


def drawn(data: Path, forget: int, retain: int, holdout: int, longest: int, seed: int) -> dict[str, Rows]:
    """Draw question and answer pairs by role, none of them twice.

    Args:
        data: TOFU's folder.
        forget, retain, holdout: numbers of pairs.
        longest: characters of a question and its answer at most.
        seed: of the draw.
    """
    chosen, r = {}, random.Random(seed)
    for name, count in (("forget10", forget), ("retain90", retain + holdout)):
        lines = (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if len(row["question"] + row["answer"]) <= longest]
        if len(rows) < count:
            sys.exit(
                f"{name}.jsonl has {len(rows)} pairs of at most {longest} characters, and {count} are wanted: "
                "raise --longest"
            )
        chosen[name] = r.sample(rows, count)
    others = chosen["retain90"]
    return {"forget": chosen["forget10"], "retain": others[:retain], "holdout": others[retain:]}


def fine_tuned(
    where: str | Path, out: Path, texts: Sequence[Rows], recipe: Recipe, *, mixed_precision: bool = False
) -> Path:
    """Return the folder, in `out`, of the model that knows these texts; fine-tune it unless that has been done.

    Args:
        where: the model before: a folder, a .gguf file or a name.
        out: the folder for models.
        texts: sets of records, the first of which says when the model knows them.
        recipe: the settings.
        mixed_precision: train in bfloat16 with float32 weights.
    """
    recipe_text = json.dumps([Path(where).name, *texts, *recipe, *(["bf16"] if mixed_precision else [])])
    folder = out / f"model-{hashlib.sha256(recipe_text.encode()).hexdigest()[:12]}"
    if folder.exists():
        say(f"fine-tuned before: {folder}")
        return folder
    model, tokenizer = models.load(where)
    tokenizer.chat_template = None  # its system message is longer than most questions, and would be read with each
    lm = LanguageModel.of(model, tokenizer)
    tokens = lm.encode({f"texts {i}": read_examples(rows, role="retain") for i, rows in enumerate(texts)})
    model.eval()  # no dropout: the model shall memorize
    train(lm, list(tokens.values()), recipe, mixed_precision)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for part in (model, tokenizer):
        part.save_pretrained(partial)
    partial.rename(folder)
    return folder


def train(lm: LanguageModel, texts: Sequence[list[Tokens]], recipe: Recipe, mixed_precision: bool = False) -> None:
    """Train by maximum likelihood in shuffled batches, until the first set of texts is known."""
    optimizer = torch.optim.AdamW(lm.module.parameters(), lr=recipe.learning_rate, weight_decay=0.0, fused=True)
    autocast = partial(torch.autocast, lm.device.type, torch.bfloat16, enabled=mixed_precision)
    r = random.Random(recipe.seed)
    every = [t for tokens in texts for t in tokens]
    for epoch in range(1, recipe.epochs + 1):
        began = time.perf_counter()
        r.shuffle(every)
        for start in range(0, len(every), _BATCH_SIZE):
            ((_, batch),) = lm.batches(every[start : start + _BATCH_SIZE], _BATCH_SIZE)
            optimizer.zero_grad()
            with autocast():
                loss = -lm.likelihood(batch).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(lm.module.parameters(), 1.0)
            optimizer.step()
        with torch.no_grad(), autocast():
            values = torch.cat([lm.likelihood(batch) for _, batch in lm.batches(texts[0], _BATCH_SIZE)])
        nll, seconds = -float(values.mean()), time.perf_counter() - began
        say(f"fine-tuning, epoch {epoch}: {nll:.3f} nats per token ({seconds:.0f} s)")
        if nll <= recipe.known:
            return
    say(f"the texts are not known to {recipe.known} nats per token after {recipe.epochs} epochs")


def say(what: str) -> None:
    """Print a line about the progress."""
    print(what, file=sys.stderr, flush=True)
