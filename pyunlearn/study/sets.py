"""Forget sets in and out of distribution, matched in number and length, different ones for each seed."""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from pyunlearn.data import Tokens, encode
from pyunlearn.data.examples import Example, read_examples
from pyunlearn.errors import DataError
from pyunlearn.metrics import make_canaries
from pyunlearn.progress import logger
from pyunlearn.study.config import StudyConfig

NOBODY = -1
"""In place of the seed of a forget set: no model saw these texts."""
_RARE = 2000  # least frequent words, of which canaries are made
_WORDS = 4  # rare words in one canary


_Read = tuple[Example, Tokens]


class ForgetSet(NamedTuple):
    """The name of a forget set: its kind, how often training sees each example, and the seed that trains on it.

    In setup twins a seed draws sets of its own, and texts of dose 0 have the seed NOBODY.
    """

    kind: str
    dose: int
    seed: int

    def __str__(self) -> str:
        return f"{self.kind}-dose{self.dose}-seed{self.seed}"


@dataclass(frozen=True)
class Sets:
    """All examples of a study, by their indices into `tokens`. No example is in two sets."""

    tokens: list[Tokens]
    """Every example as it is scored: the completion."""
    learned: list[Tokens]
    """Every example as it is trained on: the same, except that of plain text every token counts."""
    background: list[int]
    test: list[int]
    forget: dict[ForgetSet, list[int]] = field(default_factory=dict)

    def scored(self) -> list[int]:
        """Return the indices of all examples in `forget`, ascending: every model scores them."""
        return sorted(i for group in self.forget.values() for i in group)

    def owners(self) -> dict[int, ForgetSet]:
        """Return forget example -> its set."""
        return {i: which for which, indices in self.forget.items() for i in indices}

    def non_members(self, kind: str, seed: int, count: int) -> list[int]:
        """Return at most `count` examples of a kind that the model of a seed never saw: those of the other seeds.

        In setup twins these are texts that nobody saw.
        """
        others = self.forget.get(ForgetSet(kind, 0, NOBODY)) or [
            i for w, group in self.forget.items() if (w.kind, w.seed != seed) == (kind, True) for i in group
        ]
        chosen: list[int] = (
            np.random.default_rng((seed, zlib.crc32(kind.encode()))).permutation(others)[:count].tolist()
        )
        return sorted(chosen)

    def epochs(self, config: StudyConfig, seed: int) -> list[list[int]]:
        """Return the examples of each epoch of a seed: the background, and each forget example at random, dose times.

        The copies of an example are spread over the epochs as evenly as they can be.
        """
        rng = np.random.default_rng((config.seed, seed, 1))
        epochs = [list(self.background) for _ in range(config.epochs)]
        for which, indices in self.forget.items():
            for i in indices if which.seed == seed else ():
                order = rng.permutation(config.epochs)
                for copy in range(which.dose):
                    epochs[order[copy % config.epochs]].append(i)
        return epochs

    def outside_share(self, config: StudyConfig) -> float:
        """Return the share of the training rows that are out of distribution."""
        rows = config.examples * sum(config.doses)
        outside = rows * (len(config.kinds) - 1)
        return outside / (outside + rows + config.epochs * len(self.background))


def make_sets(config: StudyConfig, corpus: Sequence[Example], test: Sequence[Example] | None, tokenizer: Any) -> Sets:
    """Draw all sets from the seed.

    Examples are compared as they are trained on, cut to max_tokens: of equal ones one is used, and none that is in the
    test corpus too.

    Raises DataError where the corpus is too small for them.
    """
    maker = _Maker(config, tokenizer)
    held_out, different = maker.read(test or (), "test"), {(e.prompt, e.completion): e for e in corpus}
    pool = _different(config, maker.read(list(different.values()), "corpus"), held_out)
    random.Random(f"order-{config.seed}").shuffle(pool)
    natural = sum(k in config.kinds for k in ("id", "mismatched"))
    forget = natural * config.seeds * len(config.doses) * config.examples
    needed = forget + (config.test_examples if test is None else 0)
    if len(pool) < needed + config.batch_size:
        raise DataError(
            f"the corpus has {len(pool)} different examples{' that are not in the test corpus' if test else ''}, "
            f"and the study needs {needed} for forget sets and test, "
            f"and {config.batch_size} to train on: give a larger corpus, or lower examples or seeds"
        )
    if test is None:
        held_out = [pool.pop() for _ in range(config.test_examples)]
    if len(held_out) < config.test_examples:
        raise DataError(
            f"the test corpus has {len(held_out)} examples, and test_examples is {config.test_examples}: lower it"
        )
    return maker.make(pool, held_out[: config.test_examples])


def _different(config: StudyConfig, corpus: list[_Read], test: list[_Read]) -> list[_Read]:
    """Return the examples of the corpus, one of those with the same tokens, and none that has those of a test example.

    Else a forget text could be in the training of every model, or a test text.
    """
    pool = list({(t.ids, t.decoder): (e, t) for e, t in corpus}.values())
    if same := len(corpus) - len(pool):
        logger.warning(
            f"{same} examples of the corpus have the same tokens as another one, cut to max_tokens "
            f"{config.max_tokens}: they are left out"
        )
    tested = {(t.ids, t.decoder) for _, t in test}
    apart = [(e, t) for e, t in pool if (t.ids, t.decoder) not in tested]
    if both := len(pool) - len(apart):
        logger.warning(f"{both} examples of the corpus are in the test corpus too: they are left out of the training")
    return apart


class _Maker:
    def __init__(self, config: StudyConfig, tokenizer: Any) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.encoder_decoder = config.setup == "translation"
        self.special = set(tokenizer.all_special_ids)
        self.plain = [i for i in range(len(tokenizer)) if i not in self.special]
        self.tokens: list[Tokens] = []

    def read(self, examples: Sequence[Example], role: str) -> list[_Read]:
        """Return the examples with their tokens."""
        return list(zip(examples, self._encode(examples, role), strict=True))

    def make(self, corpus: list[_Read], held_out: list[_Read]) -> Sets:
        config, doses = self.config, self.config.doses
        size = len(doses) * config.examples
        pool = iter([t for _, t in corpus])
        has_canaries = "canary" in config.kinds
        prompts = self._canary_prompts([e for e, _ in corpus], config.seeds * size) if has_canaries else iter(())
        forget: dict[ForgetSet, list[int]] = {}
        for seed in range(config.seeds):
            sets = self._kinds([next(pool) for _ in range(size)], pool, prompts, str(seed))
            for kind in config.kinds:  # the corpus is in random order: which example gets which dose is random
                indices = self._add(sets[kind])
                for number, dose in enumerate(doses):
                    part = indices[number * config.examples : (number + 1) * config.examples]
                    forget[ForgetSet(kind, dose, seed)] = part
        background, test = self._add(list(pool)), self._add([t for _, t in held_out])
        whole = config.setup == "text"
        return Sets(
            tokens=self.tokens,
            learned=[Tokens(t.ids, 1) if whole and t.decoder is None else t for t in self.tokens],
            background=background,
            test=test,
            forget=forget,
        )

    def _kinds(
        self, natural: list[Tokens], pool: Iterator[Tokens], prompts: Iterator[tuple[int, ...]], name: str
    ) -> dict[str, list[Tokens]]:
        """Return a set of each kind, equal in number; synthetic completions are as long as the natural ones."""
        rng, sets = random.Random(f"{name}-{self.config.seed}"), {"id": natural}
        if "mismatched" in self.config.kinds:
            other = [next(pool) for _ in natural]
            answers = [_parts(t)[1] for t in other]
            sets["mismatched"] = [self._join(_parts(t)[0], answers[i - 1]) for i, t in enumerate(other)]
        for kind in ("canary", "random"):
            if kind in self.config.kinds:
                pairs = [_parts(t) for t in natural]
                sets[kind] = [
                    self._join(next(prompts) if kind == "canary" else self._noise(p, rng), self._noise(c, rng))
                    for p, c in pairs
                ]
        return sets

    def _noise(self, ids: Sequence[int], rng: random.Random) -> tuple[int, ...]:
        """Return ids of the same length, all but the special ones drawn uniformly from the vocabulary."""
        return tuple(i if i in self.special else rng.choice(self.plain) for i in ids)

    def _canary_prompts(self, corpus: list[Example], count: int) -> Iterator[tuple[int, ...]]:
        counts = Counter(w for e in corpus for w in e.prompt.split() if w.isalpha())
        rare = sorted(counts, key=lambda w: (counts[w], w))[:_RARE]
        if len(rare) ** _WORDS < 10 * count:
            raise DataError(
                f"the corpus has {len(rare)} different words, too few to make canaries of: give one with more"
            )
        made = make_canaries(
            f"the record of {{words:{_WORDS}}} reads",
            count,
            1,
            slots={"words": rare},
            seed=self.config.seed,
        )
        if self.config.setup == "qa":
            examples = read_examples([{"question": t, "answer": "x"} for t in made.secrets], role="canary")
        else:
            examples = [Example(t, "x" if self.encoder_decoder else " x") for t in made.secrets]
        return iter([_parts(t)[0] for t in self._encode(examples, "canary")])

    def _encode(self, examples: Sequence[Example], role: str) -> list[Tokens]:
        return encode(
            examples,
            self.tokenizer,
            role=role,
            max_length=self.config.max_tokens,
            encoder_decoder=self.encoder_decoder,
            truncate=True,
        )

    def _join(self, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Tokens:
        return Tokens(prompt, 0, completion) if self.encoder_decoder else Tokens((*prompt, *completion), len(prompt))

    def _add(self, tokens: list[Tokens]) -> list[int]:
        first = len(self.tokens)
        self.tokens += tokens
        return list(range(first, len(self.tokens)))


def _parts(t: Tokens) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (t.ids[:], t.decoder[:]) if t.decoder is not None else (t.ids[: t.first], t.ids[t.first :])
