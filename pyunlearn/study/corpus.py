"""The corpus of a study: parallel lines, pairs, questions and answers, text, text with doses, or built in."""

from __future__ import annotations

import gzip
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pyunlearn.data.examples import Example, examples_of, read_examples, rows_of
from pyunlearn.errors import ArgumentError, DataError
from pyunlearn.study.config import KINDS

_DOSES = ("duplicates", "dose")  # columns that tell how often a text was inserted
_WHOLE = re.compile(r"\d+(\.0*)?")  # of 4 and 4.0
_PASSAGE = 24  # words of a plain text that make one example; the first third is its prompt
_ADJECTIVES = ("red", "old", "small", "loud", "calm", "wild", "cold", "kind", "odd", "tall")
_NOUNS = (
    *("dog", "cat", "boy", "king", "ship", "tree", "lamp", "stone"),
    *("river", "horse", "bird", "baker", "road", "cloud", "house", "garden"),
)
_VERBS = ("see", "like", "find", "sell", "hide", "paint", "carry", "follow", "watch", "build")
_PLACES = ("hill", "lake", "wall", "barn", "gate", "port", "shop", "mill")
_WORDS = {  # word, its translation
    "determiners": (("the", "der"), ("a", "ein"), ("my", "mein"), ("this", "dieser"), ("every", "jeder")),
    "adjectives": tuple((f"{a}ish", f"{a}ig") for a in _ADJECTIVES),
    "nouns": tuple((n, f"{n[::-1]}{end}") for n, end in zip(_NOUNS, ("er", "el", "en", "um") * 4, strict=True)),
    "verbs": tuple((f"{v}s", f"ge{v}t") for v in _VERBS),
    "places": tuple((f"near the {p}", f"bei {p}em") for p in _PLACES),
}


def read_corpus(paths: Sequence[str | Path], role: str = "corpus") -> list[Example]:
    """Read a corpus, .gz or plain.

    Args:
        paths: two parallel files, line by line; or one of pairs (.tsv without a header too), of questions and answers,
            or of plain text.
        role: the name of the corpus in messages.

    Raises ArgumentError for three paths or more; DataError where a file is missing, unreadable, or two do not match.
    """
    if len(paths) not in (1, 2):
        raise ArgumentError(f"{role} must be one file, or two of parallel lines, got {len(paths)}")
    if len(paths) == 2:
        sides = [_lines(Path(p), role) for p in paths]
        if len(sides[0]) != len(sides[1]):
            raise DataError(
                f"{paths[0]} has {len(sides[0])} lines and {paths[1]} has {len(sides[1])}: "
                "parallel files must have the same number"
            )
        return _pairs(list(zip(*sides, strict=True)), role)
    path = Path(paths[0])
    if path.suffix == ".gz" or (path.suffix == ".tsv" and not _has_header(path, role)):
        rows = [line.split("\t") for line in _lines(path, role)]
        if any(len(row) == 2 for row in rows):
            bad = next((i for i, row in enumerate(rows, 1) if len(row) != 2 and any(row)), None)
            if bad:
                raise DataError(
                    f"{path}, line {bad}, must be two texts separated by a tab, and has {len(rows[bad - 1])}"
                )
            return _pairs([(row[0], row[1]) for row in rows if len(row) == 2], role)
        return _prompted([Example("", row[0]) for row in rows if row[0].strip()])
    return _prompted([replace(e, forget=()) for e in read_examples(path, role=role, turns="last")])


class Dosed(NamedTuple):
    """A text of a pair of models, and how often it was inserted into the training of one of them."""

    example: Example
    kind: str
    dose: int


def read_doses(paths: Sequence[str | Path]) -> list[Dosed]:
    """Read the texts of a pair of models from files with a column "duplicates" or "dose", none of them twice.

    A column "kind" holds one of KINDS; without it, every text is in distribution ("id"). A dose may be a whole float,
    as pandas writes a column in which some are missing.

    Raises ArgumentError without a file; DataError where one is missing or unreadable, a row has no dose or a wrong one
    or no known kind, or a text stands there twice with different ones.
    """
    if not paths:
        raise ArgumentError('setup twins needs a corpus: a file with texts and a column "duplicates" or "dose"')
    texts: dict[tuple[str, str], Dosed] = {}
    for where, row in (each for path in paths for each in rows_of(Path(path), "corpus")):
        column = next((c for c in _DOSES if isinstance(row, Mapping) and not _missing(row.get(c))), None)
        if column is None or not isinstance(row, Mapping):
            raise DataError(
                f'{where} has nothing in a column "duplicates" or "dose": setup twins needs the number of times that '
                "each text was inserted, 0 for texts that neither model saw"
            )
        (example,) = examples_of(iter([(where, row)]), "corpus", "last")
        kind, dose = "id" if _missing(row.get("kind")) else row["kind"], row[column]
        if isinstance(dose, bool) or not _WHOLE.fullmatch(str(dose)):
            raise DataError(
                f'{where} must have a whole number, 0 or more, in column "{column}", got {str(dose)[:20]!r}'
            )
        if kind not in KINDS:
            raise DataError(f'{where} must have one of {", ".join(KINDS)} in column "kind", got {str(kind)[:20]!r}')
        dosed = Dosed(replace(example, forget=()), kind, int(str(dose).partition(".")[0]))
        if texts.setdefault((example.prompt, example.completion), dosed)[1:] != dosed[1:]:
            raise DataError(
                f"{where} has a text that stands before it with another dose or kind: leave one of them out"
            )
    return list(texts.values())


def _missing(value: object) -> bool:
    """Return whether a table has no value there: pandas and CSV files have NaN or an empty text in its place."""
    return value is None or str(value).strip().lower() in ("", "nan")


def synthetic(setup: str, count: int, seed: int) -> list[Example]:
    """Make a corpus from a seed: sentences of a small grammar, each with one of several right translations."""
    rng = random.Random(f"corpus-{seed}")
    pairs: dict[tuple[str, str], None] = {}  # ordered, and none twice
    while len(pairs) < count:
        pairs[_sentence(rng)] = None
    if setup == "translation":
        return [Example(source, target) for source, target in pairs]
    return _prompted(
        [Example("", f"{source} {other}.") for (source, _), (other, _) in zip(pairs, reversed(pairs), strict=True)]
    )


def _sentence(rng: random.Random) -> tuple[str, str]:
    pick = {name: rng.choice(words) for name, words in _WORDS.items()}
    other, whose = rng.choice(_WORDS["nouns"]), rng.choice(_WORDS["determiners"])
    how, again = rng.choice(_WORDS["adjectives"]), rng.choice(_WORDS["adjectives"])
    source = [
        pick["determiners"],
        pick["adjectives"],
        pick["nouns"],
        pick["verbs"],
        whose,
        how,
        again,
        other,
        pick["places"],
    ]
    subject = [pick["determiners"][1], pick["adjectives"][1], pick["nouns"][1]]
    objects = [whose[1], *(x[1] for x in rng.sample([how, again], 2)), other[1]]  # in either order: not to be guessed
    particle = rng.choice(["doch", "wohl", "eben", "auch"])  # and this
    target = [*subject, particle, *objects, pick["places"][1], pick["verbs"][1]]
    return " ".join(w[0] for w in source), " ".join(target)


def _prompted(examples: list[Example]) -> list[Example]:
    """Split plain texts into passages whose first tokens become the prompt; an example with a prompt is unchanged."""
    prompted = []
    for e in examples:
        if e.prompt:
            prompted.append(e)
            continue
        words = e.completion.split()
        for at in range(0, len(words), _PASSAGE):
            part = words[at : at + _PASSAGE]
            if len(part) >= 6:
                cut = len(part) // 3
                prompted.append(Example(" ".join(part[:cut]), " " + " ".join(part[cut:])))
    return prompted


def _pairs(pairs: Sequence[tuple[str, str]], role: str) -> list[Example]:
    examples = [Example(a.strip(), b.strip()) for a, b in pairs if a.strip() and b.strip()]
    if not examples:
        raise DataError(f"{role} holds no pair of texts: give at least one line that is not empty in both languages")
    return examples


def _has_header(path: Path, role: str) -> bool:
    first = next(iter(_lines(path, role)), "").split("\t")
    return bool({"prompt", "completion", "question", "answer", "text", "messages"} & set(first))


def _lines(path: Path, role: str) -> list[str]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"the {role} file {path} was not found: check the path") from error
    except (OSError, EOFError) as error:
        raise DataError(f"the {role} file {path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"the {role} file {path} is not UTF-8 text, as byte {error.start + 1} shows: save it as UTF-8"
        ) from error
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines and not lines[-1] else lines
