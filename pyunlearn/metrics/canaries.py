"""Canaries: random secrets of a known format, put into a training set on purpose, so that memorization can be measured exactly.

Carlini et al. 2019 (arXiv 1802.08232, section 4). Out of distribution by design.
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pyunlearn.errors import ArgumentError, nearest

ALPHABETS: Mapping[str, str] = {
    "digits": string.digits,
    "hex": string.digits + "abcdef",
    "lower": string.ascii_lowercase,
    "upper": string.ascii_uppercase,
    "letters": string.ascii_letters,
    "alphanumeric": string.ascii_letters + string.digits,
}
"""The alphabets that a template may name without further ado."""

Alphabet = str | Sequence[str]


@dataclass(frozen=True)
class Canaries:
    """Secrets and non_members of one format: uniform draws from its space, all different."""

    template: str
    prefix: str
    """What stands before the first slot, the same in all: it need not be scored."""
    secrets: tuple[str, ...]
    non_members: tuple[str, ...]
    space_bits: float
    """log2 of the number of texts that the template has: the largest exposure there can be."""

    def examples(self, texts: Sequence[str]) -> list[dict[str, str]]:
        """The texts as prompt (the prefix) and completion (the rest, which is scored)."""
        n = len(self.prefix)
        return [{"prompt": self.prefix, "completion": text[n:]} for text in texts]


class InsertedCanaries(NamedTuple):
    """See insert_canaries."""

    texts: list[str]
    """The training set."""
    positions: list[list[int]]
    """Where each secret stands in it, ascending."""


def make_canaries(
    template: str,
    secrets: int = 1,
    non_members: int = 255,
    *,
    slots: Mapping[str, Alphabet | tuple[Alphabet, int]] | None = None,
    seed: int = 0,
) -> Canaries:
    """Secrets and non_members from a template such as "My number is {digits:6}": uniform, all different, none in both.

    A slot {name:length} is filled with `length` symbols (1 if it says nothing), each drawn alone, also where a name comes twice. Symbols of an
    alphabet that is one string stand side by side, words of a list are parted by spaces. Literal braces are written {{ and }}. Since both kinds come
    from one law, a secret that was never trained on has the exposure of unseen text: mean 1.443 bits.

    Args:
        template: text with one slot or more; names are those of ALPHABETS (digits, hex, lower, upper, letters, alphanumeric) or of `slots`.
        secrets: how many to make for insertion, 1 or more.
        non_members: how many to make for comparison; log2(non_members + 1) bits are the most that counting can show.
        slots: name -> alphabet: a string of characters, or a list of words; or (alphabet, length).
        seed: the same seed gives the same canaries.

    Raises:
        ArgumentError: an unknown alphabet, an alphabet with a symbol twice, no slot, a space too small for that many, or fillings that give the same text.
    """
    for name, value in (("secrets", secrets), ("non_members", non_members)):
        if value < 1:
            raise ArgumentError(f"{name} must be 1 or more, got {value}")
    parts = _parse(template, slots or {})
    space = math.prod(len(p.symbols) ** p.length for p in parts)
    wanted = secrets + non_members
    if space < wanted:
        raise ArgumentError(
            f"the template {template!r} has {space} different texts, and {secrets} secrets with {non_members} non_members need {wanted}: "
            f"lengthen a slot, or ask for fewer"
        )
    rng = random.Random(seed)
    drawn: dict[int, None] = {}  # in the order drawn; not a sample of a range, whose length must fit a machine word
    while len(drawn) < wanted:
        drawn[rng.randrange(space)] = None
    texts = tuple(_fill(parts, number) for number in drawn)
    if len(set(texts)) < wanted:
        raise ArgumentError(
            f"the template {template!r} gives the same text for different fillings: put something between its slots of words"
        )
    return Canaries(template, parts[0].before, texts[:secrets], texts[secrets:], math.log2(space))


def insert_canaries(
    texts: Sequence[str], canaries: Canaries | Sequence[str], repeats: int | Sequence[int], seed: int = 0
) -> InsertedCanaries:
    """A training set with each secret `repeats` times among the texts, shuffled throughout.

    Args:
        texts: the training texts; they come back too, in another order.
        canaries: Canaries, or the secrets alone.
        repeats: how often each is put in; one number for all, or one for each secret (0 = a control that is never trained on).
        seed: of the shuffle.

    Returns:
        InsertedCanaries(texts, positions).

    Raises:
        ArgumentError: a secret or reference that the texts already hold, as many numbers of repeats as secrets are wanted, a negative one.
    """
    secrets = canaries.secrets if isinstance(canaries, Canaries) else tuple(canaries)
    non_members = canaries.non_members if isinstance(canaries, Canaries) else ()
    if isinstance(texts, str) or isinstance(canaries, str):
        raise ArgumentError("texts and canaries must be lists of strings, got one string")
    times = [repeats] * len(secrets) if isinstance(repeats, int) else list(repeats)
    if len(times) != len(secrets) or min(times, default=0) < 0:
        raise ArgumentError(
            f"repeats must be 0 or more, one number or {len(secrets)}, one for each secret, got {repeats!r}"
        )
    everything = "\0".join(texts)
    for kind, group in (("secret", secrets), ("reference", non_members)):
        for text in group:
            if text in everything:
                raise ArgumentError(
                    f"the {kind} {text!r} already stands in the texts: make the canaries with another seed"
                )
    owner = [-1] * len(texts) + [i for i, count in enumerate(times) for _ in range(count)]
    order = list(range(len(owner)))
    random.Random(seed).shuffle(order)
    positions: list[list[int]] = [[] for _ in secrets]
    for place, j in enumerate(order):
        if owner[j] >= 0:
            positions[owner[j]].append(place)
    return InsertedCanaries([texts[j] if owner[j] < 0 else secrets[owner[j]] for j in order], positions)


class _Part(NamedTuple):
    """A stretch of text and the slot after it."""

    before: str
    symbols: Sequence[str]
    length: int
    between: str


def _parse(template: str, slots: Mapping[str, Alphabet | tuple[Alphabet, int]]) -> list[_Part]:
    """The template piece by piece; text after the last slot goes with a slot of no symbols to choose from."""
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ArgumentError(
            f"the template {template!r} cannot be read ({error}): write literal braces as {{{{ and }}}}"
        ) from None
    parts, literal = [], ""
    for before, name, length, _ in pieces:
        literal += before
        if name is not None:
            parts.append(_part(literal, name, length or "", slots))
            literal = ""
    if not parts:
        raise ArgumentError(f"the template {template!r} has no slot: write one such as {{digits:6}}")
    return [*parts, _Part(literal, ("",), 1, "")]


def _part(before: str, name: str, length: str, slots: Mapping[str, Alphabet | tuple[Alphabet, int]]) -> _Part:
    if name not in slots and name not in ALPHABETS:
        raise ArgumentError(f"there is no alphabet {name!r}; {nearest(name, [*slots, *ALPHABETS])}")
    alphabet, count = slots.get(name, ALPHABETS.get(name, "")), 1
    if isinstance(alphabet, tuple) and len(alphabet) == 2 and isinstance(alphabet[1], int):
        alphabet, count = alphabet
    if length:
        count = int(length) if length.isdecimal() else 0
    if count < 1:
        raise ArgumentError(
            f"the slot {name!r} must have a whole number of symbols, 1 or more, got {length or count!r}"
        )
    symbols = tuple(alphabet)  # type: ignore[arg-type]
    if not symbols or len(set(symbols)) < len(symbols) or not all(isinstance(s, str) and s for s in symbols):
        raise ArgumentError(f"the alphabet {name!r} must hold different symbols, each once, got {alphabet!r}")
    return _Part(before, symbols, count, "" if isinstance(alphabet, str) else " ")


def _fill(parts: Sequence[_Part], number: int) -> str:
    """The text that a number below the size of the space stands for: its digits, in the base of each alphabet."""
    text = ""
    for part in parts:
        symbols = []
        for _ in range(part.length):
            number, digit = divmod(number, len(part.symbols))
            symbols.append(part.symbols[digit])
        text += part.before + part.between.join(symbols)
    return text
