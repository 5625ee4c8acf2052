"""Canaries: random secrets of a known format, inserted into a training set so that memorization is measured exactly.

They are out of distribution by design. Source: Carlini et al. 2019, arXiv 1802.08232, section 4.
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

from pyunlearn.errors import ArgumentError, nearest
from pyunlearn.metrics._check import at_least_one, lists_of_texts

ALPHABETS: Mapping[str, str] = {
    "digits": string.digits,
    "hex": string.digits + "abcdef",
    "lower": string.ascii_lowercase,
    "upper": string.ascii_uppercase,
    "letters": string.ascii_letters,
    "alphanumeric": string.ascii_letters + string.digits,
}
"""Alphabets that a template may name without defining them."""

Alphabet = str | Sequence[str]


@dataclass(frozen=True)
class Canaries:
    """Secrets and non-members of one format: uniform draws from its space, all different."""

    template: str
    prefix: str
    """The text before the first slot, the same in all: it need not be scored."""
    secrets: tuple[str, ...]
    """Texts to insert into the training set."""
    non_members: tuple[str, ...]
    """Texts of the same format that stay out of it."""
    space_bits: float
    """log2 of the number of texts that the template has: the largest exposure possible."""

    def examples(self, texts: Sequence[str]) -> list[dict[str, str]]:
        """Split texts of this format into prompt (the prefix) and completion (the rest, which is scored)."""
        n = len(self.prefix)
        return [{"prompt": self.prefix, "completion": text[n:]} for text in texts]


class InsertedCanaries(NamedTuple):
    """Training set with inserted secrets: the result of insert_canaries."""

    texts: list[str]
    """The training set."""
    positions: list[list[int]]
    """For each secret, its indices in the training set, ascending."""


def make_canaries(
    template: str,
    secrets: int = 1,
    non_members: int = 255,
    *,
    slots: Mapping[str, Alphabet | tuple[Alphabet, int]] | None = None,
    seed: int = 0,
) -> Canaries:
    """Draw secrets and non-members from a template, uniformly and all different.

    A slot {name:length} is filled with `length` symbols (default 1), drawn independently, also where a name occurs
    twice. Symbols of an alphabet that is one string are concatenated, words of a list are separated by spaces. Literal
    braces are written {{ and }}. Both kinds follow one distribution, so a secret that was never trained on has the
    exposure of unseen text: mean 1.443 bits.

    Args:
        template: text with one slot or more, such as "My number is {digits:6}"; names are digits, hex, lower, upper,
            letters, alphanumeric or those of `slots`.
        secrets: number of texts to insert, 1 or more.
        non_members: number of texts to compare with; log2(non_members + 1) bits are the most that counting can show.
        slots: name -> alphabet: a string of characters, or a list of words; or (alphabet, length).
        seed: the same seed draws the same canaries.

    Returns:
        Canaries.

    Raises:
        ArgumentError: an unknown alphabet, an alphabet with a repeated symbol, no slot, a space smaller than the number
            of texts, or different fillings that make the same text.

    Example:
        >>> canaries = make_canaries("My number is {digits:6}", secrets=2, non_members=100)
        >>> len(set(canaries.secrets + canaries.non_members)), round(canaries.space_bits, 2)
        (102, 19.93)
        >>> canaries.examples(["My number is 123456"])
        [{'prompt': 'My number is ', 'completion': '123456'}]

    See Also:
        insert_canaries: puts the secrets into a training set. exposure: their exposure among the non-members.

    Source: Carlini et al. 2019, arXiv 1802.08232, section 4.
    """
    at_least_one(secrets=secrets, non_members=non_members)
    parts = _parse(template, slots or {})
    space = math.prod(len(p.symbols) ** p.length for p in parts)
    total = secrets + non_members
    if space < total:
        raise ArgumentError(
            f"the template {template!r} has {space} different texts, and {secrets} secrets with {non_members} "
            f"non_members need {total}: lengthen a slot, or take fewer"
        )
    rng = random.Random(seed)
    drawn: dict[int, None] = {}  # ordered set; random.sample(range(space)) fails beyond a machine word
    while len(drawn) < total:
        drawn[rng.randrange(space)] = None
    texts = tuple(_fill(parts, number) for number in drawn)
    if len(set(texts)) < total:
        raise ArgumentError(
            f"the template {template!r} makes the same text for different fillings: separate its slots of words"
        )
    return Canaries(template, parts[0].before, texts[:secrets], texts[secrets:], math.log2(space))


def insert_canaries(
    texts: Sequence[str], canaries: Canaries | Sequence[str], repeats: int | Sequence[int], seed: int = 0
) -> InsertedCanaries:
    """Insert each secret `repeats` times into a training set and shuffle the whole.

    Args:
        texts: the training texts.
        canaries: Canaries, or the secrets alone.
        repeats: copies of each secret: one number for all, or one for each (0 = a control that is never trained on).
        seed: seed of the shuffle.

    Returns:
        InsertedCanaries(texts, positions).

    Raises:
        ArgumentError: a secret or non-member that the texts already contain, another number of repeats than of secrets,
            a negative one.

    Example:
        >>> result = insert_canaries(["a", "b", "c"], ["my secret"], repeats=2)
        >>> sorted(result.texts)
        ['a', 'b', 'c', 'my secret', 'my secret']
        >>> [result.texts[i] for i in result.positions[0]]
        ['my secret', 'my secret']

    Source: Carlini et al. 2019, arXiv 1802.08232, section 4.
    """
    secrets = canaries.secrets if isinstance(canaries, Canaries) else canaries
    non_members = canaries.non_members if isinstance(canaries, Canaries) else ()
    lists_of_texts(texts=texts, canaries=secrets)
    copies = list(repeats) if isinstance(repeats, Collection) else [repeats] * len(secrets)
    if len(copies) != len(secrets) or not all(isinstance(count, Integral) and count >= 0 for count in copies):
        raise ArgumentError(
            f"repeats must be 0 or more, one number or {len(secrets)}, one for each secret, got {repeats!r}"
        )
    everything = "\0".join(texts)
    for kind, group in (("secret", secrets), ("non-member", non_members)):
        for text in group:
            if text in everything:
                raise ArgumentError(
                    f"the texts already contain the {kind} {text!r}: make the canaries with another seed"
                )
    owner = [-1] * len(texts) + [i for i, count in enumerate(copies) for _ in range(count)]
    order = list(range(len(owner)))
    random.Random(seed).shuffle(order)
    positions: list[list[int]] = [[] for _ in secrets]
    for position, j in enumerate(order):
        if owner[j] >= 0:
            positions[owner[j]].append(position)
    return InsertedCanaries([texts[j] if owner[j] < 0 else secrets[owner[j]] for j in order], positions)


class _Part(NamedTuple):
    """Literal text and the slot after it."""

    before: str
    symbols: Sequence[str]
    length: int
    between: str


def _parse(template: str, slots: Mapping[str, Alphabet | tuple[Alphabet, int]]) -> list[_Part]:
    """Split the template into parts; text after the last slot forms a part whose slot has one empty symbol."""
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ArgumentError(
            f"the template {template!r} cannot be read ({error}): write literal braces as {{{{ and }}}}"
        ) from None
    parts, literal = [], ""
    for before, name, length, _ in fields:
        literal += before
        if name is not None:
            parts.append(_part(literal, name, length or "", slots))
            literal = ""
    if not parts:
        raise ArgumentError(f"the template {template!r} has no slot: write one such as {{digits:6}}")
    return [*parts, _Part(literal, ("",), 1, "")]


def _part(before: str, name: str, length: str, slots: Mapping[str, Alphabet | tuple[Alphabet, int]]) -> _Part:
    """Look up a slot's alphabet and length."""
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
    """Make the text of a number below the size of the space: its digits, in the base of each alphabet."""
    text = ""
    for part in parts:
        symbols = []
        for _ in range(part.length):
            number, digit = divmod(number, len(part.symbols))
            symbols.append(part.symbols[digit])
        text += part.before + part.between.join(symbols)
    return text
