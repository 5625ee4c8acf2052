"""Search of a training corpus for given texts: an inverted index of the texts' n-grams, in which records are looked up.

The index is exact, and its size is that of the texts: signatures such as MinHash would save nothing, since they replace
the n-grams of a corpus that is compared with itself, and here each record is looked up once and dropped.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from pyunlearn.data.corpus import Corpus, record_text
from pyunlearn.data.examples import Example, read_examples
from pyunlearn.data.overlap import COMMON, LENGTH, SHORTEST, Gram, Words, densest, ngrams, present, searched, words
from pyunlearn.errors import DataError
from pyunlearn.options import Config, Flag, Number, accepts, option, require
from pyunlearn.progress import Progress

__all__ = ["CorpusCopies", "CorpusCopy", "FindConfig", "TextIndex", "find_copies"]

_STEP = 1000  # records between two updates of the progress bar
_ROUNDING = 1e-9  # of threshold times n-grams, so that 0.7 of 10 n-grams are 7


@dataclass(frozen=True, kw_only=True)
class FindConfig(Config):
    """The settings of `pyunlearn.find_copies`."""

    threshold: float = option(
        0.5,
        Number(above=0, maximum=1),
        "Share of a text's runs of three words that a record must have. At the default one word in six may be changed, "
        "since each is part of three runs. Texts of fewer than 8 words must be in the record word for word.",
        group="Method",
    )


class CorpusCopy(NamedTuple):
    """One text in one record of a corpus."""

    source: str
    """The file; "corpus" for records of an iterable."""
    row: int
    """Line of the file at which the record begins; in .json and .parquet, and of an iterable, its number from 1 on."""
    text: int
    """Number of the text, from 1 on."""
    share: float
    """Share of the text's runs of three words that the record has close together, 0 to 1."""
    exact: bool
    """True where the record has all words of the text in a row, regardless of case and punctuation."""


@dataclass(frozen=True)
class CorpusCopies:
    """Copies of texts in a corpus: iterates over its rows, which are in the order of the corpus."""

    rows: list[CorpusCopy] = field(repr=False)
    texts: list[str] = field(repr=False)
    """The texts that were searched for, as they are compared."""
    records: int
    """Records of the corpus."""
    settings: dict[str, Any]

    def __iter__(self) -> Iterator[CorpusCopy]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def texts_with_copies(self) -> int:
        """Number of texts that are in a record."""
        return len({row.text for row in self.rows})

    @property
    def records_with_copies(self) -> int:
        """Number of records that have a text."""
        return len({(row.source, row.row) for row in self.rows})

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers and all rows, ready for JSON; no text is in it."""
        return {
            "texts": len(self.texts),
            "texts_with_copies": self.texts_with_copies,
            "records": self.records,
            "records_with_copies": self.records_with_copies,
            "settings": self.settings,
            "rows": [row._asdict() for row in self.rows],
        }


@accepts(FindConfig)
def find_copies(
    texts: Any,
    corpus: Any,
    *,
    config: FindConfig | str | Path | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> CorpusCopies:
    """List the records of a training corpus that contain one of the texts, or nearly contain it.

    Texts are compared as words, without case, punctuation and Unicode variants. Runs of three words that five or more
    of the texts have belong to a template: of the other runs the record must have the same share. Of a text with a
    prompt, it must have most words of the completion, and a completion of 16 words or more is also searched for alone.
    The corpus is read once, row by row; memory grows with the texts and their copies, not with the corpus. No model is
    needed.

    Args:
        texts: the texts to search for: a text, a list of texts or dicts, a datasets.Dataset, or a path, as `forget` of
            `pyunlearn.unlearn`.
        corpus: a path or a list of paths, of files (.jsonl, .csv, .tsv, .txt, .parquet row by row; .json whole) or of
            folders with such files; or an iterable of texts or dicts, such as a generator or a datasets.Dataset. All
            strings of a record are searched, in all columns, lists and objects.
        config: a FindConfig, or a TOML file to read one from; keywords change single settings of it.
        progress: a progress bar on standard error. Default: where that is a terminal.
        {options}

    Returns:
        CorpusCopies: `.rows` (a CorpusCopy for each text in each record), `.records`, `.texts_with_copies`,
        `.records_with_copies`, `.to_dict()`.

    Raises:
        ArgumentError, DataError, DependencyError: an argument or a row that cannot be used.

    >>> letters = ["Dear Ann, the boat left the harbour at dawn and was never seen again. Tom", "Dear Tom, thank you."]
    >>> find_copies("The boat left the harbour at dawn, and was never seen again.", letters).rows
    [CorpusCopy(source='corpus', row=1, text=1, share=1.0, exact=True)]
    """
    config = FindConfig.of(config, settings, "find_copies")
    if progress is not None:
        require(Flag(), progress=progress)
    examples = read_examples(texts, role="texts")
    records = Corpus(corpus)
    index = TextIndex(examples, config.threshold)
    rows: list[CorpusCopy] = []
    number = position = 0
    bar = Progress(progress, "searching")
    try:
        if records.size:
            bar.begin("", records.size)
        for number, record in enumerate(records, 1):
            rows += [CorpusCopy(record.source, record.row, *copy) for copy in index.copies_in(record.text)]
            if number % _STEP == 0:
                bar.advance(records.position - position)
                bar.say(f"{number:,} records · {len(rows):,} copies")
                position = records.position
    finally:
        bar.close()
    if not number:
        raise DataError("corpus holds no record: give a file or an iterable with at least one")
    return CorpusCopies(rows, index.texts, number, config.to_dict())


class _Query(NamedTuple):
    """Words to search for: of a text, or of its completion alone."""

    number: int  # of the text, from 1 on
    words: Words
    completion: Words  # of which a record must have most words; empty where the words are those of the completion
    grams: frozenset[Gram]  # one of all words where there are fewer than LENGTH
    least: int  # of them that a record must have
    distinctive: frozenset[Gram]  # those that no template has
    least_distinctive: int


class TextIndex:
    """Inverted index of the n-grams of texts.

    A record that has `least` of a text's m n-grams has one of any m - least + 1 of them. So only that many seeds of a
    text lead to it, those that the fewest texts have: runs that many texts share are not followed, and no copy is
    missed.

    Args:
        examples: the texts.
        threshold: share of a text's n-grams that a record must have.
    """

    def __init__(self, examples: Sequence[Example], threshold: float) -> None:
        self.texts = [record_text(e) or "" for e in examples]
        whole, completions = [_words(text) for text in self.texts], [_words(e.completion) for e in examples]
        queries = searched(whole, completions)
        counts = Counter(chain.from_iterable(map(_grams, {query for _, query in queries})))
        self.queries: list[_Query] = []
        self.seeds: dict[int, dict[Gram, list[int]]] = {}  # words of a gram -> gram -> indices of queries
        for at, (i, text) in enumerate(queries):
            completion = completions[i] if at < len(whole) and text != completions[i] else ()
            query = _query(i + 1, text, completion, threshold, counts)
            # of those equally rare among the texts, the longer ones: "of the" is in most records
            rarest = sorted(query.distinctive, key=lambda gram: (counts[gram], -sum(map(len, gram)), gram))
            for gram in rarest[: len(rarest) - query.least_distinctive + 1]:
                self.seeds.setdefault(len(gram), {}).setdefault(gram, []).append(at)
            self.queries.append(query)

    def copies_in(self, text: str) -> list[tuple[int, float, bool]]:
        """Return (number of the text, share of its n-grams, whether it is exact) of the texts that a record contains.

        >>> TextIndex([Example("", "a word"), Example("", "another")], 0.5).copies_in("Is this a word?")
        [(1, 1.0, True)]
        """
        document = words(text)
        near: set[int] = set()
        for length, seeds in self.seeds.items():
            for gram in seeds.keys() & ngrams(document, length):
                near.update(seeds[gram])
        best: dict[int, tuple[float, bool]] = {}
        for at in near:
            query = self.queries[at]
            if match := _match(query, document):
                best[query.number] = max(match, best.get(query.number, match))
        return [(number, *best[number]) for number in sorted(best)]


def _words(text: str) -> Words:
    """Return the words of a text; equal ones are one object in memory."""
    return tuple(map(sys.intern, words(text)))


def _grams(text: Words) -> frozenset[Gram]:
    return frozenset(ngrams(text, min(LENGTH, len(text))))


def _query(number: int, text: Words, completion: Words, threshold: float, counts: Mapping[Gram, int]) -> _Query:
    """Return what is searched for; of a text that is all template, or of a few words, all n-grams are wanted."""
    grams = _grams(text)
    distinctive = frozenset(gram for gram in grams if counts[gram] <= COMMON)
    if len(text) < SHORTEST or not distinctive:
        return _Query(number, text, completion, grams, len(grams), grams, len(grams))
    least, least_distinctive = (math.ceil(threshold * len(each) - _ROUNDING) for each in (grams, distinctive))
    return _Query(number, text, completion, grams, least, distinctive, least_distinctive)


def _match(query: _Query, document: Words) -> tuple[float, bool] | None:
    """Return the share of the query's n-grams that a record has, and whether it is exact; None where it is no copy."""
    grams = ngrams(document, min(LENGTH, len(query.words)))
    shared = query.grams.intersection(grams)
    if len(shared) < query.least:
        return None
    if len(shared) == len(query.grams) and f" {' '.join(query.words)} " in f" {' '.join(document)} ":
        return 1.0, True
    if len(query.words) < SHORTEST:
        return None
    if len(document) > 2 * len(query.words):  # n-grams that are scattered over a long record make no copy
        shared = query.grams.intersection(densest(grams, set(query.grams), len(query.words) + len(query.words) // 4))
    if len(shared) < query.least or len(shared & query.distinctive) < query.least_distinctive:
        return None
    return (len(shared) / len(query.grams), False) if present(query.completion, document) else None
