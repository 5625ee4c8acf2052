"""Training that resists relearning: forget gradients at weights that were fine-tuned on other text, and probes.

Source: Tamirisa et al. 2024, arXiv 2408.00761 (a fine-tuning attack inside the loop, its gradient applied to the
weights before it); the probes that end the run are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pyunlearn.attacks.relearning import RATES
from pyunlearn.data import Tokens
from pyunlearn.errors import ArgumentError
from pyunlearn.methods import Method
from pyunlearn.metrics import discoveries, generalized_exposure
from pyunlearn.models.scoring import Scorer
from pyunlearn.unlearning.adam import Adam
from pyunlearn.unlearning.checkpoint import LoopState
from pyunlearn.unlearning.distributed import Processes
from pyunlearn.unlearning.objectives import ForgetTerm
from pyunlearn.unlearning.optimizer import TrainedWeights
from pyunlearn.unlearning.schedule import STEPS_PER_ROUND, Schedule
from pyunlearn.unlearning.stopping import StoppingRule

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

STEPS = 5
"""Optimizer steps of fine-tuning before a forget gradient."""

PROBED_EVERY = 8
"""Rounds between two probes."""

_COMPARED = 64  # non-members in a probe, of each form
_FORGET, _OTHER = 0, 1  # what is fine-tuned on: the other half of the forget set, or text that is kept
_NEVER = -1


class Texts(Protocol):
    """The texts of a run, see `setup`."""

    @property
    def forget(self) -> list[Tokens]:
        """The forget set."""

    @property
    def non_members(self) -> list[Tokens]:
        """Texts that were not trained on."""


class Probed(NamedTuple):
    """Numbers under weights that were fine-tuned."""

    log_likelihood: Floats  # (k,) of forget texts, mean a token, nats
    non_member_nll: Floats  # (m,) of the non-members, nats a token

    @property
    def level(self) -> float:
        """Mean of the forget texts, nats a token; -inf for broken weights."""
        mean = float(self.log_likelihood.mean())
        return mean if np.isfinite(mean + self.non_member_nll.sum()) else -np.inf


class Robustness:
    """Unlearns what fine-tuning brings back, until fine-tuning brings nothing back: what a robust run adds.

    Once every example is settled, a *probe* fine-tunes the model for a while, on one half of the memorized records and
    on text that is kept, at the attacker's best rate of six. Examples of the other half that stand out then among
    non-members under the same weights are *returning*. A step on these takes the gradient of their forget loss at
    fine-tuned weights and applies it to the weights before (first-order meta-learning). Rounds take the two kinds of
    text in turn; halves and batches are drawn again for each. The run ends when nothing returns.

    Args:
        scorer: scorer of the model.
        accelerator: of accelerate.
        processes: the processes that share the work.
        schedule: order of the examples and micro-batches.
        stopping: the stopping rule, whose `returning` a probe sets.
        texts: the B forget texts and the non-members.
        records: (B,) index of the record of each: windows and other forms of one record are in the same half.
        other: text that is kept, to fine-tune on; none where there is none.
    """

    def __init__(
        self,
        scorer: Scorer,
        accelerator: Any,
        processes: Processes,
        schedule: Schedule,
        stopping: StoppingRule,
        texts: Texts,
        records: NDArray[np.int32],
        other: Sequence[Tokens],
    ) -> None:
        self.scorer, self.accelerator, self.processes = scorer, accelerator, processes
        self.schedule, self.stopping, self.forget, self.other = schedule, stopping, texts.forget, other
        self.records = records
        non_members = texts.non_members
        self.compared = _evenly(stopping.groups[1])
        self.non_members = [non_members[int(i)] for i in self.compared]
        memorized = np.unique(self.records[stopping.memorized])
        self.sources = [_FORGET] * (len(memorized) > 1) + [_OTHER] * bool(other)
        if len(memorized) and not self.sources:
            raise ArgumentError(
                "robust fine-tunes on other text before each step, and there is none: pass some of the training set "
                "as retain, or leave robust out"
            )
        self.probed_at, self.passed = _NEVER, False
        self.rates, self.shifts = np.full(2, np.nan), np.zeros(2)  # of each kind of text: learning rate; nats a token
        self.log_likelihood = np.zeros(
            len(texts.forget)
        )  # (B,) after fine-tuning, the larger of both kinds, nats a token

    def due(self, round_number: int) -> bool:
        """Return whether a probe comes before this round: all is settled, or the last one was PROBED_EVERY ago."""
        if self.probed_at == round_number or not self.stopping.memorized.any():
            return False
        late = self.stopping.returning.any() and round_number - self.probed_at >= PROBED_EVERY
        return bool(late or not self.stopping.unsettled.size)

    def round_batches(self, unsettled: Indices, round_number: int, steps_left: int) -> list[Indices]:
        """Return the forget examples of each step of a round: as the schedule's, but each of one half alone."""
        if not self.stopping.returning.any():
            return self.schedule.round_batches(unsettled, round_number, steps_left)
        half = self._half(round_number)[unsettled]
        halves = [self.schedule.round_batches(unsettled[half == h], round_number, steps_left) for h in (False, True)]
        longest = max(map(len, halves))
        in_turn = [each[i] for i in range(longest) for each in halves if i < len(each)]
        return in_turn[: min(STEPS_PER_ROUND, steps_left)]

    def backward(
        self,
        weights: TrainedWeights,
        forget_term: ForgetTerm,
        indices: Indices,
        *,
        round_number: int,
        step: int,
        factor: float,
    ) -> None:
        """Add the gradient of factor * the sum of the examples' forget losses, at weights that were fine-tuned.

        Args:
            weights: the trained weights; they keep their bits, and lose the gradients that they have.
            forget_term: the forget loss, which aims at what fine-tuning makes of unseen text.
            indices: examples of one half of the round.
            round_number: number of the round, which selects the text.
            step: number of the step, which selects the batches of it.
            factor: on the sum.
        """
        source = self.sources[round_number % len(self.sources)]
        half = self._half(round_number)
        pool = self._texts(source, half != half[indices[0]])
        scale = forget_term.scale(self.log_likelihood, indices)
        with self._fine_tuned(weights, pool, float(self.rates[source]), (self.schedule.seed, 3, step)):
            forget_term.aim(self.stopping.level + self.shifts[source], self.stopping.likely)
            for micro_batch, counts in self.processes.micro_batches(self.schedule, indices):
                with self.accelerator.autocast():
                    loss = counts * factor * scale * forget_term(micro_batch)
                self.accelerator.backward(loss)
            forget_term.aim(self.stopping.level, self.stopping.likely)

    def probe(self, weights: TrainedWeights, state: LoopState) -> None:
        """Fine-tune on each kind of text before a round, and set which examples are returning.

        Those are the ones with an exposure above the target under the fine-tuned weights. None is where nothing stands
        out more than unseen text would: the mean exposure is at most the target, and no example is memorized. Where the
        last probe found that too, and the weights have changed since, a standard error above the target is allowed.
        """
        stopping, round_number, before, passed = self.stopping, state.round_number, self.passed, True
        level = self.scorer.mean_log_likelihood(self.non_members).mean()
        exposure, log_likelihood = np.full((2, len(self.forget)), -np.inf)
        for source in self.sources:
            probed = self._attacked(weights, source, round_number)
            for indices, each in probed:
                exposure[indices] = np.maximum(exposure[indices], self._exposure(each, indices))
                log_likelihood[indices] = np.maximum(log_likelihood[indices], each.log_likelihood)
            bits = np.concatenate([self._exposure(each, indices) for indices, each in probed])
            limit = stopping.target_exposure * (1 + (len(bits) ** -0.5 if before else 0))
            exposed = discoveries(bits, rate=stopping.false_discovery_rate).significant
            passed &= bool(bits.mean() <= limit and not exposed.any())
            moved = np.mean([-each.non_member_nll.mean() for _, each in probed]) - level
            self.shifts[source] = min(0.0, float(moved)) if np.isfinite(moved) else 0.0
        self.log_likelihood = np.where(np.isfinite(log_likelihood), log_likelihood, 0.0)
        self.probed_at, self.passed = round_number, passed
        stopping.returning = stopping.memorized & (exposure > stopping.target_exposure) & (not passed)
        state.scores = stopping.scores | self.scores
        if state.history:
            state.history[-1]["returning"] = int(stopping.returning.sum())

    @property
    def scores(self) -> dict[str, NDArray[Any]]:
        """Name -> numbers of the last probe, which a resumed run continues from."""
        return {
            "returning": self.stopping.returning,
            "relearned": self.log_likelihood,
            "probe": np.array([self.probed_at, self.passed, *self.rates, *self.shifts]),
        }

    def resume(self, scores: dict[str, NDArray[Any]]) -> None:
        """Continue from the `scores` of a checkpoint."""
        self.stopping.returning = scores["returning"].astype(bool)
        self.log_likelihood = scores["relearned"]
        probed_at, passed, *others = scores["probe"]
        self.probed_at, self.passed = int(probed_at), bool(passed)
        self.rates, self.shifts = np.array(others[:2]), np.array(others[2:])

    def _half(self, round_number: int) -> NDArray[np.bool_]:
        """Return (B,) True for the examples whose records are in the first of two halves, drawn for this round."""
        memorized = np.unique(self.records[self.stopping.memorized])
        order = np.random.default_rng((self.schedule.seed, 2, round_number)).permutation(memorized)
        return np.isin(self.records, order[: len(order) // 2])

    def _texts(self, source: int, half: NDArray[np.bool_]) -> list[Tokens]:
        """Return the texts to fine-tune on: the memorized ones of a half, or those that are kept."""
        if source == _OTHER:
            return list(self.other)
        return [self.forget[int(i)] for i in np.flatnonzero(self.stopping.memorized & half)]

    def _attacked(self, weights: TrainedWeights, source: int, round_number: int) -> list[tuple[Indices, Probed]]:
        """Return the numbers of each memorized example after fine-tuning, on the half that it is not in.

        The first probe of a run chooses the learning rate, at which the first half becomes likeliest; so does a later
        one in which that rate breaks the model.
        """
        half, memorized = self._half(round_number), self.stopping.memorized
        tests = [(half, ~half), (~half, half)] if source == _FORGET else [(memorized, half)]
        out: list[tuple[Indices, Probed]] = []
        for own, others in tests:
            indices, pool = np.flatnonzero(memorized & own), self._texts(source, others)
            rates: tuple[float, ...] = (float(self.rates[source]),)
            tried = [self._probed(weights, indices, pool, rate, round_number) for rate in rates if np.isfinite(rate)]
            if not any(np.isfinite(each.level) for each in tried):
                rates = RATES
                tried = [self._probed(weights, indices, pool, rate, round_number) for rate in rates]
            best = int(np.argmax([each.level for each in tried]))
            self.rates[source] = rates[best]
            out.append((indices, tried[best]))
        return out

    def _probed(
        self, weights: TrainedWeights, indices: Indices, pool: Sequence[Tokens], rate: float, round_number: int
    ) -> Probed:
        """Return the numbers of some forget texts and of the non-members after fine-tuning."""
        with self._fine_tuned(weights, pool, rate, (self.schedule.seed, 4, round_number)):
            own = self.scorer.mean_log_likelihood([self.forget[int(i)] for i in indices])
            non_member_nll = -self.scorer.mean_log_likelihood(self.non_members)
        return Probed(own, non_member_nll)

    def _exposure(self, probed: Probed, indices: Indices) -> Floats:
        """Return (k,) exposures of the examples among the non-members under the same weights, bits; 0 if broken."""
        expected = self.stopping.non_members
        scores = -probed.log_likelihood - expected.forget.nll[indices]
        if not np.isfinite(probed.level):
            return np.zeros(len(indices))
        of_forget, own = self.stopping.groups
        groups = None if expected.forms is None else (of_forget[indices], own[self.compared])
        return generalized_exposure(
            scores, probed.non_member_nll - expected.own.nll[self.compared], groups=groups
        ).lower

    @contextmanager
    def _fine_tuned(
        self, weights: TrainedWeights, pool: Sequence[Tokens], rate: float, seed: tuple[int, ...]
    ) -> Iterator[None]:
        """Fine-tune all trained weights for STEPS steps; at the end of the block they have their bits again.

        Gradients that the block leaves stay.
        """
        parameters = list(weights.parameters.values())
        saved = [p.detach().to("cpu", copy=True) for p in parameters]
        try:
            self._fine_tune(parameters, pool, rate, seed, offload=weights.optimizer.offload)
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(parameters, saved, strict=True):
                    p.copy_(value)

    def _fine_tune(
        self, parameters: list[nn.Parameter], pool: Sequence[Tokens], rate: float, seed: tuple[int, ...], offload: bool
    ) -> None:
        lm, size = self.scorer.lm, self.schedule.batch_size
        rng, queue = np.random.default_rng(seed), np.empty(0, dtype=np.int64)
        optimizer = Adam(parameters, rate, offload=offload)
        optimizer.zero_grad()
        with torch.enable_grad():
            for _ in range(STEPS):
                while len(queue) < size:
                    queue = np.concatenate([queue, rng.permutation(len(pool))])
                batch, queue = queue[:size], queue[size:]
                for micro_batch, counts in self.processes.micro_batches(self.schedule, batch):
                    with self.accelerator.autocast():
                        loss = -counts * lm.likelihood(lm.collate(pool, micro_batch)).sum() / size
                    self.accelerator.backward(loss)
                self.processes.sum_gradients(parameters)
                self.processes.clip_gradients(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()


def _evenly(forms: Indices) -> Indices:
    """Return the indices of evenly spaced non-members, _COMPARED of each form at most; forms: (m,)."""
    chosen = []
    for form in np.unique(forms):
        own = np.flatnonzero(forms == form)
        chosen.append(own[np.linspace(0, len(own) - 1, min(len(own), _COMPARED)).astype(int)])
    return np.concatenate(chosen)


def require_robust(method: Method) -> None:
    """Raise ArgumentError for a method whose loss is not on what the model predicts."""
    if method.kind == "hidden":
        raise ArgumentError(
            f"robust unlearns what fine-tuning makes likelier, and {method.name} changes the hidden states of a layer "
            'instead: choose another method, such as method="auto", or leave robust out'
        )
