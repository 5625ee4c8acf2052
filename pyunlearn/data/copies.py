"""Near copies between two sets of texts, found with an inverted index of word n-grams in arrays."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pyunlearn.data.overlap import COMMON, LENGTH, SHORTEST, Words, densest

__all__ = ["near_copies"]

_COVERED = 0.85  # share of a near copy's words that stand in shared n-grams
_DISTINCTIVE = 0.5  # share of its distinctive n-grams that are shared
_FILLED = 0.8  # the same in a text that is mostly template, whose few distinctive n-grams are the content
_RECORD = 50  # in a text of fewer words, another number makes another record
_SEEDED = 0.25  # share of a text's seeds that a document must have to be compared with it
_OWNERS = 64  # texts that one seed leads to: bounds the work where all texts are much alike
_FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)  # any odd ones

Grams: TypeAlias = NDArray[np.uint64]


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

    >>> from pyunlearn.data.overlap import words
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


def _positions(texts: Sequence[Words]) -> dict[Words, list[int]]:
    """Return text -> the indices at which it stands."""
    positions: dict[Words, list[int]] = {}
    for i, text in enumerate(texts):
        positions.setdefault(text, []).append(i)
    return positions


class _Index:
    """Inverted index of the rarest n-grams of texts, which are 64-bit hashes of words in sorted arrays."""

    def __init__(self, positions: dict[Words, list[int]]) -> None:
        self.texts = [text for text in positions if len(text) >= SHORTEST]
        self.indices = [positions[text] for text in self.texts]
        self.vocabulary: dict[str, int] = {}
        for text in self.texts:
            for word in text:
                self.vocabulary.setdefault(word, len(self.vocabulary))
        most = sum(len(text) - LENGTH + 1 for text in self.texts)
        self.known, self.counts = _counted(_joined((np.unique(self.hashed(text)) for text in self.texts), most)[0])
        """N-grams in order, and the number of texts that have each."""
        self.documents = np.zeros(len(self.known), dtype=np.int32)
        """Number of documents that have each."""
        grams, self.seeds = _joined(map(self._rarest, self.texts), most)
        owners = np.repeat(np.arange(len(self.seeds), dtype=np.int32), self.seeds)
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
        near, counts = np.unique(np.concatenate([self.owners[:0], *hits]), return_counts=True)
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


def _counted(grams: Grams) -> tuple[Grams, NDArray[np.int32]]:
    """Return the n-grams of all texts in order, each once, and the number of texts that have it."""
    grams.sort()
    new = np.ones(len(grams) + 1, dtype=bool)  # with the end
    np.not_equal(grams[1:], grams[:-1], out=new[1:-1])
    first = np.flatnonzero(new)
    counts = np.empty(len(first) - 1, dtype=np.int32)
    np.subtract(first[1:], first[:-1], out=counts, casting="same_kind")
    del first  # memory: these arrays are the largest of a run on many short texts
    return grams[new[:-1]], counts


def _joined(arrays: Iterable[Grams], most: int) -> tuple[Grams, NDArray[np.int64]]:
    """Return arrays of at most so many n-grams in all as one, and their lengths, without a list of them in memory."""
    joined, lengths, at = np.empty(most, dtype=np.uint64), array("q"), 0
    for each in arrays:
        joined[at : at + len(each)] = each
        lengths.append(len(each))
        at += len(each)
    return joined[:at], np.array(lengths, dtype=np.int64)


def _among(grams: Grams, known: Grams) -> NDArray[np.bool_]:
    """Return whether each n-gram is among the known ones, which are in order."""
    places = np.minimum(np.searchsorted(known, grams), max(len(known) - 1, 0))
    return known[places] == grams if len(known) else np.zeros(len(grams), dtype=bool)
