"""TOFU's forget10 with the defaults and with the recipes that open-unlearning publishes: one start, TOFU's own columns.

    python -m benchmarks.forget10 --data TOFU --out OUT

SmolLM2-135M is fine-tuned on forget10 and the 400 records of retain_perturbed until it knows forget10, and a second
time on the 400 retain records alone (the retrained model). Then the defaults of `pyunlearn.unlearn` forget all 400
records, with the 400 retain records and a holdout that no model saw; and the two recipes do: GradDiff and NPO, each
with the retain texts' negative log-likelihood, AdamW at 1e-5, weight decay 0.01, batches of 32, ten epochs of the
forget set, the first of which warms up (configs/experiment/unlearn/tofu and configs/trainer of open-unlearning, commit
d3d7cf9). All three run in mixed bfloat16 with float32 weights. Models and results are saved in OUT: the same command
resumes after an interruption.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

import pyunlearn
from benchmarks.tofu import Recipe, Rows, fine_tuned, say
from pyunlearn import metrics, models
from pyunlearn.cli.demo_model import demo_model
from pyunlearn.data import read_examples
from pyunlearn.models.language_model import LanguageModel

BATCH = 32
MICRO_BATCH = 8
BETA = 0.1  # of NPO
RECIPES = ("GradDiff", "NPO")


def main(arguments: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Parse the options, train, unlearn, measure and print the table."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    Accelerator(mixed_precision="bf16")  # of the defaults' run, which takes the one that there is
    texts = texts_of(options)
    recipe = Recipe(options.fine_tuning_rate, options.known, options.epochs, options.seed)
    where = options.model or demo_model()
    start = fine_tuned(where, options.out, [texts["forget"], texts["retain"]], recipe, mixed_precision=True)
    retrained = fine_tuned(where, options.out, [texts["retain"]], recipe, mixed_precision=True)
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "start": partial(_measured, start, options),
        "retrained": partial(_measured, retrained, options),
        "pyunlearn, defaults": partial(_by_defaults, start, texts, options),
    }
    runs |= {f"{name}, recipe": partial(_by_recipe, start, texts, name, options) for name in RECIPES}
    results: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        path = options.out / f"{name.replace(', ', '-')}.json"
        if not path.exists():
            say(f"measuring {name}")
            path.write_text(json.dumps(run(), indent=1) + "\n")
        results[name] = json.loads(path.read_text())
        if "retrained" in results:
            print(table(results), flush=True)
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="TOFU's folder, with the files *_perturbed.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--model", default=None, help="another model than SmolLM2-135M: a folder or a name")
    for name, number, what in (
        ("records", 400, "records to forget, and as many to retain"),
        ("holdout", 100, "records that no model saw"),
        ("epochs", 20, "epochs of fine-tuning at most"),
        ("recipe-epochs", 10, "epochs of a recipe"),
        ("seed", 0, "seed of every draw"),
        ("threads", 0, "threads of torch, 0 for its own choice"),
    ):
        parser.add_argument(f"--{name}", type=int, default=number, help=f"{what} (default {number})")
    for name, amount, what in (
        ("fine-tuning-rate", 1e-4, "learning rate of the fine-tuning"),
        ("known", 0.1, "mean nats a token at which the answers are known"),
    ):
        parser.add_argument(f"--{name}", type=float, default=amount, help=f"{what} (default {amount})")
    return parser


def texts_of(options: argparse.Namespace) -> dict[str, Rows]:
    """Return the question and answer pairs by role; the holdout is of the retain set's file, and no part of it."""
    rows = {
        name: [json.loads(line) for line in (options.data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("forget10", "retain_perturbed", "retain90")
    }
    pairs = {name: [{"question": r["question"], "answer": r["answer"]} for r in lines] for name, lines in rows.items()}
    known = {row["question"] for row in pairs["retain_perturbed"]}
    others = [row for row in pairs["retain90"] if row["question"] not in known]
    return {
        "forget": pairs["forget10"][: options.records],
        "retain": pairs["retain_perturbed"][: options.records],
        "holdout": random.Random(options.seed).sample(others, options.holdout),
    }


def _by_defaults(start: Path, texts: dict[str, Rows], options: argparse.Namespace) -> dict[str, Any]:
    """Run pyunlearn.unlearn with nothing but the texts; a run that was interrupted resumes from its checkpoint."""
    began = time.perf_counter()
    out = options.out / "unlearned"
    result = pyunlearn.unlearn(
        str(start),
        texts["forget"],
        retain=texts["retain"],
        holdout=texts["holdout"],
        output_dir=out,
        resume=out.with_name("unlearned.checkpoint.pt").exists(),
        progress=True,
        seed=options.seed,
    )
    verdicts = [e.verdict for e in result.examples]
    return {
        "stopped": result.stopped,
        "steps": len(result.history),
        "utility_rise": result.utility.relative_rise,
        "holdout_rise": result.utility.holdout_rise,
        "seconds": round(time.perf_counter() - began),
        "verdicts": {each: verdicts.count(each) for each in sorted(set(verdicts))},
    } | _measures(LanguageModel.of(result.model, result.tokenizer), options)


def _by_recipe(start: Path, texts: dict[str, Rows], name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run a recipe from the fine-tuned model, save the model, and measure it."""
    folder, seconds = options.out / f"model-{name}", 0.0
    if not folder.exists():
        began = time.perf_counter()
        lm = _loaded(start)
        steps = follow(lm, texts, name, options.recipe_epochs, options.seed)
        seconds = time.perf_counter() - began
        partly = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partly, ignore_errors=True)
        for part in (lm.module, lm.tokenizer):
            part.save_pretrained(partly)
        (partly / "run.json").write_text(json.dumps({"seconds": round(seconds), "steps": steps}))
        partly.rename(folder)
    return json.loads((folder / "run.json").read_text()) | _measures(_loaded(folder), options)


def follow(lm: LanguageModel, texts: dict[str, Rows], name: str, epochs: int, seed: int) -> int:
    """Train by a recipe in place, and return the number of its steps; each forget text has a retain text drawn."""
    lm.module.eval()
    tokens = lm.encode({role: read_examples(texts[role], role=role) for role in ("forget", "retain")})
    forget, retain, r = tokens["forget"], tokens["retain"], random.Random(seed)
    per_epoch = -(-len(forget) // BATCH)
    steps = epochs * per_epoch
    optimizer = torch.optim.AdamW(lm.module.parameters(), lr=1e-5, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / per_epoch, (steps - s) / max(1, steps - per_epoch))
    )
    before = _sums(lm, forget) if name == "NPO" else None
    for epoch in range(epochs):
        order = r.sample(range(len(forget)), len(forget))
        for first in range(0, len(order), BATCH):
            chosen = order[first : first + BATCH]
            losses = 0.0
            for m in range(0, len(chosen), MICRO_BATCH):
                part = chosen[m : m + MICRO_BATCH]
                partners = [retain[r.randrange(len(retain))] for _ in part]
                with torch.autocast(lm.device.type, torch.bfloat16):
                    loss = _forget_loss(lm, [forget[i] for i in part], name, None if before is None else before[part])
                    loss = (loss - lm.likelihood(lm.collate(partners)).mean()) * len(part) / len(chosen)
                loss.backward()
                losses += loss.item()
            torch.nn.utils.clip_grad_norm_(lm.module.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        say(f"{name}, epoch {epoch + 1} of {epochs}: loss {losses:.3f}")
    return steps


def _forget_loss(lm: LanguageModel, tokens: list[Any], name: str, before: Tensor | None) -> Tensor:
    values = lm.likelihood(lm.collate(tokens))
    if name == "GradDiff":
        return values.mean()  # ascent: the mean over the batch's tokens
    assert before is not None
    sums = torch.stack([part.sum() for part in values.split([len(t.scored) for t in tokens])])
    return -2 / BETA * F.logsigmoid(-BETA * (sums - before)).mean()


@torch.no_grad()
def _sums(lm: LanguageModel, tokens: list[Any]) -> Tensor:
    """Return (len(tokens),) summed log-likelihoods under the model as it is."""
    sums = torch.zeros(len(tokens))
    for indices, batch in lm.batches(tokens, MICRO_BATCH):
        with torch.autocast(lm.device.type, torch.bfloat16):
            values = lm.likelihood(batch)
        sums[indices] = torch.stack([part.sum() for part in values.split([len(tokens[i].scored) for i in indices])])
    return sums


def _measured(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    return _measures(_loaded(folder), options)


def _loaded(folder: Path) -> LanguageModel:
    model, tokenizer = models.load(str(folder))
    return LanguageModel.of(model.eval(), tokenizer)


def _measures(lm: LanguageModel, options: argparse.Namespace) -> dict[str, Any]:
    """Return TOFU's columns, and the truth ratios of the forget set; the questions are rendered as in the training."""
    with torch.autocast(lm.device.type, torch.bfloat16):
        result = pyunlearn.bench(
            "tofu", lm.module, options.data, tokenizer=lm.tokenizer, template="none", first=options.records
        )
    own = result.numbers["forget"]
    ratios = metrics.truth_ratio(own["correct"], own["wrong"]).ratio
    return {name: column.estimate for name, column in result.columns.items()} | {"truth_ratios": ratios.tolist()}


def forget_quality(unlearned: dict[str, Any], retrained: dict[str, Any]) -> tuple[float, float]:
    """Return the Kolmogorov-Smirnov distance and log10 of its p-value between two rows."""
    test = metrics.forget_quality(unlearned["truth_ratios"], retrained["truth_ratios"])
    return test.statistic, float(np.log10(max(test.pvalue, 1e-300)))


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as a Markdown table, each compared with the retrained model."""
    columns = ["model_utility", "forget_probability", "forget_rouge", "forget_truth_ratio", "retain_rouge"]
    heads = ["model", "forget quality, log10 p", "distance", *(c.replace("_", " ") for c in columns)]
    lines = [f"| {' | '.join([*heads, 'verdicts', 'steps', 's'])} |", "|---" * (len(heads) + 3) + "|"]
    for name, row in results.items():
        distance, log_p = forget_quality(row, results["retrained"])
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in row.get("verdicts", {}).items())
        cells = [f"{log_p:.1f}", f"{distance:.2f}", *(f"{row[c]:.3f}" for c in columns), verdicts]
        lines.append(f"| {' | '.join([name, *cells, str(row.get('steps', '')), str(row.get('seconds', ''))])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
