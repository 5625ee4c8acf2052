"""Unlearned against retrained: what a run leaves of TOFU's answers, compared with a model that never saw them.

    python -m benchmarks.retrained --data TOFU --out OUT --methods auto,ceu --evidence holdout,none

SmolLM2-135M is fine-tuned twice, on forget and retain answers and on retain answers alone (the retrained model), until
it knows them by heart. Then each method forgets, with each kind of evidence: holdout, unseen records of the same
source; none, only what the package has (unseen texts with --form text, else text that the model writes). Each model is
measured on the forget answers (nats a token, share of first choices, ROUGE-L recall of the rest when half is given and
of the greedy answer, records of which one of 16 samples holds the answer), on the retain answers (ROUGE-L recall), and
on unseen answers that nothing else uses (nats a token). Models and results are saved in OUT: a second run of the same
command resumes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pyunlearn
from benchmarks.tofu import Recipe, Rows, drawn, fine_tuned, say
from pyunlearn import models
from pyunlearn.cli.demo_model import demo_model
from pyunlearn.data import Tokens, read_examples
from pyunlearn.metrics import rouge_l
from pyunlearn.models.generation import generate
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.scoring import Scorer, evaluation_mode
from pyunlearn.probes.decoding import greedy_continuations

UTILITY_BUDGET = 0.05  # of a run, by default
WHOLE = 0.95  # ROUGE-L recall from which a sample holds an answer
COLUMNS = {
    "forget_nll": "forget, nats a token",
    "greedy_match": "first choices",
    "half": "rest, half given",
    "answer": "greedy answer",
    "sampled": "whole in 16 samples",
    "retain": "retain answer",
    "unseen_nll": "unseen, nats a token",
}


def main(arguments: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Parse the options, train, unlearn, measure and print the table."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    texts = texts_of(options)
    recipe = Recipe(options.fine_tuning_rate, options.known, options.epochs, options.seed)
    where = options.model or demo_model()
    trained = {
        "start": fine_tuned(where, options.out, [texts["forget"], texts["retain"]], recipe),
        "retrained": fine_tuned(where, options.out, [texts["retain"]], recipe),
    }
    name = f"{options.form}-{options.forget}-{options.retain}-{options.seed}"
    results: dict[str, dict[str, Any]] = {}
    for row, folder in trained.items():
        results[row] = _once(options.out / f"{name}-{row}.json", partial(measured, folder, texts, options.samples))
    for evidence in options.evidence.split(","):
        for method in options.methods.split(","):
            row = f"{method}, {evidence}" + (f", rate {options.learning_rate:g}" if options.learning_rate else "")
            row += f", budget {options.utility_budget:g}" if options.utility_budget != UTILITY_BUDGET else ""
            path = options.out / f"{name}-{row.replace(', ', '-').replace(' ', '')}.json"

            results[row] = _once(path, partial(unlearned, trained["start"], texts, method, evidence, options))
            print(table(results), flush=True)
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with forget10.jsonl and retain90.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--model", default=None, help="another model than SmolLM2-135M: a folder or a name")
    parser.add_argument("--methods", default="auto", help="names, parted by commas (default: auto)")
    parser.add_argument("--evidence", default="holdout,none", help="holdout, none or both, parted by a comma")
    parser.add_argument("--form", default="prompt", choices=["prompt", "text"], help="a record is two texts, or one")
    for name, number, what in (
        ("forget", 20, "answers to forget"),
        ("retain", 40, "answers to retain"),
        ("holdout", 40, "unseen answers for the run, and as many for the measurement"),
        ("longest", 200, "characters of a question and its answer at most"),
        ("epochs", 40, "epochs of fine-tuning at most"),
        ("samples", 16, "samples of each answer"),
        ("seed", 0, "seed of every draw"),
        ("threads", 0, "threads of torch, 0 for its own choice"),
    ):
        parser.add_argument(f"--{name}", type=int, default=number, help=f"{what} (default {number})")
    for name, amount, what in (
        ("fine-tuning-rate", 2e-4, "learning rate of the fine-tuning"),
        ("known", 0.03, "mean nats a token at which the answers are known"),
        ("utility-budget", UTILITY_BUDGET, "utility budget of a run"),
    ):
        parser.add_argument(f"--{name}", type=float, default=amount, help=f"{what} (default {amount})")
    parser.add_argument("--learning-rate", type=float, help="learning rate of a run (default: the package's own)")
    parser.add_argument("--max-steps", type=int, help="steps of a run at most (default: the package's own)")
    return parser


def texts_of(options: argparse.Namespace) -> dict[str, Rows]:
    """Draw the records; with the form "text" each is one text, a question and its answer."""
    texts = drawn(options.data, options.forget, options.retain, 2 * options.holdout, options.longest, options.seed)
    if options.form == "text":
        texts = {role: [{"text": f"{row['question']} {row['answer']}"} for row in rows] for role, rows in texts.items()}
    return texts | {"holdout": texts["holdout"][: options.holdout], "unseen": texts["holdout"][options.holdout :]}


def unlearned(
    start: Path, texts: dict[str, Rows], method: str, evidence: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Run one method from the fine-tuned model and measure what it leaves."""
    began = time.perf_counter()
    result = pyunlearn.unlearn(
        str(start),
        texts["forget"],
        retain=texts["retain"],
        holdout=texts["holdout"] if evidence == "holdout" else None,
        method=method,
        learning_rate=options.learning_rate,
        max_steps=options.max_steps,
        utility_budget=options.utility_budget,
        seed=options.seed,
        progress=True,
    )
    seconds = time.perf_counter() - began
    verdicts = [e.verdict for e in result.examples]
    numbers = measures(LanguageModel.of(result.model, result.tokenizer), texts, options.samples)
    return numbers | {
        "evidence": result.evidence,
        "stopped": result.stopped,
        "steps": len(result.history),
        "utility_rise": result.utility.relative_rise,
        "utility_interval": result.utility.interval,
        "holdout_rise": result.utility.holdout_rise,
        "seconds": round(seconds),
        "verdicts": {each: verdicts.count(each) for each in sorted(set(verdicts))},
    }


def measured(folder: Path, texts: dict[str, Rows], samples: int) -> dict[str, Any]:
    """Load a model and measure it."""
    model, tokenizer = models.load(str(folder))
    return measures(LanguageModel.of(model.eval(), tokenizer), texts, samples)


def measures(lm: LanguageModel, texts: dict[str, Rows], samples: int) -> dict[str, Any]:
    """Measure what a model knows of the texts; the keys are those of COLUMNS."""
    tokens = lm.encode({role: read_examples(rows, role=role) for role, rows in texts.items()})
    forget, scorer = tokens["forget"], Scorer(lm, 8)
    prompted = "question" in texts["forget"][0]
    openings = [t if prompted else _second_half(t) for t in forget]
    return {
        "forget_nll": float(-scorer.mean_log_likelihood(forget).mean()),
        "forget_nlls": [round(float(x), 4) for x in -scorer.mean_log_likelihood(forget)],
        "greedy_match": float(scorer.greedy_match(forget).mean()),
        "half": _greedy_rouge(lm, [_second_half(t) for t in forget]),
        "answer": _greedy_rouge(lm, openings),
        "sampled": int(sum(_sampled_rouge(lm, t, samples).max() >= WHOLE for t in openings)),
        "retain": _greedy_rouge(lm, [t if prompted else _second_half(t) for t in tokens["retain"]]),
        "unseen_nll": float(-scorer.mean_log_likelihood(tokens["unseen"]).mean()),
    }


def _second_half(t: Tokens) -> Tokens:
    return Tokens(t.ids, t.first + len(t.scored) // 2)


def _greedy_rouge(lm: LanguageModel, tokens: list[Tokens]) -> float:
    """Return the mean ROUGE-L recall of what the model writes in the place of the scored tokens."""
    written = greedy_continuations(lm, tokens, longest=100)
    return float(np.mean(_rouge(lm, written, [t.scored for t in tokens])))


def _rouge(lm: LanguageModel, written: list[Any], truth: list[Any]) -> Any:
    texts = [[lm.tokenizer.decode(ids, skip_special_tokens=True) for ids in each] for each in (written, truth)]
    return rouge_l(*texts, measure="recall", stemmer=True)


def _sampled_rouge(lm: LanguageModel, t: Tokens, samples: int) -> Any:
    """Return (samples,) ROUGE-L recalls of answers sampled at temperature 1."""
    torch.manual_seed(0)
    ids = torch.tensor([t.ids[: t.first]] * samples, device=lm.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    with evaluation_mode(lm.module):
        written = generate(lm, inputs, prompt_length=t.first, max_new_tokens=len(t.scored) + 4, **options)
    return _rouge(lm, written, [t.scored] * samples)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as a Markdown table."""
    lines = [f"| model | {' | '.join(COLUMNS.values())} | verdicts | stopped | steps | s |", "|---" * 12 + "|"]
    for name, row in results.items():
        numbers = [f"{row[key]}" if key == "sampled" else f"{row[key]:.2f}" for key in COLUMNS]
        verdicts = ", ".join(f"{count} {name}" for name, count in row.get("verdicts", {}).items())
        ending = [verdicts, row.get("stopped", ""), str(row.get("steps", "")), str(row.get("seconds", ""))]
        lines.append(f"| {' | '.join([name, *numbers, *ending])} |")
    return "\n".join(lines)


def _once(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the numbers in a file; measure and write them where there is none."""
    if not path.exists():
        say(f"measuring {path.stem}")
        text = json.dumps(measure(), indent=1) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    numbers: dict[str, Any] = json.loads(path.read_text())
    return numbers


if __name__ == "__main__":
    main()
