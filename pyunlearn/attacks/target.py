"""Target of an attack: the model, the texts, and the functions that read and score them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pyunlearn.attacks.config import AttackConfig
from pyunlearn.data import Example, Tokens
from pyunlearn.data.rendering import Rendering
from pyunlearn.errors import DataError
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.scoring import Scorer, evaluation_mode
from pyunlearn.progress import Progress

Floats = NDArray[np.float64]


class Unsuited(Exception):
    """Raised by an attack that this model or these texts do not allow; the message is the reason, as a clause."""


@dataclass(frozen=True, eq=False)
class AttackTexts:
    """The texts of an attack: n forget texts, m non-members, and those that an attacker could have."""

    forget: list[Tokens]
    forget_examples: list[Example]
    groups: list[int]
    """A number for each forget text, the same for windows of one record and for near copies."""
    non_members: list[Tokens]
    non_member_groups: list[int]
    """The same of the non-members."""
    non_member_examples: list[Example] | None
    """None where they exist as tokens alone."""
    retain: list[Tokens]
    retain_examples: list[Example]
    """Both empty without a retain set."""
    same_kind: bool
    """True where unseen forget texts would fare as the non-members do after any training: a holdout, or a control."""
    rendering: Rendering
    """Form in which the model reads records with a prompt."""
    unrendered: list[Example | None] = field(default_factory=list)
    """The forget texts and the non-members as they were read, None for a window of a longer record; empty without a
    holdout."""

    @property
    def every(self) -> list[Tokens]:
        """The forget texts, then the non-members."""
        return self.forget + self.non_members


@dataclass(frozen=True, eq=False)
class Trial:
    """Scores of every text under one form of an attack, low where a text comes back."""

    name: str
    forget: Floats
    """(n,), NaN where a text was not tested."""
    non_members: Floats
    """(m,), NaN where one was not tested."""
    attack: str = ""
    """Name of the attack; empty for the model without one."""
    judged: bool = True
    """False where the attack brings back unseen text as well, so that only a control makes a verdict of it."""
    details: dict[str, Any] = field(default_factory=dict)
    """What was done: steps, learning rate, bits."""

    @property
    def compared(self) -> int:
        """Number of non-members that were tested."""
        return int((~np.isnan(self.non_members)).sum())


@dataclass(frozen=True, eq=False)
class Target:
    """A model under attack. Its weights are restored bit for bit after each attack.

    `lm`        the model
    `original`  the model before unlearning, for attacks that need it, or None
    `chosen`    what an attack chose with the model itself, so that the control gets the same: name -> value
    `notes`     what an attack could not compare: one sentence each
    `read`      the log-likelihoods of texts that the model has read without an attack: text -> (T,) nats
    """

    lm: LanguageModel
    texts: AttackTexts
    config: AttackConfig
    bar: Progress
    original: LanguageModel | None = None
    chosen: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    read: Mapping[Tokens, Floats] = field(default_factory=dict)

    DESTROYED: ClassVar[float] = 1e6
    """Nats a token in place of NaN and Inf: the attack destroyed the model on that text."""
    FEWEST: ClassVar[int] = 80
    """Non-members with which an expensive attack compares, at least, where there are as many."""
    RUN: ClassVar[int] = 20
    """The most of them that are neighbours in their file."""

    @cached_property
    def scorer(self) -> Scorer:
        """Scorer of the model."""
        return Scorer(self.lm, 4 * self.config.batch_size)

    def nll(self, tokens: Sequence[Tokens]) -> Floats:
        """Return (len(tokens),) mean negative log-likelihoods under the present weights, nats a token."""
        with evaluation_mode(self.lm.module):
            return self.finite(-self.scorer.mean_log_likelihood(tokens))

    def token_log_likelihood(self, tokens: Sequence[Tokens]) -> list[Floats]:
        """Return for each text (T,) the log-likelihoods of its scored tokens, nats."""
        with evaluation_mode(self.lm.module):
            return self.scorer.token_log_likelihood(tokens)

    def encoded(self, examples: Sequence[Example]) -> list[Tokens | None]:
        """Return the tokens of each text; None for one that is longer than the context."""
        tokens: list[Tokens | None] = []
        for e in examples:
            try:
                tokens += self.lm.encode({"forget": [e]}, chat_template=self.texts.rendering.chat_template)["forget"]
            except DataError:
                tokens.append(None)
        return tokens

    @cached_property
    def as_it_is(self) -> list[Floats]:
        """For each text (T,) the log-likelihoods of its scored tokens without an attack, nats, from one pass."""
        every = self.texts.every
        if all(t in self.read for t in every):
            return [self.read[t] for t in every]
        return self.token_log_likelihood(every)

    @cached_property
    def compared(self) -> NDArray[np.int64]:
        """Indices of the non-members with which expensive attacks compare: as many as forget texts, 80 or more.

        They are runs of 20 neighbours, one from each of as many equal parts of the holdout: texts that teach each other
        stand next to each other, and so do texts of one source or length, where a file is sorted.
        """
        m = len(self.texts.non_members)
        count, rng = min(m, max(len(self.texts.forget), self.FEWEST)), np.random.default_rng(self.config.seed)
        runs = math.ceil(count / self.RUN)
        pieces = zip(*(np.array_split(np.arange(n), runs) for n in (count, m)), strict=True)
        ends = ((part, len(own), int(rng.integers(len(part) - len(own) + 1))) for own, part in pieces)
        return np.concatenate([part[first : first + length] for part, length, first in ends])

    def trial(self, name: str, *, quick: bool = False, **details: Any) -> Trial:
        """Score every text under the present weights; where it is `quick`, of the non-members those in `compared`."""
        n, m = len(self.texts.forget), len(self.texts.non_members)
        compared = self.compared if quick else np.arange(m)
        values = self.nll(self.texts.forget + [self.texts.non_members[i] for i in compared])
        non_members = np.full(m, np.nan)
        non_members[compared] = values[n:]
        if quick:
            details["non_members"] = len(values) - n
        return Trial(name, values[:n], non_members, details=details)

    @staticmethod
    def finite(nll: Floats) -> Floats:
        """Return the numbers, with DESTROYED in place of NaN and Inf."""
        return np.where(np.isfinite(nll), nll, Target.DESTROYED)
