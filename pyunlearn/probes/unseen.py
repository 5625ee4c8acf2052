"""Texts and answers that were written for this package, so that no model has seen them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

from pyunlearn.data import Example, read_examples

TEXTS = Path(__file__).with_name("unseen_texts.jsonl")
"""JSONL with register and text: 18 of each of 13 kinds, English and German."""

ANSWERS = Path(__file__).with_name("unseen_answers.jsonl")
"""JSONL with register, prompt and completion: 20 of each of 7 kinds, English."""

_FREQUENT = {
    "English": "the of and to is that for it with are this from you your his her their they have has by or its not be",
    "German": "der das und nicht ist von mit ein eine zu im auf für wird dem sich des sie werden bei oder er es wir",
}  # words that make up about a fifth of a text in the language, and next to nothing of one in another
_SHARE = 0.05  # of the words, from which texts are in the language
_WORDS = 30  # from which the language is judged


def unseen_texts() -> list[Example]:
    """Return the texts."""
    return [Example("", row["text"]) for row in _rows(TEXTS)]


def unseen_like(examples: Sequence[Example]) -> list[Example]:
    """Return the texts; for records with prompts the answers, with their questions in the records' form.

    Their questions are scored where those of the records are.

    >>> records = [Example("Question: Who?\\nAnswer: ", "I."), Example("Question: Why?\\nAnswer: ", "So.")]
    >>> unseen_like(records)[0].prompt
    'Question: What inspired Hadrian Vosk to write his first novel?\\nAnswer: '
    """
    turns = next((e.turns for e in examples if e.prompt), None)
    if turns is None:
        return unseen_texts()
    if any(e.messages for e in examples):
        pairs = [{"question": row["prompt"], "answer": row["completion"]} for row in _rows(ANSWERS)]
        return read_examples(pairs, role="holdout", turns=turns)
    before, after = _frame([e.prompt for e in examples])
    unseen = [Example(before + row["prompt"] + after, row["completion"], turns=turns) for row in _rows(ANSWERS)]
    if turns == "all":  # without the label before the first turn, as in the records
        unseen = [replace(e, spans=((len(before), len(e.prompt + e.completion)),)) for e in unseen]
    return unseen


def other_language(examples: Sequence[Example]) -> str:
    """Return why the texts and answers are of another language than the examples; empty where they are of the same.

    Answers are judged without their prompts, or with them where they have fewer than 30 words; fewer words in all are
    not judged.

    >>> other_language([Example("", "Le conseil municipal a voté hier soir la rénovation de la passerelle." * 4)])
    'the forget texts are neither in English nor in German'
    """
    prompted = any(e.prompt for e in examples)
    words = _words(e.completion for e in examples)
    if words.total() < _WORDS:
        words += _words(e.prompt for e in examples)
    languages = ["English"] if prompted else [*_FREQUENT]
    if words.total() < _WORDS or any(_share(words, language) >= _SHARE for language in languages):
        return ""
    return "the answers are not in English" if prompted else "the forget texts are neither in English nor in German"


def _words(texts: Iterable[str]) -> Counter[str]:
    return Counter(word for text in texts for word in re.findall(r"[^\W\d_]+", text.lower()))


def _share(words: Counter[str], language: str) -> float:
    return sum(words[word] for word in set(_FREQUENT[language].split())) / words.total()


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
