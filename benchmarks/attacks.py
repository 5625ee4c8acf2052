"""What comes back under attack: methods of unlearning on tiny models, next to models that never saw the records.

    python -m benchmarks.attacks --methods match,ga,npo,simnpo,undial --seeds 3

For each seed a tiny Llama knows `--records` random facts by heart (see `benchmarks.many_records`), each method forgets
them with its defaults, and `pyunlearn.attack` tries to bring them back with `--relearning-steps` on one half of the
records (the other half is scored), with `--retain-steps` on the retain set, and with weights rounded to 4 bits. A row
shows the share of the records with 4.32 bits or more among 200 unseen facts under the same attack: of unseen facts one
in twenty has that. Of relearning it is the largest of four points, an eighth of the steps, a quarter, half and all. The
last row is the retrained model. Means over the seeds, with the range where they differ.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import pyunlearn
from benchmarks.many_records import ONCE, READ_OFTEN, facts, print_table, train, world
from pyunlearn.models.from_scratch import untrained_llama

RETRAINED = "retrained"
COLUMNS = ("method", "forgotten", "utility", "no attack", "4 bits", "the others", "retain text", "comes back")


def main(arguments: list[str] | None = None) -> list[tuple[str, ...]]:
    """Parse the options, train, unlearn and attack, print the table; return its rows."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    measured: dict[str, list[tuple[float, ...]]] = {}
    for seed in range(options.seeds):
        model, tokenizer, texts = world(options.records, known=False, seed=seed)
        for name in options.methods.split(","):
            measured.setdefault(name, []).append(_unlearned(model, tokenizer, texts, name, seed, options))
        control = _retrained(model, tokenizer, texts, seed)
        measured.setdefault(RETRAINED, []).append(
            (np.nan, np.nan, *_attacked(control, tokenizer, texts, seed, options))
        )
    rows = [(name, *_cells(np.array(values))) for name, values in measured.items()]
    print_table(COLUMNS, rows)
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="match,ga,npo,simnpo,undial,rmu", help="methods, separated by commas")
    parser.add_argument("--records", type=int, default=16, help="records that the model knows by heart")
    parser.add_argument("--seeds", type=int, default=3, help="number of models and sets of records")
    parser.add_argument("--relearning-steps", type=int, default=20, help="steps on the other half")
    parser.add_argument("--retain-steps", type=int, default=100, help="steps on the retain set")
    parser.add_argument("--relearning-rate", type=float, default=None, help="learning rate of both; default: the best")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    return parser


def _unlearned(
    model: Any, tokenizer: Any, texts: dict[str, Any], method: str, seed: int, options: argparse.Namespace
) -> tuple[float, ...]:
    """Forget the records with one method; return the shares forgotten, the rise of utility, and those that come back.

    A name that ends in "+robust" sets `robust`.
    """
    copied = copy.deepcopy(model)
    name = method.removesuffix("+robust")
    options_of: dict[str, Any] = {"robust": True} if method.endswith("+robust") else {}
    result = pyunlearn.unlearn(
        copied,
        texts["forget"],
        retain=texts["retain"],
        holdout=texts["holdout"],
        tokenizer=tokenizer,
        method=name,
        seed=seed,
        progress=False,
        **options_of,
    )
    forgotten = float(np.mean([e.forgotten for e in result.examples]))
    return (forgotten, result.utility.relative_rise, *_attacked(copied, tokenizer, texts, seed, options))


def _retrained(model: Any, tokenizer: Any, texts: dict[str, Any], seed: int) -> Any:
    """Return a model of the same size that read other records as often, and these never."""
    torch.manual_seed(seed)
    config = model.config
    control = untrained_llama(
        len(tokenizer),
        width=config.hidden_size,
        feed_forward=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        context=config.max_position_embeddings,
    )
    train(control, tokenizer, facts(ONCE, 10 * seed + 2) + texts["other"] * READ_OFTEN)
    return control


def _attacked(
    model: Any, tokenizer: Any, texts: dict[str, Any], seed: int, options: argparse.Namespace
) -> tuple[float, ...]:
    """Return the shares of the records that stand out, first without an attack; last 1.0 where they come back."""
    result = pyunlearn.attack(
        model,
        texts["forget"],
        retain=texts["retain"],
        holdout=texts["holdout"],
        tokenizer=tokenizer,
        attacks=["quantization", "relearning", "relearning-retain"],
        relearning_steps=options.relearning_steps,
        retain_steps=options.retain_steps,
        relearning_rate=options.relearning_rate,
        seed=seed,
        progress=False,
    )

    share = {t.name: t.returned / t.tested for t in result.trials}
    by_attack = {t.attack: share[t.name] for t in sorted(result.trials, key=lambda t: share[t.name])}  # the most
    before, rounded = share["without an attack"], share["quantization, 4 bits"]
    return (before, rounded, by_attack["relearning"], by_attack["relearning-retain"], float(not result.passed))


def _cells(values: np.ndarray) -> list[str]:
    """Return the mean of each column of (seeds, columns), with its range where the seeds differ."""
    return [_cell(column, signed=k == 1, counted=k == values.shape[1] - 1) for k, column in enumerate(values.T)]


def _cell(column: Sequence[float], *, signed: bool, counted: bool) -> str:
    if np.isnan(column).any():
        return "-"
    if counted:
        return f"{int(sum(column))} of {len(column)}"
    form = "+.1%" if signed else ".0%"
    low, mean, high = min(column), float(np.mean(column)), max(column)
    return f"{mean:{form}}" if low == high else f"{mean:{form}} ({low:{form}} to {high:{form}})"


if __name__ == "__main__":
    main()
