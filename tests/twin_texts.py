"""Texts with doses, and the settings of a very small study of twins."""

import json
import random

import tiny
from study_settings import TINY

from pyunlearn.study import StudyConfig
from pyunlearn.study.corpus import read_doses

SETTINGS = {**TINY, "setup": "twins", "doses": (2, 16), "seeds": 6, "steps": 16, "unlearning_rates": (3e-4,)}
INSERTED = 6 * 2  # texts of each dose: seeds, examples
UNSEEN = 19 + 12  # non-members, test_examples


def texts_of(count, seed):
    """Return texts of random words, which cannot be guessed."""
    words, rng = sorted({w for s in tiny.sentences(100, 0) for w in s.strip(".").split()}), random.Random(seed)
    return [" ".join(rng.choices(words, k=10)) for _ in range(count)]


def dosed(kinds=("id",), doses=(0, 2, 16)):
    """Return random texts as rows with doses, as Hubble has them."""
    counts = {(kind, dose): INSERTED if dose else UNSEEN for kind in kinds for dose in doses}
    texts = iter(texts_of(sum(counts.values()), 5))
    return [
        {"text": next(texts), "duplicates": dose, "kind": kind, "meta": "{}"}
        for (kind, dose), count in counts.items()
        for _ in range(count)
    ]


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def config_of(**changes):
    return StudyConfig(**{**SETTINGS, "checkpoint": "seen", "twin": "unseen", **changes})


def read(rows, tmp_path):
    return read_doses([write(tmp_path / "corpus.jsonl", rows)])
