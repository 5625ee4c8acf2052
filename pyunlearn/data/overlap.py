"""Near copies between two sets of texts: normalized words, and an inverted index of word n-grams."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeAlias

__all__ = [
    "COMMON",
    "LENGTH",
    "SHORTEST",
    "Gram",
    "Words",
    "densest",
    "near_copies",
    "ngrams",
    "present",
    "searched",
    "words",
]

SHORTEST = 8
"""Words of the shortest text of which near copies are searched; a shorter one can only be equal."""

LENGTH = 3
"""Words of an n-gram."""

COMMON = 4
"""Texts that have a distinctive n-gram, at most; one of more texts, on either side, belongs to a template."""

_ALONE = 16  # words of the shortest completion that is also searched for without its prompt
_COVERED = 0.85  # share of a near copy's words that stand in shared n-grams
_DISTINCTIVE = 0.5  # share of its distinctive n-grams that are shared
_FILLED = 0.8  # the same in a text that is mostly template, whose few distinctive n-grams are the content
_RECORD = 50  # in a text of fewer words, another number makes another record
_SEEDED = 0.25  # share of a text's seeds that a document must have to be compared with it
_OWNERS = 64  # texts that one seed leads to: bounds the work where all texts are much alike

# scripts without spaces between words: each character is a word
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W_{_UNSPACED}]+")
_ASCII = bytes(ord(chr(i).lower()) if chr(i).isalnum() else 32 for i in range(128)) + bytes(128)  # the same, faster

Words: TypeAlias = tuple[str, ...]
Gram: TypeAlias = tuple[str, ...]


def words(text: str) -> Words:
    """Return the words of a text without case, punctuation and Unicode variants; of a text without words, its signs.

    >>> words("It's  TWO\\n“words”"), words("?!")
    (('it', 's', 'two', 'words'), ('?!',))
    """
    if text.isascii() and (split := text.encode("ascii").translate(_ASCII).decode("ascii").split()):
        return tuple(split)
    folded = unicodedata.normalize("NFKC", text).casefold()
    return tuple(_WORD.findall(folded)) or (" ".join(folded.split()),)


def near_copies(texts: Sequence[Words], documents: Sequence[Words]) -> list[tuple[int, int]]:
    """Find the documents that are equal to a text, or contain it whole or with few words changed.

    A document contains a text if 85 % of the text's words stand in runs of three words that the document has too, close
    together. Two texts of one template are no copies of each other: runs that five or more texts have on either side
    belong to a template, and half of the other runs must be shared too, 80 % where the template is most of the text.
    Nor are two texts of fewer than 50 words that differ in a number, since the number makes the record.

    The time is linear in the number of texts: 10,000 against 10,000 of 40 words take 2 to 5 seconds.

    Args:
        texts: texts of one set, as `words` returns them.
        documents: texts of the other set.

    Returns:
        Pairs (index of the text, index of the document), in order.

    >>> text = words("The boat left the harbour at dawn and nobody saw it again.")
    >>> letter = words("Dear aunt, the boat left the port at dawn, and nobody saw it again! Yours, Tom")
    >>> near_copies([text], [words("The boat."), letter])
    [(0, 1)]
    """
    equal, index = _positions(texts), _Index(texts)
    shared = [index.known(document) for document in documents]
    first = dict(zip(documents, shared, strict=True))  # a repeated document does not make a template
    index.count_documents(first.values())
    pairs = set()
    for number, (document, grams) in enumerate(zip(documents, shared, strict=True)):
        pairs |= {(i, number) for i in equal.get(document, ())}
        pairs |= {(i, number) for i in index.contained_in(document, grams)}
    return sorted(pairs)


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


def _positions(texts: Sequence[Words]) -> dict[Words, list[int]]:
    """Return text -> the indices at which it stands."""
    positions: dict[Words, list[int]] = {}
    for i, text in enumerate(texts):
        positions.setdefault(text, []).append(i)
    return positions


def ngrams(text: Words, length: int = LENGTH) -> list[Gram]:
    """Return the n-grams of a text in order.

    >>> ngrams(words("to be or not"))
    [('to', 'be', 'or'), ('be', 'or', 'not')]
    """
    return list(zip(*(text[i:] for i in range(length)), strict=False))


@dataclass
class _Entry:
    """One indexed text."""

    indices: list[int]  # at which the text stands
    grams: list[Gram]  # in order
    numbers: set[str]  # that a copy must have
    seeds: int

    @property
    def length(self) -> int:
        return len(self.grams) + LENGTH - 1


class _Index:
    """Inverted index of the rarest n-grams of texts."""

    def __init__(self, texts: Sequence[Words]) -> None:
        long = {text: at for text, at in _positions(texts).items() if len(text) >= SHORTEST}
        grams = {text: ngrams(text) for text in long}
        self.counts = Counter(chain.from_iterable(map(set, grams.values())))  # n-gram -> number of texts
        self.entries: list[_Entry] = []
        self.owners: dict[Gram, list[int]] = {}  # seed -> indices of entries
        self.documents: Counter[Gram] = Counter()  # n-gram -> number of documents
        for text, indices in long.items():
            rarest = sorted(set(grams[text]), key=self.counts.__getitem__)
            seeds = rarest[: max(SHORTEST, len(rarest) // 2)]
            for gram in seeds:
                self.owners.setdefault(gram, []).append(len(self.entries))
            numbers = {w for w in text if any(map(str.isdigit, w))} if len(text) < _RECORD else set()
            self.entries.append(_Entry(indices, grams[text], numbers, len(seeds)))

    def known(self, document: Words) -> set[Gram]:
        """Return the n-grams of a document that some text has."""
        return self.counts.keys() & set(ngrams(document)) if len(document) >= SHORTEST else set()

    def count_documents(self, documents: Iterable[set[Gram]]) -> None:
        """Count the documents that have each n-gram, given the known n-grams of each document."""
        self.documents.update(chain.from_iterable(documents))

    def contained_in(self, document: Words, known: set[Gram]) -> list[int]:
        """Return the indices of the texts that a document contains, given its known n-grams."""
        hits = Counter(chain.from_iterable(self.owners[g][:_OWNERS] for g in known if g in self.owners))
        near = [self.entries[i] for i, count in hits.items() if count >= _SEEDED * self.entries[i].seeds]
        return [i for entry in near if self._contains(document, entry) for i in entry.indices]

    def _contains(self, document: Words, entry: _Entry) -> bool:
        """Return True where the document contains the text of the entry or a near copy of it."""
        grams = ngrams(document)
        if len(document) > 2 * entry.length:
            grams = densest(grams, set(entry.grams), entry.length + entry.length // 4)
        shared = set(grams)
        if shared.issuperset(entry.grams):
            return True
        covered = {at + i for at, gram in enumerate(entry.grams) if gram in shared for i in range(LENGTH)}
        if len(covered) < _COVERED * entry.length:
            return False
        if not entry.numbers <= set(document):
            return False
        distinctive = {g for g in entry.grams if max(self.counts[g], self.documents[g]) <= COMMON}
        most = 2 * len(distinctive) < len(set(entry.grams))  # of the text is template
        return len(distinctive & shared) >= max(1, (_FILLED if most else _DISTINCTIVE) * len(distinctive))


def densest(grams: list[Gram], wanted: set[Gram], width: int) -> list[Gram]:
    """Return the stretch of at most `width` n-grams with the most wanted ones."""
    hits = [at for at, gram in enumerate(grams) if gram in wanted]
    best, start = (0, 0), 0
    for end, hit in enumerate(hits):
        while hit - hits[start] >= width:
            start += 1
        best = max(best, (end - start + 1, -hits[start]))
    return grams[-best[1] : -best[1] + width]
