"""Readings of the texts of a study by its models, and the package's own audit of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyunlearn.auditing.assemble import AuditAssembler
from pyunlearn.auditing.config import AuditConfig
from pyunlearn.auditing.responses import AuditTexts, Responses
from pyunlearn.auditing.result import Audit
from pyunlearn.data import Example, Tokens
from pyunlearn.errors import ModelError
from pyunlearn.metrics import truth_ratio
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.probes import TeacherForced, greedy_continuations, teacher_forced
from pyunlearn.probes.long_texts import Part
from pyunlearn.probes.non_members import non_members_of_holdout
from pyunlearn.probes.recitation import LONGEST, opening
from pyunlearn.study.sets import Sets
from pyunlearn.study.unlearners import answered

Key = int | tuple[int, int]
"""An example, or (example, number of a wrong answer to its prompt)."""
_WRONG = 3  # wrong answers for each truth ratio
_BATCH_SIZE = 64  # texts in one pass


@dataclass(frozen=True)
class Reading:
    """Statistics of texts under one model, and its continuations of some."""

    forced: TeacherForced
    positions: dict[Key, int]
    continuations: dict[int, tuple[int, ...]]

    def of(self, keys: Sequence[Key]) -> TeacherForced:
        """Return the statistics of some texts."""
        f, edges = self.forced, np.concatenate([[0], np.cumsum(self.forced.counts)])
        at = [self.positions[key] for key in keys]
        rows = np.concatenate([np.arange(edges[i], edges[i + 1]) for i in at])
        return TeacherForced(f.log_likelihood[rows], f.rank[rows], f.entropy[rows], f.variance[rows], f.counts[at])

    def nll(self, keys: Sequence[Key]) -> NDArray[np.float64]:
        """Return (n,) mean NLL of some texts, nats per token."""
        return -self.of(keys).mean_log_likelihood


class View(NamedTuple):
    """The texts and models of one audit."""

    forget: list[int]
    others: list[int]
    """Non-members."""
    now: Reading
    original: Reading
    reference: Reading


class Reader:
    """Reads the texts of a study with a model, and audits what was read.

    Args:
        sets: all examples of the study.
        tokenizer: decodes them.
    """

    def __init__(self, sets: Sets, tokenizer: Any) -> None:
        self.sets, self.tokenizer = sets, tokenizer
        self.test: list[Key] = list(sets.test)
        self.examples: dict[Tokens, Example] = {}
        self.wrong: dict[int, list[tuple[Tokens, Key]]] = {}
        for group in sets.forget.values():
            for number, i in enumerate(group):
                answers = [group[(number + k) % len(group)] for k in range(1, min(_WRONG, len(group) - 1) + 1)]
                self.wrong[i] = [(answered(sets.tokens[i], sets.tokens[j]), (i, k)) for k, j in enumerate(answers)]

    def read(self, lm: LanguageModel, keys: Sequence[int], probed: Sequence[int], who: str) -> Reading:
        """Read the examples `keys` and the test examples; of `probed` the wrong answers and a continuation too.

        Raises ModelError where a number is not finite; `who` is the model's name in the message.
        """
        every: dict[Key, Tokens] = {i: self.sets.tokens[i] for i in [*keys, *self.sets.test]}
        every |= {key: t for i in probed for t, key in self.wrong[i]}
        forced = teacher_forced(lm, list(every.values()), batch_size=_BATCH_SIZE)
        if not np.isfinite(forced.log_likelihood).all():
            raise ModelError(f"{who} gives text NaN or Inf as log-likelihood: lower unlearning_rates in a new study")
        openings = [opening(self.sets.tokens[i], True) for i in probed]
        written = greedy_continuations(lm, openings, longest=LONGEST, batch_size=_BATCH_SIZE) if openings else []
        return Reading(forced, {key: n for n, key in enumerate(every)}, dict(zip(probed, written, strict=True)))

    def truth_ratios(self, reading: Reading, forget: Sequence[int]) -> NDArray[np.float64]:
        """Return (n,) log truth ratios with completions of other examples as wrong answers."""
        wrong = np.array([-reading.nll([key for _, key in self.wrong[i]]) for i in forget])
        ratios: NDArray[np.float64] = np.log(truth_ratio(-reading.nll(forget), wrong).ratio)
        return ratios

    def audit(self, view: View, *, original: bool = False, reference: bool = False) -> Audit:
        """Audit as `pyunlearn.audit` does, on the study's own tokens, with or without the two other models."""
        forget, others = ([self.sets.tokens[i] for i in each] for each in (view.forget, view.others))
        roles: dict[str, list[Tokens]] = {"forget": forget, "non_members": others}
        if original:
            roles["retain"] = [self.sets.tokens[i] for i in self.sets.test]
        texts = AuditTexts(
            [self._example(t) for t in forget],
            [self._example(t) for t in others],
            roles,
            [opening(t, True) for t in forget],
            non_members_of_holdout(len(forget), others),
            [Part(i) for i in range(len(forget))],
            [""] * len(forget),
        )
        names = {"forget": view.forget, "non_members": view.others}
        names |= {"retain": self.sets.test} if original else {}

        def responses(reading: Reading) -> Responses:
            written = {n: reading.continuations[i] for n, i in enumerate(view.forget) if i in reading.continuations}
            return Responses({role: reading.of(keys) for role, keys in names.items()}, written, 0)

        now = responses(view.now)
        before = responses(view.original) if original else None
        retrained = responses(view.reference) if reference else None
        if retrained is not None:
            texts = texts.calibrated(before or now, retrained)
        measures = ("continuations",) if original else ("membership",)
        return AuditAssembler(texts, self.tokenizer, AuditConfig(metrics=measures), now, before, retrained).assemble()

    def _example(self, t: Tokens) -> Example:
        if t not in self.examples:
            self.examples[t] = self._decoded(t)
        return self.examples[t]

    def _decoded(self, t: Tokens) -> Example:
        before = t.ids if t.decoder is not None else t.ids[: t.first]
        prompt, completion = (self.tokenizer.decode(list(ids), skip_special_tokens=True) for ids in (before, t.scored))
        return Example(prompt or " ", completion or " ")
