"""Forget sets in and out of distribution, matched in number and length, and non-members of the same kinds."""

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
from pyunlearn.study.config import StudyConfig

_RARE = 2000  # least frequent words, of which canaries are made
_WORDS = 4  # rare words in one canary


class ForgetSet(NamedTuple):
    """The name of a forget set: its kind, how often each example is seen per epoch, and the draw."""

    kind: str
    repetitions: int
    draw: int

    def __str__(self) -> str:
        return f"{self.kind}-r{self.repetitions}-draw{self.draw}"


@dataclass(frozen=True)
class Sets:
    """All examples of a study, by their indices into `tokens`."""

    tokens: list[Tokens]
    """Every example as it is scored: the completion."""
    learned: list[Tokens]
    """Every example as it is trained on: the same, except that of plain text every token counts."""
    background: list[int]
    test: list[int]
    test_texts: list[str]
    """The completions of the test examples, for BLEU."""
    non_members: dict[str, list[int]]
    """Kind -> the examples of that kind that are never trained on."""
    forget: dict[ForgetSet, list[int]] = field(default_factory=dict)

    def scored(self) -> list[int]:
        """Return the indices of all forget examples and non-members, ascending."""
        return sorted(i for group in (*self.forget.values(), *self.non_members.values()) for i in group)

    def members(self, draw: int | None, chosen: set[int] | None = None) -> list[int]:
        """Return an epoch's forget examples with repetitions: of one draw (None: of all), and of the chosen alone."""
        return [
            i
            for which, indices in self.forget.items()
            if draw in (None, which.draw)
            for i in indices
            if chosen is None or i in chosen
            for _ in range(which.repetitions)
        ]

    def subsets(self, config: StudyConfig) -> dict[int, Any]:
        """Return index -> (K,) bool, True for each subset model that trains on the example.

        Non-members, which no model trains on, get masks too, drawn alike, so that their calibrated scores are means
        over as many models.
        """
        indices = self.scored()
        masks = subset_masks(len(indices), count=config.subset_models, seed=config.seed)
        return dict(zip(indices, masks.T, strict=True))


def make_sets(config: StudyConfig, corpus: Sequence[Example], test: Sequence[Example] | None, tokenizer: Any) -> Sets:
    """Draw all sets from the seed.

    Raises DataError where the corpus is too small for them.
    """
    corpus = list({(e.prompt, e.completion): e for e in corpus}.values())
    random.Random(f"order-{config.seed}").shuffle(corpus)
    natural = sum(k in config.kinds for k in ("id", "mismatched"))
    sets = config.draws * len(config.repetitions) * config.examples
    needed = natural * (sets + config.non_members) + (config.test_examples if test is None else 0)
    if len(corpus) < needed + config.batch_size:
        raise DataError(
            f"the corpus has {len(corpus)} different examples, and the study needs {needed} for forget sets, "
            f"non-members and test, and {config.batch_size} to train on: give a larger corpus, or lower examples, "
            "non_members or draws"
        )
    held_out = list(test) if test is not None else [corpus.pop() for _ in range(config.test_examples)]
    if len(held_out) < config.test_examples:
        raise DataError(
            f"the test corpus has {len(held_out)} examples, and test_examples is {config.test_examples}: lower it"
        )
    return _Maker(config, tokenizer).make(corpus, held_out[: config.test_examples])


class _Maker:
    def __init__(self, config: StudyConfig, tokenizer: Any) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.encoder_decoder = config.setup == "translation"
        self.special = set(tokenizer.all_special_ids)
        self.plain = [i for i in range(len(tokenizer)) if i not in self.special]
        self.tokens: list[Tokens] = []

    def make(self, corpus: list[Example], held_out: list[Example]) -> Sets:
        config, kinds = self.config, self.config.kinds
        draws, repetitions, n, m = config.draws, config.repetitions, config.examples, config.non_members
        pool = iter(self._encode(corpus, "corpus"))
        secrets = draws * len(repetitions) * n
        prompts = self._canary_prompts(corpus, secrets, m) if "canary" in kinds else iter(())
        # the non-members first: the prompts of the canaries come in this order
        non_members = self._add_kinds(None, m, pool, prompts)
        groups = {(d, r): self._add_kinds((d, r), n, pool, prompts) for d in range(draws) for r in repetitions}
        background, test = self._add(list(pool)), self._add(self._encode(held_out, "test"))
        whole = config.setup == "text"
        return Sets(
            tokens=self.tokens,
            learned=[Tokens(t.ids, 1) if whole and t.decoder is None else t for t in self.tokens],
            background=background,
            test=test,
            test_texts=[e.completion for e in held_out],
            non_members=non_members,
            forget={ForgetSet(kind, r, d): groups[d, r][kind] for d, r in groups for kind in kinds},
        )

    def _add_kinds(
        self, group: tuple[int, int] | None, size: int, pool: Iterator[Tokens], prompts: Iterator[tuple[int, ...]]
    ) -> dict[str, list[int]]:
        """Make a set of each kind; return kind -> indices. `group`: (draw, repetitions), None for the non-members."""
        sets = self._kinds([next(pool) for _ in range(size)], pool, prompts, str(group))
        return {kind: self._add(tokens) for kind, tokens in sets.items()}

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

    def _canary_prompts(self, corpus: list[Example], secrets: int, non_members: int) -> Iterator[tuple[int, ...]]:
        counts = Counter(w for e in corpus for w in e.prompt.split() if w.isalpha())
        rare = sorted(counts, key=lambda w: (counts[w], w))[:_RARE]
        if len(rare) ** _WORDS < 10 * (secrets + non_members):
            raise DataError(
                f"the corpus has {len(rare)} different words, too few to make canaries of: leave kind canary out"
            )
        made = make_canaries(
            f"the record of {{words:{_WORDS}}} reads",
            secrets,
            non_members,
            slots={"words": rare},
            seed=self.config.seed,
        )
        texts = [*made.non_members, *made.secrets]
        if self.config.setup == "qa":
            examples = read_examples([{"question": t, "answer": "x"} for t in texts], role="canary")
        else:
            examples = [Example(t, "x" if self.encoder_decoder else " x") for t in texts]
        return iter([_parts(t)[0] for t in self._encode(examples, "canary")])

    def _encode(self, examples: list[Example], role: str) -> list[Tokens]:
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
    return (t.ids, t.decoder) if t.decoder is not None else (t.ids[: t.first], t.ids[t.first :])


def lengths(sets: Sets, indices: Sequence[int]) -> Any:
    """Return (n,) the number of scored tokens of each example."""
    return np.array([len(sets.tokens[i].scored) for i in indices])
