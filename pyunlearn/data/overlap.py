"""Near copies between two sets of texts: normalized words, and an inverted index of word n-grams."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence, Set
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

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
    "words_of",
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
Grams: TypeAlias = NDArray[np.uint64]
G = TypeVar("G", bound=Hashable)
_FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)  # any odd ones


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
    equal = _positions(texts)
    index = _Index(equal)
    for document in set(documents):  # a repeated document does not make a template
        index.count_document(document)
    pairs = set()
    for number, document in enumerate(documents):
        pairs |= {(i, number) for i in (*equal.get(document, ()), *index.contained_in(document))}
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


class _Index:
    """Inverted index of the rarest n-grams of texts, which are 64-bit hashes of words in sorted arrays."""

    def __init__(self, positions: dict[Words, list[int]]) -> None:
        self.texts = [text for text in positions if len(text) >= SHORTEST]
        self.indices = [positions[text] for text in self.texts]
        self.vocabulary: dict[str, int] = {}
        for text in self.texts:
            for word in text:
                self.vocabulary.setdefault(word, len(self.vocabulary))
        self.known, self.counts = _counted([np.unique(self.hashed(text)) for text in self.texts])
        """N-grams in order, and the number of texts that have each."""
        self.documents = np.zeros(len(self.known), dtype=np.int32)
        """Number of documents that have each."""
        seeds = [self._rarest(text) for text in self.texts]
        self.seeds = np.array([len(own) for own in seeds], dtype=np.int64)
        owners = np.repeat(np.arange(len(seeds), dtype=np.int32), self.seeds)
        grams = _joined(seeds)
        order = np.argsort(grams, kind="stable")
        self.seed_grams, self.owners = grams[order], owners[order]

    def hashed(self, text: Words) -> Grams:
        """Return the n-grams of a text in order; words of no text are one word."""
        ids = np.array([self.vocabulary.get(word, -1) for word in text]).astype(np.uint64)
        return sum((ids[i : len(ids) - LENGTH + 1 + i] * factor for i, factor in enumerate(_FACTORS)), np.uint64(0))

    def count_document(self, document: Words) -> None:
        """Count a document for the n-grams that it has."""
        if len(document) >= SHORTEST:
            grams = np.unique(self.hashed(document))
            self.documents[self._places(grams[_among(grams, self.known)])] += 1

    def contained_in(self, document: Words) -> list[int]:
        """Return the indices of the texts that a document contains."""
        if len(document) < SHORTEST or not self.texts:
            return []
        grams = np.unique(self.hashed(document))
        first, end = (np.searchsorted(self.seed_grams, grams, side) for side in ("left", "right"))
        hits = [self.owners[a : min(a + _OWNERS, b)] for a, b in zip(first, end, strict=True) if a < b]
        near, counts = np.unique(_joined(hits), return_counts=True)
        near = near[counts >= _SEEDED * self.seeds[near]] if len(near) else near
        return [i for each in near for i in self.indices[each] if self._contains(document, int(each))]

    def _rarest(self, text: Words) -> Grams:
        """Return half of the n-grams of a text, those that the fewest texts have; all of a short one."""
        grams = np.unique(self.hashed(text))
        rarest = grams[np.argsort(self.counts[self._places(grams)], kind="stable")]
        return rarest[: max(SHORTEST, len(rarest) // 2)]

    def _places(self, grams: Grams) -> NDArray[np.int64]:
        return np.searchsorted(self.known, grams)

    def _contains(self, document: Words, i: int) -> bool:
        """Return True where the document contains text `i` or a near copy of it."""
        text = self.texts[i]
        grams, own = (self.hashed(each).tolist() for each in (document, text))
        if len(document) > 2 * len(text):
            grams = densest(grams, set(own), len(text) + len(text) // 4)
        shared = set(grams)
        if shared.issuperset(own):
            return True
        covered = {at + k for at, gram in enumerate(own) if gram in shared for k in range(LENGTH)}
        if len(covered) < _COVERED * len(text):
            return False
        numbers = {w for w in text if any(map(str.isdigit, w))} if len(text) < _RECORD else set()
        if not numbers <= set(document):
            return False
        different = np.unique(self.hashed(text))
        places = self._places(different)
        common = np.maximum(self.counts[places], self.documents[places])
        distinctive = set(different[common <= COMMON].tolist())
        most = 2 * len(distinctive) < len(different)  # of the text is template
        return len(distinctive & shared) >= max(1, (_FILLED if most else _DISTINCTIVE) * len(distinctive))


def _counted(each: list[Grams]) -> tuple[Grams, NDArray[np.int32]]:
    """Return the n-grams of all texts in order, each once, and the number of texts that have it."""
    grams = _joined(each)
    each.clear()
    grams.sort()
    first = np.flatnonzero(np.diff(grams, prepend=~grams[:1]))
    return grams[first], np.diff(first, append=len(grams)).astype(np.int32)


def _joined(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype=np.uint64)


def _among(grams: Grams, known: Grams) -> NDArray[np.bool_]:
    """Return whether each n-gram is among the known ones, which are in order."""
    places = np.minimum(np.searchsorted(known, grams), max(len(known) - 1, 0))
    return known[places] == grams if len(known) else np.zeros(len(grams), dtype=bool)


def densest(grams: Sequence[G], wanted: Set[G], width: int) -> Sequence[G]:
    """Return the stretch of at most `width` n-grams with the most wanted ones."""
    hits = [at for at, gram in enumerate(grams) if gram in wanted]
    best, start = (0, 0), 0
    for end, hit in enumerate(hits):
        while hit - hits[start] >= width:
            start += 1
        best = max(best, (end - start + 1, -hits[start]))
    return grams[-best[1] : -best[1] + width]
