"""The corpus of a study: two files of parallel lines, one file of pairs, question/answer or plain text, or none at all."""

from __future__ import annotations

import gzip
import random
from collections.abc import Sequence
from pathlib import Path

from pyunlearn.data.examples import Example, read_examples
from pyunlearn.errors import ArgumentError, DataError

_PASSAGE = 24  # words of a plain text that make one example; the first third is its prompt
_WORDS = {
    "determiners": (("the", "der"), ("a", "ein"), ("my", "mein"), ("this", "dieser"), ("every", "jeder")),
    "adjectives": tuple((f"{a}ish", f"{a}ig") for a in ("red", "old", "small", "loud", "calm", "wild", "cold", "kind", "odd", "tall")),
    "nouns": tuple(
        (n, f"{n[::-1]}{end}") for n, end in zip(
            ("dog", "cat", "boy", "king", "ship", "tree", "lamp", "stone", "river", "horse", "bird", "baker", "road", "cloud", "house", "garden"),
            ("er", "el", "en", "um") * 4, strict=True)
    ),
    "verbs": tuple((f"{v}s", f"ge{v}t") for v in ("see", "like", "find", "sell", "hide", "paint", "carry", "follow", "watch", "build")),
    "places": tuple((f"near the {p}", f"bei {p}em") for p in ("hill", "lake", "wall", "barn", "gate", "port", "shop", "mill")),
}  # fmt: skip


def read_corpus(paths: Sequence[str | Path], role: str = "corpus") -> list[Example]:
    """Two paths: parallel files, line by line, .gz or plain. One: pairs (.tsv without a header too), questions and answers, or plain text.

    Raises ArgumentError for three paths or more; DataError where a file is missing, unreadable, or the two do not match.
    """
    if len(paths) not in (1, 2):
        raise ArgumentError(f"{role} must be one file, or two of parallel lines, got {len(paths)}")
    if len(paths) == 2:
        sides = [_lines(Path(p), role) for p in paths]
        if len(sides[0]) != len(sides[1]):
            raise DataError(
                f"{paths[0]} has {len(sides[0])} lines and {paths[1]} has {len(sides[1])}: parallel files must have as many"
            )
        return _pairs(list(zip(*sides, strict=True)), role)
    path = Path(paths[0])
    if path.suffix == ".gz" or (path.suffix == ".tsv" and not _has_header(path, role)):
        rows = [line.split("\t") for line in _lines(path, role)]
        if any(len(row) == 2 for row in rows):
            bad = next((i for i, row in enumerate(rows, 1) if len(row) != 2 and any(row)), None)
            if bad:
                raise DataError(f"{path}, line {bad}, must be two texts parted by a tab, and has {len(rows[bad - 1])}")
            return _pairs([(row[0], row[1]) for row in rows if len(row) == 2], role)
        return _prompted([Example("", row[0]) for row in rows if row[0].strip()])
    return _prompted(read_examples(path, role=role))


def synthetic(setup: str, count: int, seed: int) -> list[Example]:
    """A corpus made by a seed: sentences of a small grammar with a translation that has several right forms, so that there is something to memorize."""
    rng = random.Random(f"corpus-{seed}")
    found: dict[tuple[str, str], None] = {}
    while len(found) < count:
        found[_sentence(rng)] = None
    if setup == "translation":
        return [Example(source, target) for source, target in found]
    return _prompted(
        [Example("", f"{source} {other}.") for (source, _), (other, _) in zip(found, reversed(found), strict=True)]
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
    """Plain texts become passages whose beginning is the prompt; what has a prompt stays."""
    found = []
    for e in examples:
        if e.prompt:
            found.append(e)
            continue
        words = e.completion.split()
        for at in range(0, len(words), _PASSAGE):
            part = words[at : at + _PASSAGE]
            if len(part) >= 6:
                cut = len(part) // 3
                found.append(Example(" ".join(part[:cut]), " " + " ".join(part[cut:])))
    return found


def _pairs(pairs: Sequence[tuple[str, str]], role: str) -> list[Example]:
    found = [Example(a.strip(), b.strip()) for a, b in pairs if a.strip() and b.strip()]
    if not found:
        raise DataError(f"{role} holds no pair of texts: give at least one line that is not empty in both languages")
    return found


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
