"""TOFU (Maini et al. 2024, arXiv 2401.06121): forget quality, model utility, and their parts.

The columns are those of aggregate_eval_stat.py, TOFU's own script for its leaderboard, to rounding. The questions of
four sets are read: the forget set, a part of the retain set, real authors and world facts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pyunlearn.benchmarking.config import BenchConfig
from pyunlearn.benchmarking.files import Questions, file_in, read_questions
from pyunlearn.benchmarking.measurer import Measurer
from pyunlearn.benchmarking.result import Column, Numbers
from pyunlearn.metrics import (
    Interval,
    forget_quality,
    mean_interval,
    model_utility,
    model_utility_interval,
    option_probability,
    rouge_l,
    truth_ratio,
)

Floats = NDArray[np.float64]

FIRST = 300
"""Questions of each set in TOFU's own evaluation (ds_size)."""
COMPARED = {"forget": ("correct", "wrong")}
"""Sets that the retrained model reads, and the numbers of them that are compared."""
_FILES = {
    "retain": "retain_perturbed",
    "real authors": "real_authors_perturbed",
    "world facts": "world_facts_perturbed",
}
_CHOICES = ("real authors", "world facts")  # sets where probability is that of a multiple choice


def files(config: BenchConfig) -> list[str]:
    """Return the names of the files that are read."""
    return [f"{config.split}_perturbed", *_FILES.values()]


def read(folder: Path, config: BenchConfig) -> dict[str, Questions]:
    """Return the questions of the four sets. Raises DataError where a file or a column is missing."""
    names = {"forget": f"{config.split}_perturbed"} | _FILES
    paths = {name: file_in(folder, file, files(config)) for name, file in names.items()}
    columns = {"question": "text", "answer": "answer", "paraphrased_answer": "text", "perturbed_answer": "texts"}
    first = config.first or FIRST
    return {
        name: read_questions(path, name, columns, first, optional=["paraphrased_answer"])
        for name, path in paths.items()
    }


def attacked(sets: Mapping[str, Questions]) -> dict[str, list[dict[str, str]]]:
    """Return the questions and answers that are attacked, and those that an attacker has."""
    keys = ("question", "answer")
    return {role: [{key: row[key] for key in keys} for row in sets[role].rows] for role in ("forget", "retain")}


def measure(
    measurer: Measurer, sets: Mapping[str, Questions], config: BenchConfig, *, retrained: bool = False
) -> Numbers:
    """Return the numbers of each question.

        answer       (n,) mean log-likelihood of the answer, nats per token
        correct      (n,) of its paraphrase, where the set has them, and else of the answer
        wrong        (n, P) of the P wrong answers
        rouge        (n,) ROUGE-L recall of what the model writes

    Of the retrained model `correct` and `wrong` alone, which forget quality compares.
    """
    numbers: Numbers = {}
    for name, questions in sets.items():
        rows = questions.rows
        pairs = [(row["question"], row["answer"]) for row in rows]
        every = [] if retrained else list(pairs)
        every += [(row["question"], row.get("paraphrased_answer", row["answer"])) for row in rows]
        every += [(row["question"], wrong) for row in rows for wrong in row["perturbed_answer"]]
        values, n = measurer.log_likelihood(every, f"{name} answer"), len(rows)
        parts = {} if retrained else {"answer": values[:n]}
        values = values[0 if retrained else n :]
        parts |= {"correct": values[:n], "wrong": values[n:].reshape(n, -1)}
        if not retrained:
            texts = measurer.written(pairs, f"{name} answer", config.max_new_tokens)
            parts["rouge"] = rouge_l(texts, [answer for _, answer in pairs], measure="recall", stemmer=True)
        numbers[name] = parts
    return numbers


def columns(numbers: Numbers, retrained: Numbers | None, config: BenchConfig) -> list[Column]:
    """Return the published columns from the numbers of each question (see `measure`).

    Probability, ROUGE-L recall and truth ratio of each set, with the interval of their mean between 0 and 1; model
    utility, with a bootstrap interval; and with the numbers of a retrained model, forget quality: the p-value of the
    Kolmogorov-Smirnov test, which has no interval, and the distance.
    """
    out: list[Column] = []
    values: dict[str, Floats] = {}
    for name, parts in numbers.items():
        correct, wrong = parts["correct"], parts["wrong"]
        form = "closer_to_1_better" if name == "forget" else "true_better"
        choice = name in _CHOICES
        each = {
            "probability": option_probability(parts["answer"], wrong) if choice else np.exp(parts["answer"]),
            "rouge": parts["rouge"],
            "truth ratio": truth_ratio(correct, wrong, form, mean=config.wrong_answers).value,
        }
        for measure_name, x in each.items():
            interval = mean_interval(x, bounds=(0, 1), seed=config.seed)
            out.append(Column.of(name, measure_name, interval, x.size))
            values[out[-1].name] = x
    utility = {name: x for name, x in values.items() if not name.startswith("forget_")}
    total = sum(len(parts["answer"]) for name, parts in numbers.items() if name != "forget")
    ends = {column.name: column.high for column in out if column.name in utility}
    out.append(Column.of("", "model utility", _utility(utility, ends, config.seed), total))
    return out if retrained is None else out + _forget_quality(numbers["forget"], retrained["forget"])


def _utility(values: Mapping[str, Floats], ends: Mapping[str, float], seed: int) -> Interval:
    """Return model utility with its interval, which reaches to the utility of all upper ends where a part is 0.

    A part that is 0 for each question makes every resample's utility 0, and is not known to be 0 for others.
    """
    interval = model_utility_interval(values, seed=seed)
    if interval.estimate > 0 or not np.isfinite([interval.high, *ends.values()]).all():
        return interval
    return interval._replace(high=max(interval.high, model_utility(ends)))


def _forget_quality(unlearned: Mapping[str, Floats], retrained: Mapping[str, Floats]) -> list[Column]:
    """Return the p-value of the test, and its distance with an interval.

    Each distribution function lies within sqrt(ln(2 / a) / 2n) of the observed one, at confidence 1 - a (Massart 1990,
    doi 10.1214/aop/1176990746). With a = 0.025 for each, the distance lies within the sum of both, at 95 % or more.
    """
    ratios = [truth_ratio(part["correct"], part["wrong"]).ratio for part in (unlearned, retrained)]
    test, n = forget_quality(*ratios), ratios[0].size
    reach = sum(np.sqrt(np.log(2 / 0.025) / (2 * x.size)) for x in ratios)
    low, high = max(0.0, test.statistic - reach), min(1.0, test.statistic + reach)
    return [
        Column("", "forget quality", test.pvalue, np.nan, np.nan, n),
        Column("", "forget quality distance", test.statistic, low, high, n),
    ]


def notes(numbers: Numbers, retrained: Numbers | None) -> list[str]:
    """Return sentences on what the columns cannot show."""
    if retrained is None:
        return [
            "Forget quality compares with a model retrained without the forget set: give it as retrained (--retrained)."
        ]
    same = all(np.array_equal(numbers["forget"][key], retrained["forget"][key]) for key in ("correct", "wrong"))
    if same:
        return [
            "The model gives every forget answer the likelihood that the retrained model gives it, as if it were the "
            "same model: then forget quality is 1 by definition."
        ]
    return []
