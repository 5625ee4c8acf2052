"""Every method at equal utility on TOFU: a small model memorizes facts about made-up authors, then forgets some.

    python -m benchmarks.compare_tofu --data TOFU --out OUT

TOFU (Maini et al. 2024, arXiv 2401.06121) is a folder with forget10.jsonl and retain90.jsonl, a question and an answer
per line. SmolLM2-135M, which is the demo's model, is first fine-tuned on the forget and retain texts until it knows
the forget answers; the holdout comes from the same files and is never trained on. The three are drawn at random, of
similar length, so that before the fine-tuning they are exchangeable. Where there is forget10_perturbed.jsonl too, dpo
prefers its wrong answers.

The fine-tuned model is saved in OUT, and each method's row as soon as it is finished: the same command resumes after
an interruption. At the end OUT/comparison holds result.json, table.csv and the plot, and OUT/table.md the table for a
document.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from rich.console import Console

import pyunlearn
from benchmarks.tofu import Recipe, Rows, drawn, fine_tuned, say
from pyunlearn import models
from pyunlearn.cli.demo_model import demo_model
from pyunlearn.comparing import Comparison, Measurement, Row, comparison_table
from pyunlearn.methods import METHODS


def main(arguments: list[str] | None = None) -> Comparison:
    """Parse the options, fine-tune unless that has been done, compare, and write the table."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    began = time.perf_counter()
    texts = drawn(options.data, options.forget, options.retain, options.holdout, options.longest, options.seed)
    recipe = Recipe(options.fine_tuning_rate, options.known, options.epochs, options.seed)
    folder = fine_tuned(options.model or demo_model(), options.out, [texts["forget"], texts["retain"]], recipe)
    model, tokenizer = models.load(folder)
    comparison = pyunlearn.compare(
        model,
        with_winners(texts["forget"], options.data),
        retain=texts["retain"],
        holdout=texts["holdout"],
        tokenizer=tokenizer,
        output_dir=options.out / "comparison",
        progress=True,
        methods=options.methods.split(",") if options.methods else list(METHODS),
        tau=options.tau,
        metric=options.metric,
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        max_steps=options.max_steps,
        utility_budget=options.utility_budget,
        holdout_budget=None,
        retain_loss=None if options.retain_loss == "none" else options.retain_loss,
        seed=options.seed,
    )
    (options.out / "table.md").write_text(markdown(comparison, options))
    Console(width=120).print(comparison_table(comparison))
    say(f"{time.perf_counter() - began:.0f} s; the table is in {options.out / 'table.md'}")
    return comparison


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with forget10.jsonl and retain90.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--model", default=None, help="another model than SmolLM2-135M: a folder or a name")
    parser.add_argument("--methods", default=None, help="names, parted by commas (default: all)")
    for name, number, what in (
        ("forget", 8, "answers to forget"),
        ("retain", 24, "answers to retain"),
        ("holdout", 32, "answers never trained on"),
        ("longest", 200, "characters of a question and its answer at most"),
        ("epochs", 20, "epochs of fine-tuning at most"),
        ("batch-size", 4, "forget texts in a step"),
        ("max-steps", 10, "steps of a method at most"),
        ("seed", 0, "seed of every draw"),
        ("threads", 0, "threads of torch, 0 for its own choice"),
    ):
        parser.add_argument(f"--{name}", type=int, default=number, help=f"{what} (default {number})")
    for name, amount, what in (
        ("fine-tuning-rate", 1e-4, "learning rate of the fine-tuning"),
        ("known", 0.15, "mean nats per token at which the forget answers are known"),
        ("learning-rate", 2e-5, "learning rate of the methods"),
        ("tau", 0.95, "share of the original's utility that is retained"),
        ("utility-budget", 0.5, "utility budget of a run: wide, so that the mixing decides"),
    ):
        parser.add_argument(f"--{name}", type=float, default=amount, help=f"{what} (default {amount})")
    parser.add_argument("--metric", default="probability", help="the utility, see pyunlearn compare --help")
    parser.add_argument("--retain-loss", default="auto", help="auto, nll, hold or none")
    return parser


def with_winners(rows: Rows, data: Path) -> Rows:
    """Add the first wrong answer of forget10_perturbed.jsonl, where there is that file, for `dpo` to prefer."""
    wrong: dict[str, str] = {}
    if (data / "forget10_perturbed.jsonl").exists():
        lines = (data / "forget10_perturbed.jsonl").read_text(encoding="utf-8").splitlines()
        wrong = {row["question"]: row["perturbed_answer"][0] for row in map(json.loads, lines)}
    return [row | ({"winner": wrong[row["question"]]} if row["question"] in wrong else {}) for row in rows]


_COLUMNS = (
    "method",
    "exposure, bits",
    "forgotten",
    "over",
    "extracted",
    "forget NLL",
    "retain NLL",
    "utility",
    "mix",
    "before mixing: exposure, utility",
    "steps",
    "s",
    "peak MiB",
)


def markdown(comparison: Comparison, options: argparse.Namespace) -> str:
    """Return the table for a document, with a line on how it was measured."""
    model = Path(options.model).name if options.model else "SmolLM2-135M"
    settings = comparison.settings
    lines = [
        f"{model} fine-tuned on {options.forget} forget and {options.retain} retain answers of TOFU, "
        f"{comparison.non_members} in the holdout; {options.max_steps} steps at most, "
        f"learning rate {options.learning_rate:g}; {settings['metric'].replace('_', ' ')} of the retain set at "
        f"{options.tau:.0%} of the original's, or more where the mix is 1; "
        f"pyunlearn {settings['pyunlearn']}, torch {settings['torch']}, "
        f"{torch.get_num_threads()} threads.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "|" + "---|" * len(_COLUMNS),
        "| original | " + " | ".join([*_cells(comparison, comparison.original), *["-"] * 5]) + " |",
    ]
    for row in sorted((r for r in comparison.rows if r.done), key=_rank):
        assert row.calibrated is not None
        assert row.uncalibrated is not None
        before = f"{row.uncalibrated.exposure.estimate:.2f}, {comparison.utility_share(row.uncalibrated):.0%}"
        memory = "-" if row.peak_memory is None else f"{row.peak_memory / 2**20:.0f}"
        costs = [f"{row.weight:.2f}", before, f"{row.steps}", f"{row.seconds:.0f}", memory]
        lines.append(f"| `{row.method}` | " + " | ".join([*_cells(comparison, row.calibrated), *costs]) + " |")
    lines += ["", *(f"`{row.method}`: {row.status}, {row.reason}." for row in comparison.rows if not row.done)]
    return "\n".join(lines).rstrip() + "\n"


def _rank(row: Row) -> float:
    assert row.calibrated is not None
    return row.calibrated.exposure.estimate


def _cells(comparison: Comparison, m: Measurement) -> list[str]:
    e = m.exposure
    return [
        f"{e.estimate:.2f} ({e.low:.2f} to {e.high:.2f})",
        f"{m.share('forgotten'):.0%}",
        f"{m.share('over-unlearned'):.0%}",
        f"{m.extraction_strength.estimate:.0%}",
        f"{m.forget_nll.estimate:.2f}",
        f"{m.utility_nll.estimate:.2f}",
        f"{comparison.utility_share(m):.1%}",
    ]


if __name__ == "__main__":
    main()
