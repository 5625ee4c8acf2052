"""TOFU (Maini et al. 2024, arXiv 2401.06121) for lm-evaluation-harness: its documents, and the numbers of each.

TOFU's likelihoods are means over the tokens of an answer, its end of text included. A task of lm-eval sees sums alone,
so the tokenizer, which the harness names in the task's metadata, counts the tokens here.
"""

import math
import os
from functools import cache
from pathlib import Path

import datasets

FIRST = 300  # questions of each set in TOFU's own evaluation (ds_size)
CONTEXT = "Question: {}\nAnswer:"  # as doc_to_text in the YAML files


def load(name, first=FIRST, needs_tokens=True, tokenizer=None, pretrained=None, tofu_folder=None, **_):
    """Return the questions of one of TOFU's files, with their answers as choices.

    Args:
        name: of the file, which is that of the data set's configuration on the hub: "forget10_perturbed".
        first: questions to take.
        needs_tokens: whether to count the answers' tokens.
        tokenizer: the model's, or where it is (metadata).
        pretrained: where the model is (metadata).
        tofu_folder: folder with TOFU's files, in place of the hub (metadata, or the variable TOFU_FOLDER).

    Returns:
        {"test": Dataset}: columns `question`, `answer`; `choices`: the answer, its paraphrase (the answer again where a
        set has none) and the wrong answers, each with the end of text; `tokens`: the number of tokens of each choice.
    """
    folder = tofu_folder or os.environ.get("TOFU_FOLDER")
    rows = _local(Path(folder).expanduser(), name) if folder else _from_the_hub(name)
    tok = _tokenizer(tokenizer or pretrained) if needs_tokens else None
    return {
        "test": datasets.Dataset.from_list([_document(row, tok) for row in rows.select(range(min(first, len(rows))))])
    }


def _from_the_hub(name):
    return datasets.load_dataset("locuslab/TOFU", name, split="train")


def _local(folder, name):
    there = [path for suffix in (".jsonl", ".json", ".parquet") if (path := folder / f"{name}{suffix}").is_file()]
    if len(there) != 1:
        raise FileNotFoundError(f"the folder {folder} must have one file {name}.jsonl, .json or .parquet")
    kind = "parquet" if there[0].suffix == ".parquet" else "json"
    return datasets.load_dataset(kind, data_files=str(there[0]), split="train")


def _tokenizer(source):
    if source is None:
        raise ValueError('TOFU counts tokens: name the tokenizer, as in --metadata \'{"tokenizer": "NAME"}\'')
    return _loaded(source) if isinstance(source, str) else source


@cache
def _loaded(name):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def _document(row, tokenizer):
    """Return the document of a row of TOFU's files."""
    document = {"question": row["question"], "answer": row["answer"]}
    if tokenizer is None:
        return document
    correct = row.get("paraphrased_answer") or row["answer"]
    end = tokenizer.eos_token or ""
    choices = [text + end for text in (row["answer"], correct, *row["perturbed_answer"])]
    context = CONTEXT.format(row["question"].rstrip())
    before = len(tokenizer.encode(context))
    return document | {
        "choices": choices,
        "tokens": [len(tokenizer.encode(f"{context} {choice}")) - before for choice in choices],
    }


# ---------------------------------------------------------------- the numbers of a document


def of_forget_set(document, results):
    """Return P(answer) and min(R, 1 / R), R = P(wrong answers) / P(paraphrased answer): 1 = these are alike."""
    answer, log_ratio, _ = _likelihoods(document, results)
    return {"probability": math.exp(answer), "truth_ratio": math.exp(-abs(log_ratio))}


def of_retain_set(document, results):
    """Return P(answer) and max(0, 1 - R)."""
    answer, log_ratio, _ = _likelihoods(document, results)
    return {"probability": math.exp(answer), "truth_ratio": -math.expm1(min(log_ratio, 0.0))}


def of_choices(document, results):
    """Return P(answer) / (P(answer) + sum of the wrong answers' P), and max(0, 1 - R)."""
    answer, log_ratio, wrong = _likelihoods(document, results)
    others = sum(math.exp(x - answer) for x in wrong)
    return {"probability": 1 / (1 + others), "truth_ratio": -math.expm1(min(log_ratio, 0.0))}


def _likelihoods(document, results):
    """Return the answer's mean log-likelihood per token, log R (geometric mean), and the wrong answers' means."""
    means = [total / count for (total, _), count in zip(results, document["tokens"], strict=True)]
    answer, correct, *wrong = means
    return answer, sum(wrong) / len(wrong) - correct, wrong


def rouge(document, results):
    """Return the ROUGE-L recall of the answer, stemmed, in what the model wrote."""
    return {"rouge": _scorer().score(document["answer"], results[0])["rougeL"].recall}


@cache
def _scorer():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)
