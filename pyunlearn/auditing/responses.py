"""Collect one model's teacher-forced statistics and greedy continuations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyunlearn.data import Example, Tokens
from pyunlearn.errors import ModelError
from pyunlearn.metrics import audit_within, verbatim_match, zlib_score
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.scoring import evaluation_mode
from pyunlearn.probes import TeacherForced, decoding, greedy_continuations, teacher_forced, without_prompt
from pyunlearn.probes.cache import Cache
from pyunlearn.probes.calibration import Expected
from pyunlearn.probes.long_texts import EncodedTexts, Part
from pyunlearn.probes.non_members import (
    GRADES,
    NonMembers,
    calibrated,
    non_members_without_holdout,
    unsuitable,
)
from pyunlearn.probes.recitation import LONGEST, opening
from pyunlearn.probes.teacher_forced import FIELDS
from pyunlearn.progress import Progress


@dataclass(frozen=True, eq=False)
class AuditTexts:
    """Texts of an audit, as examples and as tokens."""

    forget: list[Example]
    holdout: list[Example]
    """Empty without one."""
    tokens: dict[str, list[Tokens]]
    """By role: forget, non_members, retain (if any), without_prompt (the forget texts that have a prompt)."""
    openings: list[Tokens]
    """The forget texts, with the continuation as scored tokens."""
    non_members: NonMembers
    """Their grade, and what is expected of them and of the forget texts if they are unseen."""
    parts: Sequence[Part]
    """Of which records the forget texts are."""
    forms: Sequence[str]
    """Name of each forget text's form, empty for texts as they are."""

    @property
    def as_they_are(self) -> list[int]:
        """Indices of the forget texts that are no other form of one."""
        return [i for i, form in enumerate(self.forms) if not form]

    @classmethod
    def of(
        cls,
        lm: LanguageModel,
        encoded: EncodedTexts,
        non_members: NonMembers,
        *,
        answer_prior: bool,
    ) -> AuditTexts:
        """Arrange the user's texts by role; with `answer_prior`, the prompted ones once more without their prompt."""
        examples, tokens = encoded.examples, encoded.tokens
        roles = {"forget": tokens["forget"], "non_members": non_members.tokens}
        if "retain" in tokens:
            roles["retain"] = tokens["retain"]
        prompted = [(t, e.prompted) for t, e in zip(tokens["forget"], examples["forget"], strict=True)]
        if answer_prior and any(has_prompt for _, has_prompt in prompted):
            start = _start_of_text(lm)
            roles["without_prompt"] = [without_prompt(t, start) for t, has_prompt in prompted if has_prompt]
        openings = [opening(t, has_prompt) for t, has_prompt in prompted]
        holdout, forms = examples.get("holdout", []), encoded.forms
        return cls(examples["forget"], holdout, roles, openings, non_members, encoded.parts, forms)

    def calibrated(self, original: Responses, reference: Responses) -> AuditTexts:
        """Return the texts with a reference model's numbers as what is expected of unseen text."""
        forget, own = (
            Expected(-x.mean_log_likelihood, x.greedy_match)
            for x in (reference.statistics[role] for role in ("forget", "non_members"))
        )
        nll = -original.statistics["forget"].mean_log_likelihood
        return replace(self, non_members=calibrated(self.non_members, nll, forget, own))


@dataclass(frozen=True, eq=False)
class Responses:
    """Outputs of one model: statistics of every scored token, and continuations of the forget texts."""

    statistics: dict[str, TeacherForced]
    """By role of the texts: see AuditTexts.tokens."""
    continuations: dict[int, tuple[int, ...]]
    """Token ids by index of the forget text; only those that were decoded."""
    passes: int
    """Number of different texts that were scored."""

    def log_likelihoods(self, role: str) -> list[NDArray[np.float32]]:
        """Return for each text of a role (T,) the log-likelihoods of its scored tokens, nats."""
        forced = self.statistics[role]
        return [np.asarray(x, dtype=np.float32) for x in forced.each(forced.log_likelihood)]


class ResponseCollector:
    """Runs one model over the texts of an audit; cached outputs are not computed again.

    Args:
        lm: the model.
        cache: folder of the records, or None for memory alone.
        batch_size: texts in one forward pass.
        bar: the progress bar.
    """

    def __init__(self, lm: LanguageModel, *, cache: str | Path | None, batch_size: int, bar: Progress) -> None:
        self.lm, self.batch_size, self.bar = lm, batch_size, bar
        if cache is not None:
            bar.say("reading the weights for their hash")
        self.cache = Cache(cache, lm)

    def score(self, roles: dict[str, list[Tokens]], who: str) -> dict[str, TeacherForced]:
        """Score the texts of all roles together, token by token.

        Raises ModelError: a token id that the model does not have; NaN or Inf. `who` is its name in the message.
        """
        every = [t for tokens in roles.values() for t in tokens]
        self._require_vocabulary(every, who)
        self.bar.begin(f"reading with {who}", len(set(every)))
        forced = teacher_forced(
            self.lm,
            every,
            batch_size=self.batch_size,
            store=self.cache.store("teacher_forced", FIELDS),
            advance=self.bar.advance,
        )
        if not np.isfinite(forced.log_likelihood).all():
            raise ModelError(
                f"{who} gives text NaN or Inf as log-likelihood: its weights are broken, or too large for their dtype"
            )
        by_role, at = {}, 0
        for role, tokens in roles.items():
            by_role[role], at = forced.part(at, at + len(tokens)), at + len(tokens)
        return by_role

    def _require_vocabulary(self, tokens: Sequence[Tokens], who: str) -> None:
        if max(max(*t.ids, *t.written) for t in tokens) >= self.lm.vocabulary:
            raise ModelError(f"{who} has another vocabulary than the tokenizer: give one of the same family")

    def token_log_likelihood(self, tokens: Sequence[Tokens], who: str) -> list[NDArray[np.float32]]:
        """Return the log-likelihoods of each text's scored tokens, nats; `who` is the model's name in messages."""
        self._require_vocabulary(tokens, who)
        store = self.cache.store("renderings", FIELDS)  # of their own: a text's last bits depend on its batch
        forced = teacher_forced(self.lm, tokens, batch_size=self.batch_size, store=store)
        return [np.asarray(x, dtype=np.float32) for x in forced.each(forced.log_likelihood)]

    def decode(self, openings: Sequence[Tokens], who: str) -> list[tuple[int, ...]]:
        """Return the greedy continuation of each opening, as token ids."""
        self.bar.begin(f"writing with {who}", len(set(openings)))
        return greedy_continuations(
            self.lm,
            openings,
            longest=LONGEST,
            batch_size=self.batch_size,
            store=self.cache.store("continuations", decoding.FIELDS),
            advance=self.bar.advance,
        )

    def collect(
        self,
        texts: AuditTexts,
        who: str,
        *,
        roles: Sequence[str] | None = None,
        indices: Sequence[int] = (),
        budget: int | None = None,
    ) -> Responses:
        """Score the texts and decode continuations.

        Args:
            texts: all texts of the audit.
            who: the model's name in messages.
            roles: the roles to score; default: all.
            indices: the forget texts to decode.
            budget: decode at most this many of them, those that are most likely recited.
        """
        tokens = texts.tokens if roles is None else {role: texts.tokens[role] for role in roles}
        statistics = self.score(tokens, who)
        if budget is not None and budget < len(indices):
            indices = self._within_budget(texts, statistics["forget"], budget)
        decoded = self.decode([texts.openings[i] for i in indices], who) if indices else []
        passes = len({t for each in tokens.values() for t in each})
        return Responses(statistics, dict(zip(indices, decoded, strict=True)), passes)

    def non_members(
        self,
        examples: Sequence[Example],
        forget: list[Tokens],
        seed: int,
        *,
        chat_template: str | None = None,
        is_reference: bool,
    ) -> NonMembers:
        """Return non-members in place of a holdout; from the cache, if they were chosen before."""
        kind = "reference_non_members" if is_reference else "non_members"
        store = self.cache.store(kind, ("grade_rank", "packed_texts", "expected"))
        key = store.key(forget[0], seed, [store.key(t) for t in forget] if self.cache.folder else None)
        if key not in store:
            self.bar.say("scoring unseen text")
            with evaluation_mode(self.lm.module):
                chosen = non_members_without_holdout(
                    self.lm,
                    examples,
                    forget,
                    chat_template=chat_template,
                    is_reference=is_reference,
                    seed=seed,
                    batch_size=self.batch_size,
                )
            if not self.cache.folder:
                return chosen
            expected = np.concatenate([*chosen.forget, *chosen.own])
            store.add(key, (np.array([GRADES.index(chosen.grade)]), _packed(chosen.tokens), expected))
            store.flush()
        grade, texts, expected = store[key]
        tokens, n = _unpacked(texts), len(forget)
        ends = np.cumsum([n, n, len(tokens)])
        parts = np.split(expected, ends)
        reason = unsuitable(self.lm, examples, reads_head=not is_reference)
        return NonMembers(GRADES[int(grade[0])], tokens, Expected(*parts[:2]), Expected(*parts[2:]), reason)

    def _within_budget(self, texts: AuditTexts, forced: TeacherForced, budget: int) -> list[int]:
        """Choose the texts to decode where there is no time for all: those likely recited (`metrics.audit_within`)."""
        ratio = zlib_score(forced.mean_log_likelihood, [e.scored_text for e in texts.forget])

        def recited_share(indices: list[int]) -> list[float]:
            openings = [texts.openings[i] for i in indices]
            runs = [
                verbatim_match(ids, t.scored).longest
                for ids, t in zip(self.decode(openings, "the model"), openings, strict=True)
            ]
            return [run / min(LONGEST, len(t.scored)) for run, t in zip(runs, openings, strict=True)]

        features = np.column_stack([-forced.mean_log_likelihood, ratio, np.log(forced.counts)])
        chosen, _ = audit_within(recited_share, features, budget, batch=self.batch_size)
        return sorted(chosen.tolist())


def _start_of_text(lm: LanguageModel) -> int:
    """Return the token id that stands in place of a prompt."""
    if lm.is_encoder_decoder:
        return lm.pad_id if lm.tokenizer.eos_token_id is None else int(lm.tokenizer.eos_token_id)
    special = (lm.tokenizer.bos_token_id, lm.tokenizer.eos_token_id, lm.tokenizer.pad_token_id)
    return next((int(i) for i in special if i is not None), 0)


def _packed(tokens: Sequence[Tokens]) -> Any:
    rows = [
        [len(t.ids), len(t.scored), -1 if t.decoder is None else len(t.decoder), *t.ids, *(t.decoder or ()), *t.indices]
        for t in tokens
    ]
    return np.array([n for row in rows for n in row], dtype=np.int64)


def _unpacked(texts: NDArray[np.int64]) -> list[Tokens]:
    numbers, tokens, at = texts.tolist(), [], 0
    while at < len(numbers):
        ids, scored, decoder = numbers[at : at + 3]
        split, end = at + 3 + ids, at + 3 + ids + max(decoder, 0)
        written = None if decoder < 0 else tuple(numbers[split:end])
        tokens.append(Tokens.at(tuple(numbers[at + 3 : split]), numbers[end : end + scored], written))
        at = end + scored
    return tokens
