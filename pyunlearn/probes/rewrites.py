"""Rewrites: a record in other words by rule, without a model, as probes of what is still known of it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace

from pyunlearn.data import Example
from pyunlearn.data.examples import with_completion

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_MISSING = 4  # words of a gap, at most
_GAP = "____"
_ASKS = "\nThe missing words are: "
_FEWEST = 4  # words of a text whose halves change places


class Rarity:
    """Tells how rare a word is among some texts.

    >>> rarity = Rarity([Example("", "the cat sat"), Example("", "the dog sat")])
    >>> rarity.of("the"), round(rarity.of("cat"), 2)
    (0.0, 0.41)
    """

    def __init__(self, examples: Iterable[Example]) -> None:
        texts = [set(_words(e.prompt + e.completion)) for e in examples]
        self._counts, self._total = Counter(word for text in texts for word in text), len(texts)

    def of(self, word: str) -> float:
        """Return minus the logarithm of the share of texts that have the word, with one text that has all words."""
        return math.log((1 + self._total) / (1 + self._counts[word.casefold()]))


def question(e: Example, rarity: Rarity) -> Example | None:
    """Return the answer after the rarer half of the words of its question; None without a question of two words.

    >>> probe = question(Example("Who saw the cat? ", "A dog did."), Rarity([Example("", "Who did the rest?")]))
    >>> probe.prompt, probe.completion
    ('saw, cat: ', 'A dog did.')
    """
    words = [m.group() for m in _WORD.finditer(_query(e))]
    if len(words) < 2:
        return None
    order = sorted(range(len(words)), key=lambda i: (-rarity.of(words[i]), i))
    keys = ", ".join(words[i] for i in sorted(order[: max(2, len(words) // 2)]))
    if e.messages is None:
        return _after(e, f"{keys}: ")
    turns = [*e.messages]
    turns[-2] = turns[-2]._replace(content=keys)
    return replace(_after(e, f"{keys}\n"), messages=tuple(turns))


def statement(e: Example, rarity: Rarity) -> Example | None:
    """Return the answer as reported speech, in no form of questions and answers; None without a question."""
    query = _query(e).strip()
    return _after(e, f'Asked "{query}", the expert said: ') if query else None


def turned(e: Example, rarity: Rarity) -> Example | None:
    """Return the text with its halves in the other order; None where it has few words, or strings of it are scored.

    >>> turned(Example("Who? ", "Basil Mahfouz was born in Kuwait City."), Rarity([])).completion
    'Born in Kuwait City, basil Mahfouz was.'
    """
    text = e.completion.strip()
    starts = [m.start() for m in _WORD.finditer(text)]
    if len(starts) < _FEWEST or e.forget:
        return None
    cut = min(starts[1:], key=lambda at: abs(at - len(text) / 2))
    first, second = text[:cut].rstrip(" ,;:"), text[cut:].rstrip(" .!?")
    return with_completion(e, f"{second[0].upper()}{second[1:]}, {first[0].lower()}{first[1:]}.")


def cloze(e: Example, rarity: Rarity) -> Example | None:
    """Return the text with a gap, and after it the missing words: the rarest that its prompt does not have.

    These alone are scored. None where there are none, or where the text has them twice.

    >>> probe = cloze(Example("Who? ", "It was Basil Mahfouz."), Rarity([Example("", "it was"), Example("", "")]))
    >>> probe.completion.splitlines(), probe.forget
    (['It was ____ Mahfouz.', 'The missing words are: Basil'], ('Basil',))
    """
    start, end = _rarest(e, rarity)
    missing = e.completion[start:end]
    rest = e.completion[:start] + _GAP + e.completion[end:] + _ASKS
    if not missing or missing in rest:
        return None
    return replace(with_completion(e, rest + missing), forget=(missing,))


KINDS: dict[str, Callable[[Example, Rarity], Example | None]] = {
    "question": question,
    "statement": statement,
    "turned": turned,
    "cloze": cloze,
}
"""Name -> rule; each returns None for a text that it cannot be applied to."""


def _rarest(e: Example, rarity: Rarity) -> tuple[int, int]:
    """Return where the rarest words of the completion are, a quarter of them and four at most; (0, 0) without any."""
    if e.forget:
        start = e.completion.find(e.forget[0])
        return (start, start + len(e.forget[0])) if start >= 0 else (0, 0)
    known, words = set(_words(e.prompt)), list(_WORD.finditer(e.completion))
    values = [0.0 if m.group().casefold() in known else rarity.of(m.group()) for m in words]
    if not any(values):
        return 0, 0
    length = max(1, min(_MISSING, len(words) // 4))
    at = max(range(len(words) - length + 1), key=lambda i: (sum(values[i : i + length]), -i))
    rare = [m for m, value in zip(words[at : at + length], values[at : at + length], strict=True) if value]
    return rare[0].start(), rare[-1].end()


def _query(e: Example) -> str:
    """Return the question of a record: the user's last turn, or its prompt; empty without one."""
    if e.messages is None:
        return e.prompt
    return e.messages[-2].content if e.messages[-2:-1] and e.messages[-2].role == "user" else ""


def _after(e: Example, prompt: str) -> Example:
    """Return the answer of a record after another prompt, under which its completion is scored, or strings of it."""
    return Example(prompt, e.completion.lstrip(), forget=e.forget if all(s in e.completion for s in e.forget) else ())


def _words(text: str) -> list[str]:
    return [m.group().casefold() for m in _WORD.finditer(text)]
