"""Everything that an audit asks one model: each text once, token by token, and then what it writes by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyunlearn import models
from pyunlearn.data import Tokens, padding_id
from pyunlearn.errors import ModelError
from pyunlearn.metrics import audit_within, verbatim_match, zlib_score
from pyunlearn.models import vocabulary_of
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.sampling import sample_non_members
from pyunlearn.probes import TeacherForced, decoding, greedy_continuations, teacher_forced
from pyunlearn.probes.cache import Cache, Shelf
from pyunlearn.probes.teacher_forced import FIELDS
from pyunlearn.progress import Progress

_OPENING = 50  # tokens at most that a text without a prompt is begun with, as in arXiv 2202.07646
LONGEST = 64
"""Tokens that a continuation has at most."""


Places = list[int] | Callable[["Asker", dict[str, TeacherForced]], list[int]]


@dataclass(frozen=True, eq=False)
class Asked:
    """One model's answers: for each role (forget, references, ...) its texts' tokens, and what it wrote in the place of the forget texts."""

    forced: dict[str, TeacherForced]
    continuations: dict[int, tuple[int, ...]]
    """By the place of the text; of those that were asked for."""
    passes: int
    """Texts that it was asked about, each once."""


class Asker:
    """One model, opened: what it is asked is looked up in the cache first."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        cache: str | Path | None,
        workspace: int | None,
        batch_size: int,
        bar: Progress,
    ) -> None:
        self.model, self.tokenizer, self.batch_size, self.bar = model, tokenizer, batch_size, bar
        self.likelihood = models.Likelihood(model, workspace=workspace)
        if cache is not None:
            bar.say("reading the weights for their hash")
        self.cache = Cache(cache, models.unwrapped(model))

    def read(self, texts: dict[str, list[Tokens]], who: str) -> dict[str, TeacherForced]:
        """`texts` by role, token by token, all roles in one go."""
        every = [t for tokens in texts.values() for t in tokens]
        if max(max(*t.ids, *t.written) for t in every) >= vocabulary_of(self.model):
            raise ModelError(f"{who} has another vocabulary than the tokenizer: give one of the same family")
        self.bar.begin(f"reading with {who}", len(set(every)))
        found = teacher_forced(
            self.likelihood, every, pad_id=padding_id(self.tokenizer), batch_size=self.batch_size,
            shelf=self.cache.shelf("teacher_forced", FIELDS), advance=self.bar.advance,
        )  # fmt: skip
        if not np.isfinite(found.log_likelihood).all():
            raise ModelError(
                f"{who} gives text NaN or Inf as log-likelihood: its weights are broken, or too large for their dtype"
            )
        forced, at = {}, 0
        for role, tokens in texts.items():
            forced[role], at = found.part(at, at + len(tokens)), at + len(tokens)
        return forced

    def write(self, openings: Sequence[Tokens], who: str) -> list[tuple[int, ...]]:
        """What the model writes after each opening."""
        self.bar.begin(f"writing with {who}", len(set(openings)))
        return greedy_continuations(
            self.model, self.tokenizer, openings, longest=LONGEST, batch_size=self.batch_size,
            shelf=self.cache.shelf("continuations", decoding.FIELDS), advance=self.bar.advance,
        )  # fmt: skip

    def ask(self, texts: dict[str, list[Tokens]], openings: Sequence[Tokens], places: Places, who: str) -> Asked:
        """Everything: `texts` by role, and the continuations of the openings at `places`, which may be a choice to make by what has been read."""
        forced = self.read(texts, who)
        if callable(places):
            places = places(self, forced)
        said = self.write([openings[i] for i in places], who) if places else []
        return Asked(
            forced, dict(zip(places, said, strict=True)), len({t for tokens in texts.values() for t in tokens})
        )

    def sample(self, forget: list[Tokens], seed: int) -> list[Tokens]:
        """References sampled from this model; from the cache, if they have been before."""
        shelf = self.cache.shelf("sampled", ("numbers",))
        key = shelf.key(forget[0], seed, [shelf.key(t) for t in forget] if self.cache.folder else None)
        if key not in shelf:
            self.bar.say("sampling text that the model would typically write")
            training = self.model.training
            self.model.eval()
            try:
                found = sample_non_members(LanguageModel.of(self.model, self.tokenizer), forget, seed=seed)
            finally:
                self.model.train(training)
            if not self.cache.folder:
                return found
            shelf.add(key, (_packed(found),))
            shelf.flush()
        return _unpacked(shelf, key)


def likeliest(openings: Sequence[Tokens], texts: Sequence[str], budget: int) -> Places:
    """Which texts are worth writing out, where there is not the time for all: those that are likely recited (`metrics.audit_within`)."""

    def choose(asker: Asker, forced: dict[str, TeacherForced]) -> list[int]:
        nll, ratio = -forced["forget"].mean_log_likelihood, zlib_score(forced["forget"].mean_log_likelihood, texts)

        def recited(places: list[int]) -> list[float]:
            chosen = [openings[i] for i in places]
            runs = [
                verbatim_match(said, t.scored).longest
                for said, t in zip(asker.write(chosen, "the model"), chosen, strict=True)
            ]
            return [run / min(LONGEST, len(t.scored)) for run, t in zip(runs, chosen, strict=True)]

        features = np.column_stack([nll, ratio, np.log(forced["forget"].counts)])
        return sorted(audit_within(recited, features, budget, batch=asker.batch_size).indices.tolist())

    return choose


def opening(t: Tokens, prompted: bool) -> Tokens:
    """Where the model is to take over: after the prompt, or after the first half of a text that has none."""
    if prompted:
        return t
    return Tokens(t.ids, t.first + min(len(t.scored) // 2, _OPENING), t.decoder)


def _packed(tokens: Sequence[Tokens]) -> Any:
    rows = [
        [len(t.ids), t.first, -1 if t.decoder is None else len(t.decoder), *t.ids, *(t.decoder or ())] for t in tokens
    ]
    return np.array([n for row in rows for n in row], dtype=np.int64)


def _unpacked(shelf: Shelf, key: Any) -> list[Tokens]:
    numbers, found, at = shelf[key][0].tolist(), [], 0
    while at < len(numbers):
        ids, first, decoder = numbers[at : at + 3]
        split, end = at + 3 + ids, at + 3 + ids + max(decoder, 0)
        found.append(Tokens(tuple(numbers[at + 3 : split]), first, None if decoder < 0 else tuple(numbers[split:end])))
        at = end
    return found
