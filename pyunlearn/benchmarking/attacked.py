"""Columns of a benchmark under attack: how many of its forget texts come back, with the retrained model as control."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pyunlearn.attacks.api import attack
from pyunlearn.attacks.config import AttackConfig
from pyunlearn.attacks.judge import BACK, EXPOSED
from pyunlearn.attacks.prepare import require_enough
from pyunlearn.attacks.result import AttackResult
from pyunlearn.benchmarking.config import BenchConfig
from pyunlearn.benchmarking.result import ATTACKS, Column, Numbers
from pyunlearn.errors import ArgumentError
from pyunlearn.metrics import mean_interval
from pyunlearn.metrics.exposure import is_significant

Rows = list[dict[str, Any]]

ANY = "any"
"""Measure of the column over all attacks together."""
PVALUE = "p-value"


def require_attackable(retrained: Any, texts: Mapping[str, Rows], *, is_result: bool) -> None:
    """Raise an error unless attacks can be tried on these texts: ArgumentError without the retrained model's weights.

    DataError where the benchmark has too few texts that were never trained on.
    """
    if retrained is None:
        raise ArgumentError("attacks compare with a retrained model, attacked in the same way: give one (--retrained)")
    if is_result:
        raise ArgumentError(
            f"attacks need the weights of the retrained model, and {retrained} has its numbers alone: give the model "
            "(--retrained)"
        )
    if "holdout" in texts:
        require_enough(len(texts["holdout"]), AttackConfig().false_discovery_rate)


def attacked(
    models: Mapping[str, Any],
    tokenizer: Any,
    texts: Mapping[str, Rows],
    config: BenchConfig,
    template: str | Path,
    *,
    progress: bool | None,
) -> AttackResult:
    """Attack the model, and the retrained model in the same way.

    Args:
        models: "model" and "retrained", or where to load them from.
        tokenizer: the model's, or where it is; None: where the model came from.
        texts: role -> rows, of forget, and of retain and holdout where the benchmark has them.
        config: the settings.
        template: form in which the model reads questions.
        progress: a progress bar.
    """
    return attack(
        models["model"],
        texts["forget"],
        retain=texts.get("retain"),
        holdout=texts.get("holdout"),
        control=models["retrained"],
        tokenizer=tokenizer,
        progress=progress,
        attacks=config.attacks,
        texts=len(texts["forget"]),
        template=template,
        workspace=config.workspace,
        seed=config.seed,
    )


def columns_of(result: AttackResult, seed: int) -> tuple[list[Column], Numbers]:
    """Return the columns, and the numbers of each text: its bits under each attack, and 1 where it comes back.

    A text comes back where it is exposed or its verdict is that it comes back, at the false discovery rate of 5 %
    over the set; it does so under those attacks in which it has 4.32 bits or more on its own, or most of all.

    Args:
        result: of the attacks.
        seed: of the intervals.
    """
    named = np.array([e.verdict in (EXPOSED, BACK) for e in result.examples])
    columns, numbers = [], {}
    for trial in result.trials:
        bits = np.array([_number(e.exposures[trial.name]) for e in result.examples])
        numbers[trial.name] = bits
        if trial.judged:
            strong = [trial.name in e.attacks for e in result.examples] | is_significant(bits)
            columns.append(_share(trial.name, (named & strong)[~np.isnan(bits)], seed))
    numbers[ANY] = named.astype(np.float64)
    columns.append(_share(ANY, named, seed))
    columns.append(Column(ATTACKS, PVALUE, result.pvalue, math.nan, math.nan, len(result.examples)))
    return columns, {ATTACKS: numbers}


def _number(bits: float | None) -> float:
    return math.nan if bits is None else bits


def _share(name: str, back: Any, seed: int) -> Column:
    """Return the share of texts that come back, with an interval."""
    return Column.of(ATTACKS, name, mean_interval(back.astype(np.float64), bounds=(0, 1), seed=seed), back.size)
