"""The teacher-forced audit against bare forward passes of the same texts: the overhead of the metrics.

400 questions with answers, about 60 tokens each, and 64 of the holdout, as in TOFU; every answer once more without its
prompt. Two models: a tiny one, where any overhead shows, and SmolLM2-135M. Bare: the model's own forward of the same
batches with all logits, as evaluation scripts run it. Scored rows: the same without the logits of prompts and padding.
On the CPU, seconds are CPU time of the process on all cores, which other load does not stretch; on a GPU, wall time.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import pyunlearn
from benchmarks.harness import environment, save
from pyunlearn import models
from pyunlearn.auditing import METRICS
from pyunlearn.data import TokenBatch, batches, encode, padding_id, read_examples
from pyunlearn.probes import without_prompt

_LIMIT = 1.3
_FAST = [name for name in METRICS if name != "continuations"]
_WORDS = [
    "the", "a", "of", "in", "and", "to", "her", "his", "their", "first", "book", "author", "novel", "award",
    "city", "family", "father", "mother", "story", "prize", "life", "work", "early", "later", "known", "born",
    "raised", "parents", "writer", "genre", "fiction", "poetry", "history", "culture", "style", "theme",
    "character", "debut", "career", "reader", "critic", "language", "letters", "journey", "memory",
]  # fmt: skip


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """Draw questions and answers of TOFU's lengths from common words: about 60 tokens."""
    r = random.Random(seed)
    return [
        {
            "question": " ".join(r.choices(_WORDS, k=16)).capitalize() + "?",
            "answer": " ".join(r.choices(_WORDS, k=38)).capitalize() + ".",
        }
        for _ in range(count)
    ]


def subjects() -> dict[str, Callable[[], tuple[Any, Any]]]:
    """Return the constructors of the models and their tokenizers, by name."""

    def tiny() -> tuple[Any, Any]:
        from transformers import LlamaConfig, LlamaForCausalLM

        from pyunlearn.cli.demo_model import demo_model

        tokenizer = models.load_tokenizer(demo_model())
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            tie_word_embeddings=True,
        )
        return LlamaForCausalLM(config).eval(), tokenizer

    def smollm2() -> tuple[Any, Any]:
        from pyunlearn.cli.demo_model import demo_model

        return models.load(demo_model())

    return {"tiny": tiny, "SmolLM2-135M": smollm2}


def run(options: argparse.Namespace) -> None:
    """Check that bare passes and audit agree, time both (goal: at most 1.3 times), print environment and table."""
    results: list[dict[str, Any]] = []
    for name, make in subjects().items():
        model, tokenizer = make()
        model = model.to(options.device).eval()
        small = name == "tiny"
        results.append(_case(name, model, tokenizer, 400, options.rounds or (7 if small else 3)))
    about = environment(options.device)
    table = Table(title=f"audit against bare forward passes (goal: {_LIMIT} times at most)", title_justify="left")
    for column in (
        "model",
        "texts",
        "tokens",
        "bare s",
        "scored rows s",
        "audit s",
        "x bare (median of pairs)",
        "spread",
        "x scored rows",
    ):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in results:
        table.add_row(
            row["model"], str(row["texts"]), str(row["tokens"]), f"{row['bare_s']:.2f}", f"{row['scored_rows_s']:.2f}",
            f"{row['audit_s']:.2f}", f"{row['ratio']:.2f}", f"{min(row['ratios']):.2f} to {max(row['ratios']):.2f}",
            f"{row['times_scored_rows']:.2f}",
        )  # fmt: skip
    console = Console(width=140)
    console.print(about, highlight=False)
    console.print(table)
    if options.save:
        print(f"saved to {save('audit', {'benchmark': 'audit', 'environment': about, 'rows': results}, options.out)}")


def _case(name: str, model: Any, tokenizer: Any, count: int, rounds: int) -> dict[str, Any]:
    forget, holdout = rows(count, 1), rows(64, 2)
    texts = encode(read_examples(forget + holdout, role="x"), tokenizer, role="x", max_length=None)
    every = texts + [without_prompt(t, tokenizer.bos_token_id or 0) for t in texts[:count]]
    ready = [batch.to(model.device) for _, batch in batches(every, 32, pad_id=padding_id(tokenizer))]

    def bare() -> float:
        return _bare(model, ready)

    def lean() -> float:
        return _lean(model, ready)

    def audit() -> float:
        audited = pyunlearn.audit(model, forget, holdout=holdout, tokenizer=tokenizer, metrics=_FAST, progress=False)
        return sum(e.now.log_likelihood * e.tokens for e in audited.examples)

    cuda = model.device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    audit()  # warm-up, and libraries loaded
    times: dict[str, list[float]] = {"bare": [], "scored rows": [], "audit": []}
    for _ in range(rounds):
        for which, call in (("bare", bare), ("scored rows", lean), ("audit", audit)):
            began = clock()
            call()
            if cuda:
                torch.cuda.synchronize()
            times[which].append(clock() - began)
    of_lean = statistics.median(a / b for a, b in zip(times["audit"], times["scored rows"], strict=True))
    ratios = [a / b for a, b in zip(times["audit"], times["bare"], strict=True)]
    return {
        "model": name, "texts": len(every), "tokens": sum(map(len, every)), "bare_s": statistics.median(times["bare"]),
        "audit_s": statistics.median(times["audit"]), "ratio": statistics.median(ratios), "ratios": ratios,
        "scored_rows_s": statistics.median(times["scored rows"]), "times_scored_rows": of_lean,
    }  # fmt: skip


@torch.no_grad()
def _bare(model: Any, ready: list[TokenBatch]) -> float:
    """Run every batch through the model's own forward."""
    for batch in ready:
        logits = model(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return float(logits[0, 0, 0])


@torch.no_grad()
def _lean(model: Any, ready: list[TokenBatch]) -> float:
    """Run every batch with logits of the scored rows alone: the minimum of any teacher-forced evaluation."""
    for batch in ready:
        hidden = model.base_model(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False)[0]
        logits = model.get_output_embeddings()(hidden.flatten(0, 1)[batch.rows])
    return float(logits[0, 0])
