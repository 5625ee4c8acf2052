"""A folder like TOFU's, of made-up facts of tests/tiny.py, and a benchmark run on it."""

import json
from itertools import islice

import tiny

import pyunlearn


def perturbed(rows, seed, paraphrased):
    """Return rows with the columns of TOFU's files."""
    wrong = [[row["answer"] for row in tiny.facts(3, 100 * seed + i)] for i, _ in enumerate(rows)]
    made = [row | {"perturbed_answer": w} for row, w in zip(rows, wrong, strict=True)]
    other = [row["answer"] for row in tiny.facts(len(rows), seed + 50)] if paraphrased else []
    return [row | {"paraphrased_answer": o} for row, o in zip(made, other, strict=True)] if paraphrased else made


def write(path, rows):
    """Write a .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def tofu_rows(answers):
    """Return the rows of TOFU's four files; the first two of the forget set are those that `answers` was to forget."""
    unseen = iter(answers.holdout)
    return {
        "forget10_perturbed": perturbed([*answers.forget, *islice(unseen, 6)], 1, True),
        "retain_perturbed": perturbed(answers.retain[:7], 2, True),
        "real_authors_perturbed": perturbed([*islice(unseen, 6)], 3, False),
        "world_facts_perturbed": perturbed([*islice(unseen, 6)], 4, False),
    }


def tofu_folder(folder, rows):
    """Return a new folder with the files."""
    folder.mkdir()
    for name, each in rows.items():
        write(folder / f"{name}.jsonl", each)
    return folder


def bench(trained, data, **settings):
    """Return the result for a model of tests/tiny.py, whose records have the rendering "none"."""
    settings = {"template": "none", "progress": False} | settings
    return pyunlearn.bench("tofu", trained.model, data, tokenizer=trained.tokenizer, **settings)
