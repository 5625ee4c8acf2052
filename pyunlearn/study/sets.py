"""Forget sets in and out of distribution, matched in number and length, and unseen references of the same law."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from pyunlearn.data import Tokens, encode
from pyunlearn.data.examples import Example, read_examples
from pyunlearn.errors import DataError
from pyunlearn.metrics import make_canaries
from pyunlearn.probes import subset_masks
from pyunlearn.study.old_config import Config

_RARE = 2000  # the least frequent words, of which canaries are made
_WORDS = 4  # of them in one canary


class ForgetSet(NamedTuple):
    """Which forget set: its kind, how often each example stands in an epoch, and the draw."""

    kind: str
    repetitions: int
    draw: int

    def __str__(self) -> str:
        return f"{self.kind}-r{self.repetitions}-draw{self.draw}"


@dataclass(frozen=True)
class Sets:
    """All examples of a study. Places count in `tokens`."""

    tokens: list[Tokens]
    """As they are scored: the completion."""
    learned: list[Tokens]
    """As they are trained on: the same, but of plain text every token."""
    background: list[int]
    test: list[int]
    test_texts: list[str]
    """What the test examples' completions say, for BLEU."""
    references: dict[str, list[int]]
    """By kind."""
    forget: dict[ForgetSet, list[int]] = field(default_factory=dict)

    def watched(self) -> list[int]:
        """Every forget example and reference, rising."""
        return sorted(i for group in (*self.forget.values(), *self.references.values()) for i in group)

    def members(self, draw: int | None, chosen: set[int] | None = None) -> list[int]:
        """Places of the forget examples in one epoch, with repetitions: of one draw (None: of all), of the chosen alone."""
        return [
            i for which, places in self.forget.items() if draw in (None, which.draw)
            for i in places if chosen is None or i in chosen for _ in range(which.repetitions)
        ]  # fmt: skip

    def subsets(self, config: Config) -> dict[int, Any]:
        """place -> (K,) bool: the subset models that train on it. References, which none trains on, get a mask of the same law,
        so that their calibrated scores are means over as many models."""
        places = self.watched()
        masks = subset_masks(len(places), count=config.subset_models, seed=config.seed)
        return dict(zip(places, masks.T, strict=True))


def make_sets(config: Config, corpus: Sequence[Example], test: Sequence[Example] | None, tokenizer: Any) -> Sets:
    """Draws everything from the seed.

    Raises DataError where the corpus is too small for the sets asked for.
    """
    corpus = list({(e.prompt, e.completion): e for e in corpus}.values())
    random.Random(f"order-{config.seed}").shuffle(corpus)
    natural = sum(k in config.kinds for k in ("id", "mismatched"))
    sets = config.draws * len(config.repetitions) * config.examples
    needed = natural * (sets + config.references) + (config.test_examples if test is None else 0)
    if len(corpus) < needed + config.batch_size:
        raise DataError(
            f"the corpus has {len(corpus)} different examples, and the study needs {needed} for forget sets, references and test, and "
            f"{config.batch_size} to train on: give a larger corpus, or lower examples, references or draws"
        )
    held = list(test) if test is not None else [corpus.pop() for _ in range(config.test_examples)]
    if len(held) < config.test_examples:
        raise DataError(
            f"the test corpus has {len(held)} examples, and test_examples is {config.test_examples}: lower it"
        )
    return _Maker(config, tokenizer).make(corpus, held[: config.test_examples])


class _Maker:
    def __init__(self, config: Config, tokenizer: Any) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.both = config.setup == "translation"
        self.special = set(tokenizer.all_special_ids)
        self.plain = [i for i in range(len(tokenizer)) if i not in self.special]
        self.tokens: list[Tokens] = []

    def make(self, corpus: list[Example], held: list[Example]) -> Sets:
        config, kinds = self.config, self.config.kinds
        draws, reps, n, m = config.draws, config.repetitions, config.examples, config.references
        which = [ForgetSet(kind, r, d) for d in range(draws) for r in reps for kind in kinds]
        pool = iter(self._encode(corpus, "corpus"))
        prompts = self._canary_prompts(corpus, draws * len(reps) * n, m) if "canary" in kinds else iter(())
        forget, references = {}, {}
        sizes = [(None, m), *(((d, r), n) for d in range(draws) for r in reps)]
        for place, size in sizes:  # the references first: canaries' prompts come in this order
            found = self._kinds([next(pool) for _ in range(size)], pool, prompts, str(place))
            for kind, tokens in found.items():
                if place is None:
                    references[kind] = self._add(tokens)
                else:
                    forget[ForgetSet(kind, place[1], place[0])] = self._add(tokens)
        background, test = self._add(list(pool)), self._add(self._encode(held, "test"))
        whole = config.setup == "text"
        learned = [Tokens(t.ids, 1) if whole and t.decoder is None else t for t in self.tokens]
        texts = [e.completion for e in held]
        return Sets(self.tokens, learned, background, test, texts, references, {w: forget[w] for w in which})

    def _kinds(
        self, natural: list[Tokens], pool: Iterator[Tokens], prompts: Iterator[tuple[int, ...]], name: str
    ) -> dict[str, list[Tokens]]:
        """A set of each kind: as many examples, the synthetic ones with completions as long as the natural ones'."""
        rng, found = random.Random(f"{name}-{self.config.seed}"), {"id": natural}
        if "mismatched" in self.config.kinds:
            other = [next(pool) for _ in natural]
            answers = [_parts(t)[1] for t in other]
            found["mismatched"] = [self._join(_parts(t)[0], answers[i - 1]) for i, t in enumerate(other)]
        for kind in ("canary", "random"):
            if kind in self.config.kinds:
                pairs = [_parts(t) for t in natural]
                found[kind] = [
                    self._join(next(prompts) if kind == "canary" else self._noise(p, rng), self._noise(c, rng))
                    for p, c in pairs
                ]
        return found

    def _noise(self, ids: Sequence[int], rng: random.Random) -> tuple[int, ...]:
        """As long, every token but the special ones drawn uniformly from the vocabulary."""
        return tuple(i if i in self.special else rng.choice(self.plain) for i in ids)

    def _canary_prompts(self, corpus: list[Example], secrets: int, references: int) -> Iterator[tuple[int, ...]]:
        counts = Counter(w for e in corpus for w in e.prompt.split() if w.isalpha())
        rare = sorted(counts, key=lambda w: (counts[w], w))[:_RARE]
        if len(rare) ** _WORDS < 10 * (secrets + references):
            raise DataError(
                f"the corpus has {len(rare)} different words, too few to make canaries of: leave kind canary out"
            )
        made = make_canaries(
            f"the record of {{words:{_WORDS}}} reads", secrets, references, slots={"words": rare}, seed=self.config.seed
        )
        texts = [*made.references, *made.secrets]
        if self.config.setup == "qa":
            examples = read_examples([{"question": t, "answer": "x"} for t in texts], role="canary")
        else:
            examples = [Example(t, "x" if self.both else " x") for t in texts]
        return iter([_parts(t)[0] for t in self._encode(examples, "canary")])

    def _encode(self, examples: list[Example], role: str) -> list[Tokens]:
        return encode(
            examples,
            self.tokenizer,
            role=role,
            max_length=self.config.max_tokens,
            encoder_decoder=self.both,
            truncate=True,
        )

    def _join(self, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Tokens:
        return Tokens(prompt, 0, completion) if self.both else Tokens((*prompt, *completion), len(prompt))

    def _add(self, tokens: list[Tokens]) -> list[int]:
        first = len(self.tokens)
        self.tokens += tokens
        return list(range(first, len(self.tokens)))


def _parts(t: Tokens) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (t.ids, t.decoder) if t.decoder is not None else (t.ids[: t.first], t.ids[t.first :])


def lengths(sets: Sets, places: Sequence[int]) -> Any:
    """(n,) scored tokens of each."""
    return np.array([len(sets.tokens[i].scored) for i in places])
