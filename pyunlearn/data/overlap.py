"""Texts as normalized words and n-grams of them, for the search for copies."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence, Set
from typing import TypeAlias, TypeVar

__all__ = [
    "COMMON",
    "LENGTH",
    "SHORTEST",
    "Gram",
    "Words",
    "densest",
    "ngrams",
    "present",
    "searched",
    "words",
    "words_of",
]

SHORTEST = 8
"""Words of the shortest text of which near copies are searched; a shorter one can only be equal."""

LENGTH = 3
"""Words of an n-gram."""

COMMON = 4
"""Texts that have a distinctive n-gram, at most; one of more texts, on either side, belongs to a template."""

_ALONE = 16  # words of the shortest completion that is also searched for without its prompt

# scripts without spaces between words: each character is a word
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W_{_UNSPACED}]+")
_ASCII = bytes(ord(chr(i).lower()) if chr(i).isalnum() else 32 for i in range(128)) + bytes(128)  # the same, faster

Words: TypeAlias = tuple[str, ...]
Gram: TypeAlias = tuple[str, ...]
G = TypeVar("G", bound=Hashable)


def words(text: str) -> Words:
    """Return the words of a text without case, punctuation and Unicode variants; of a text without words, its signs.

    >>> words("It's  TWO\\n“words”"), words("?!")
    (('it', 's', 'two', 'words'), ('?!',))
    """
    if text.isascii() and (split := text.encode("ascii").translate(_ASCII).decode("ascii").split()):
        return tuple(split)
    folded = unicodedata.normalize("NFKC", text).casefold()
    return tuple(_WORD.findall(folded)) or (" ".join(folded.split()),)


def words_of(texts: Iterable[str]) -> list[Words]:
    """Return the words of each text, so that equal words of all texts are in memory once.

    >>> words_of(["Once upon", "a time, once"])
    [('once', 'upon'), ('a', 'time', 'once')]
    """
    shared: dict[str, str] = {}
    return [tuple(map(shared.setdefault, each, each)) for each in map(words, texts)]


def searched(texts: Sequence[Words], completions: Sequence[Words]) -> list[tuple[int, Words]]:
    """Return (index of the example, words to search for): of each its text, of some the completion alone.

    A completion of 16 words or more, after a prompt, is searched for alone where no other example has it.

    Args:
        texts: words of each example, the prompt included.
        completions: words of its completion; without a prompt, those of the text.
    """
    times = Counter(completion for _, completion in set(zip(texts, completions, strict=True)))
    both = list(zip(texts, completions, strict=True))
    alone = [
        (i, completion)
        for i, (text, completion) in enumerate(both)
        if text != completion and len(completion) >= _ALONE and times[completion] == 1
    ]
    return [*enumerate(texts), *alone]


def present(completion: Words, document: Words) -> bool:
    """Return True where the document has at least 3 in 4 words of the completion."""
    return 4 * (Counter(completion) - Counter(document)).total() <= len(completion)


def ngrams(text: Words, length: int = LENGTH) -> list[Gram]:
    """Return the n-grams of a text in order.

    >>> ngrams(words("to be or not"))
    [('to', 'be', 'or'), ('be', 'or', 'not')]
    """
    return list(zip(*(text[i:] for i in range(length)), strict=False))


def densest(grams: Sequence[G], wanted: Set[G], width: int) -> Sequence[G]:
    """Return the stretch of at most `width` n-grams with the most wanted ones."""
    hits = [at for at, gram in enumerate(grams) if gram in wanted]
    best, start = (0, 0), 0
    for end, hit in enumerate(hits):
        while hit - hits[start] >= width:
            start += 1
        best = max(best, (end - start + 1, -hits[start]))
    return grams[-best[1] : -best[1] + width]
