"""What is left of records in other forms than the one in which they were unlearned: the tutorial's model, by seed.

    python -m benchmarks.other_forms --out OUT --seeds 5

For each seed the model of examples/train_a_small_model.py learns the orders of some customers in the form
"Question: ... Answer: ...". `pyunlearn.unlearn` forgets one customer with its defaults, and with `robust`. Then the
attack `rendering` counts the records with 4.32 bits or more among unseen ones in each form, as it does of the model
before. Of unseen records one in twenty has that.
"""

from __future__ import annotations

import argparse
import runpy
import time
from pathlib import Path
from typing import Any

import torch

import pyunlearn
from benchmarks.many_records import print_table, spread

FORMS = ("plain", "short", "none", "joined", "alone")
RUNS: dict[str, dict[str, Any]] = {"before": {}, "unlearn": {}, "unlearn, robust": {"robust": True}}
_TRAINING = Path(__file__).parent.parent / "examples" / "train_a_small_model.py"


def main(arguments: list[str] | None = None) -> list[tuple[str, ...]]:
    """Parse the options, train, unlearn and attack, print the table; return its rows."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for run, settings in RUNS.items():
        counts = [_measured(options.out / f"shop-{seed}", run, settings, seed) for seed in range(options.seeds)]
        forms = ["{:.0f}"] * (len(FORMS) + 2) + ["{:+.1%}"] * 2
        cells = [spread(column, form) for column, form in zip(zip(*counts, strict=True), forms, strict=True)]
        rows.append((run, *cells))
    names = ("model", *FORMS, "steps", "seconds", "retain text", "holdout")
    print_table(names, rows)
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the models")
    parser.add_argument("--seeds", type=int, default=5, help="number of models and sets of records")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    return parser


def _measured(shop: Path, run: str, settings: dict[str, Any], seed: int) -> tuple[float, ...]:
    """Unlearn and attack; return the records that stand out in each form, steps, seconds, and rises of loss."""
    if not shop.exists():
        runpy.run_path(str(_TRAINING))["main"](str(shop), seed)
    texts = {role: shop / f"{role}.jsonl" for role in ("forget", "retain", "holdout")}
    model, numbers = str(shop / "model"), (0.0, 0.0, 0.0, 0.0)
    if settings or run != "before":
        began = time.process_time()
        result = pyunlearn.unlearn(model, seed=seed, progress=False, **texts, **settings)
        rises = result.utility.relative_rise, result.utility.holdout_rise or 0.0
        numbers = len(result.history), time.process_time() - began, *rises
        model = str(shop / run.replace(", ", "-"))
        result.save(model)
    attack = pyunlearn.attack(model, attacks=["rendering"], template=FORMS[0], progress=False, **texts)
    returned = {t.name.removeprefix("rendering, "): t.returned for t in attack.trials}
    own = returned.pop("without an attack")
    return (own, *(returned[form] for form in FORMS[1:]), *numbers)


if __name__ == "__main__":
    main()
