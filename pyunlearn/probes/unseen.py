"""Texts and answers that were written for this package, so that no model has seen them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from pyunlearn.data import Example, read_examples

TEXTS = Path(__file__).with_name("unseen_texts.jsonl")
"""JSONL with register and text: 18 of each of 13 kinds, English and German."""

ANSWERS = Path(__file__).with_name("unseen_answers.jsonl")
"""JSONL with register, prompt and completion: 20 of each of 7 kinds, English."""


def unseen_texts() -> list[Example]:
    """Return the texts."""
    return [Example("", row["text"]) for row in _rows(TEXTS)]


def unseen_like(examples: Sequence[Example]) -> list[Example]:
    """Return the texts; for records with prompts the answers, with their questions in the records' form.

    >>> records = [Example("Question: Who?\\nAnswer: ", "I."), Example("Question: Why?\\nAnswer: ", "So.")]
    >>> unseen_like(records)[0].prompt
    'Question: What inspired Hadrian Vosk to write his first novel?\\nAnswer: '
    """
    if not any(e.prompt for e in examples):
        return unseen_texts()
    if any(e.messages for e in examples):
        pairs = [{"question": row["prompt"], "answer": row["completion"]} for row in _rows(ANSWERS)]
        return read_examples(pairs, role="holdout")
    before, after = _frame([e.prompt for e in examples])
    return [Example(before + row["prompt"] + after, row["completion"]) for row in _rows(ANSWERS)]


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _frame(prompts: Sequence[str]) -> tuple[str, str]:
    """Return what all prompts have before their question, such as a label, and what they have after it.

    >>> _frame(["Q: What is this?\\nA: ", "Q: Where is it?\\nA: "])
    ('Q: ', '\\nA: ')
    >>> _frame(["What is this? ", "Where is it? "])
    ('', ' ')
    """
    first, last = min(prompts), max(prompts)  # their common beginning is that of all
    if first == last:
        return "", first[len(first.rstrip()) :]
    before = _common(first, last)
    before = before[: max(before.rfind("\n") + 1, before.rfind(": ") + 2 if ": " in before else 0)]
    backwards = [prompt[len(before) :][::-1] for prompt in prompts]
    after = _common(min(backwards), max(backwards))[::-1]
    line = after.find("\n")
    return before, after[line:] if line >= 0 else first[len(first.rstrip()) :]


def _common(a: str, b: str) -> str:
    return "".join(x for x, _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
