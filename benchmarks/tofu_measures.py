"""TOFU's own numbers of a model (arXiv 2401.06121, section 2.2): forget quality, model utility, and their parts.

The answers are scored as a continuation of the question in this project's plain rendering. Log-likelihoods are the mean
per token, ROUGE-L is the recall of what the model writes greedily.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pyunlearn import metrics
from pyunlearn.data import Tokens, read_examples
from pyunlearn.metrics import UTILITY_PARTS, model_utility, option_probability, rouge_l, truth_ratio
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.scoring import Scorer
from pyunlearn.probes.decoding import greedy_continuations

_BATCH_SIZE = 16
_SETS = {
    "forget": "forget10_perturbed",
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
}


def measures(lm: LanguageModel, data: Path, *, first: int | None = None, longest: int = 64) -> dict[str, Any]:
    """Return TOFU's numbers of a model, and the truth ratios of the forget set, which forget quality compares.

    Args:
        lm: the model.
        data: TOFU's folder with the files *_perturbed.jsonl.
        first: records of each file, the first of it; all by default.
        longest: tokens written for one answer.
    """
    parts: dict[str, float] = {}
    ratios: list[float] = []
    for role, name in _SETS.items():
        lines = (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines[:first]]
        answers = _mean_log_likelihoods(lm, [(row["question"], row["answer"]) for row in rows])
        # a paraphrase of the answer stands for it in the truth ratio, where there is one
        correct = _mean_log_likelihoods(lm, [(r["question"], r.get("paraphrased_answer", r["answer"])) for r in rows])
        wrong = np.stack([_mean_log_likelihoods(lm, [(r["question"], w) for w in r["perturbed_answer"]]) for r in rows])
        if role == "forget":
            ratio = truth_ratio(correct, wrong)
            ratios = [float(x) for x in ratio.ratio]
            parts["forget_truth_ratio"] = ratio.mean.estimate
        else:
            ratio = truth_ratio(correct, wrong, "true_better", mean="arithmetic")
            parts[f"{role}_truth_ratio"] = ratio.mean.estimate
        choice = role in ("real_authors", "world_facts")
        probability = option_probability(answers, wrong) if choice else np.exp(answers)
        parts[f"{role}_probability"] = float(probability.mean())
        parts[f"{role}_rouge"] = _rouge(lm, rows, longest)
    utility = model_utility({name: parts[name] for name in UTILITY_PARTS})
    return parts | {"model_utility": utility, "truth_ratios": ratios}


def forget_quality(unlearned: dict[str, Any], retrained: dict[str, Any]) -> tuple[float, float]:
    """Return the Kolmogorov-Smirnov distance and log10 of its p-value between two results of `measures`."""
    test = metrics.forget_quality(unlearned["truth_ratios"], retrained["truth_ratios"])
    return test.statistic, float(np.log10(max(test.pvalue, 1e-300)))


def _tokens(lm: LanguageModel, pairs: list[tuple[str, str]]) -> list[Tokens]:
    rows = [{"question": question, "answer": answer} for question, answer in pairs]
    return lm.encode({"texts": read_examples(rows, role="texts")})["texts"]


def _mean_log_likelihoods(lm: LanguageModel, pairs: list[tuple[str, str]]) -> Any:
    return Scorer(lm, _BATCH_SIZE).mean_log_likelihood(_tokens(lm, pairs))


def _rouge(lm: LanguageModel, rows: list[dict[str, Any]], longest: int) -> float:
    tokens = _tokens(lm, [(row["question"], row["answer"]) for row in rows])
    written = greedy_continuations(lm, tokens, longest=longest, batch_size=_BATCH_SIZE)
    texts = [lm.tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
    return float(np.mean(rouge_l(texts, [row["answer"] for row in rows], measure="recall", stemmer=True)))
