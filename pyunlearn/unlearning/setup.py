"""What stays the same during a run: the texts, the yardsticks under the original model, and how to measure against them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyunlearn import models
from pyunlearn.data import TokenBatch, Tokens, batches, collate, padding_id
from pyunlearn.errors import TrainingError
from pyunlearn.methods import Method, Multiplier
from pyunlearn.metrics import SIGNIFICANT, generalized_exposure
from pyunlearn.models.sampling import require_enough, sampled
from pyunlearn.progress import Progress
from pyunlearn.unlearning.distributed import Workers
from pyunlearn.unlearning.hidden_cache import Kept
from pyunlearn.unlearning.reference import (
    alternates_of,
    compare_with,
    difficulty_of,
    multiplier_of,
    reference_of,
    token_weights_of,
)
from pyunlearn.unlearning.representation import Steering
from pyunlearn.unlearning.result import ExampleResult, Utility
from pyunlearn.unlearning.token_weights import Emphasis, in_order

Floats = NDArray[np.float64]
_WATCHED_TOKENS = 1024  # of the retain set, or of the references, at each evaluation


@dataclass(frozen=True)
class Measured:
    """The whole state of forgetting and utility at one moment."""

    forget: Floats  # (B,) mean log-likelihood a token, nats
    lower: Floats  # (B,) anchored exposure, bits
    upper: Floats
    watched: Floats  # (W,) mean negative log-likelihood a token of each watched sequence
    utility: float  # relative rise


class Run:
    """What stays the same during a run: the texts, the yardsticks under the original model, and how to measure against them."""

    def __init__(
        self, model: Any, tokenizer: Any, method: Method, options: dict[str, Any], forget: list[Tokens], retain: list[Tokens] | None,
        holdout: list[Tokens] | None, *, instead: list[Tokens] | None, reference_model: Any, retain_loss: str | None, emphasis: Emphasis,
        cached: dict[str, Any] | None, batch_size: int, micro_batch_size: int | None, max_steps: int, until: float, budget: float,
        workspace: int | None, seed: int, progress: bool | None,
    ) -> None:  # fmt: skip
        from accelerate import Accelerator

        self.accelerator = _accelerator(Accelerator, model)
        self.workers, self.device = Workers(self.accelerator), self.accelerator.device
        self.model = model.to(self.device)
        self.inner = self.accelerator.unwrap_model(self.model)
        self.workers.same_weights(self.model)
        self.model.eval()  # no dropout: the same weights always give the same log-likelihoods
        self.adapted = hasattr(self.inner, "peft_config")
        self.likelihood = models.Likelihood(self.model, workspace=workspace)
        self.tokenizer, self.method, self.options = tokenizer, method, options
        self.forget, self.retain, self.seed, self.batch_size = forget, retain, seed, batch_size
        self.until, self.budget, self.retain_loss = until, budget, retain_loss
        self.read = {"forget": forget} | dict.fromkeys(("refusal", "winner"), instead or [])
        self.cached = cached or {}  # by name: what was sampled before the first step of the run that is gone on with
        self.emphasis, self.micro_batch_size = emphasis, micro_batch_size or batch_size
        self.weights: list[Floats] | None = None  # (T,) of each forget example's tokens
        self.difficulty: Floats | None = None  # (B,)
        self.pad, self.start = (
            padding_id(tokenizer),
            models.decoder_start_id(model) if models.is_encoder_decoder(model) else None,
        )
        self.steering: Steering | None = None
        self.held: Floats | None = None  # (R,) negative log-likelihoods that the retain set is held at
        self.kept: dict[str, Kept] = {}  # by role: whole distributions under the reference
        self.multiplier: Multiplier | None = None
        self.bar = Progress(progress if self.workers.leads else False)
        try:
            self._begin(holdout, reference_model, max_steps)
        except BaseException:
            self.bar.close()
            raise

    def _begin(self, holdout: list[Tokens] | None, reference_model: Any, max_steps: int) -> None:
        """Takes every measure of the original model."""
        forget, retain = self.forget, self.retain
        self.bar.say("scoring the forget set")
        self.original = self.mean_log_likelihood(forget)
        if not np.isfinite(self.original).all():
            raise TrainingError(
                "the model gives NaN or Inf for the forget set before the first step: it cannot be trained from here"
            )
        self.greedy_before = self.greedy_match()
        self.bar.say("sampling text the model would typically write" if holdout is None else "scoring the holdout")
        self.references = holdout or []
        if holdout is None:
            alone = sampled(self.inner, self.tokenizer, forget, seed=self.seed) if self.workers.leads else []
            self.references = self.workers.same_objects(alone)
        require_enough(self.references, holdout=holdout is not None)
        if "alternates" in self.method.needs:
            self.read["alternate"] = alternates_of(self)
        self.reference_scores = -self.mean_log_likelihood(self.references)
        self.watch = _within(self.references if retain is None else retain, _WATCHED_TOKENS)
        self.watched_on = (
            "retain set" if retain is not None else "holdout" if holdout is not None else "text sampled from the model"
        )
        self.watched_before = -self.mean_log_likelihood(self.watch)
        self.significant = SIGNIFICANT - 1e-9  # 19 references reach it exactly
        self.reference: dict[str, list[Floats]] = {}  # by role: under the reference, each token, or each text's sum
        compares = "reference" in self.method.needs or self.retain_loss == "kl" or self.emphasis.compares
        with reference_of(self, reference_model if compares else None) as reference:
            self.weights = token_weights_of(self, reference)
            compare_with(self, reference, max_steps)
            self.difficulty = difficulty_of(self, reference)
        if self.retain_loss == "hold" and retain is not None:
            self.held = -self.mean_log_likelihood(retain)
        if "retain" in self.method.needs:
            self.multiplier = multiplier_of(self)
        if self.method.kind == "hidden":
            self.bar.say("reading the hidden states")
            keeps = self.retain_loss == "representation"
            self.steering = Steering(self, self.retain_ahead(max_steps) if keeps else (), keeps=keeps)
        self.start_state = self._measured(self.original, self.watched_before)
        self.memorized = self.start_state.lower >= self.significant
        self.now = self.start_state
        self.steps = np.zeros(len(forget), dtype=np.int64)

    def take_fingerprint(self, settings: dict[str, Any]) -> None:
        """What a run resumed from this one's checkpoint must agree in: settings, and the scores of every text under the original model."""
        scores = {"forget set": self.original, "holdout": self.reference_scores, "retain set": self.watched_before}
        for role, found in self.reference.items():
            scores[f"{role}s"] = np.array([x.sum() for x in found])
        scores["token weights"] = np.concatenate(self.weights or [np.empty(0)])
        scores["difficulty"] = np.empty(0) if self.difficulty is None else self.difficulty
        if "forget" in self.kept:
            scores["reference_model"] = self.kept["forget"].magnitudes(range(len(self.forget)))
        elif self.kept and self.kept["retain"].states is not None:  # later steps may be others in a longer run
            scores["reference_model"] = self.kept["retain"].magnitudes(self.retain_places(0))
        self.fingerprint = settings | {name: values.tolist() for name, values in scores.items()}

    def retain_places(self, step: int) -> list[int]:
        """The retain examples of a step: all of them, shuffled, then shuffled anew."""
        assert self.retain is not None
        n, size = len(self.retain), min(self.batch_size, len(self.retain))
        order = np.random.default_rng((self.seed, 1, step * size // n)).permutation(n)
        return [int(order[(step * size + i) % n]) for i in range(size)]

    def retain_ahead(self, max_steps: int) -> list[int]:
        """The retain examples that so many steps come to."""
        assert self.retain is not None
        once = -(-len(self.retain) // min(self.batch_size, len(self.retain)))  # steps that see all of it
        return sorted({i for step in range(min(max_steps, once)) for i in self.retain_places(step)})

    def position(self) -> tuple[NDArray[np.int64], dict[str, Any]]:
        """Beside the weights, what a step changes and a taken-back one must change back."""
        return self.steps.copy(), {} if self.multiplier is None else asdict(self.multiplier)

    def return_to(self, position: tuple[Any, dict[str, Any]]) -> None:
        """Goes back to what `position` gave."""
        self.steps[:] = position[0]
        if self.multiplier is not None:
            self.multiplier = replace(self.multiplier, **position[1])

    # -- measuring

    def collate(self, tokens: Sequence[Tokens], places: Iterable[int]) -> TokenBatch:
        """Those of the tokens as a batch on the model's device."""
        chosen = [tokens[i] for i in places]
        return collate(chosen, pad_id=self.pad, decoder_start_id=self.start).to(self.device)

    def batches(self, tokens: Sequence[Tokens]) -> Iterator[tuple[list[int], TokenBatch]]:
        """This process's length-bucketed batches on the model's device, with their places in `tokens`."""
        every = batches(
            tokens, 2 * min(self.batch_size, self.micro_batch_size), pad_id=self.pad, decoder_start_id=self.start
        )
        for places, batch in islice(every, self.workers.rank, None, self.workers.count):
            yield places, batch.to(self.device)

    @torch.no_grad()
    def mean_log_likelihood(self, tokens: Sequence[Tokens], likelihood: models.Likelihood | None = None) -> Floats:
        """(len(tokens),) mean log-likelihood per scored token, nats."""
        out = np.zeros(len(tokens))
        for places, batch in self.batches(tokens):
            with self.accelerator.autocast():
                found = (likelihood or self.likelihood)(batch)
            out[places] = _means(found, sizes(tokens, places))
        return self.workers.sum_array(out)

    @torch.no_grad()
    def token_log_likelihood(self, tokens: Sequence[Tokens], likelihood: models.Likelihood) -> list[Floats]:
        """(T,) log-likelihoods of each one's scored tokens, nats."""
        ends = np.cumsum([len(t.scored) for t in tokens])
        out = np.zeros(int(ends[-1]))
        for places, batch in self.batches(tokens):
            with self.accelerator.autocast():
                found = likelihood(batch)
            for i, part in zip(places, found.split(sizes(tokens, places)), strict=True):
                out[ends[i] - len(part) : ends[i]] = part.double().cpu().numpy()
        return np.split(self.workers.sum_array(out), ends[:-1])

    def forget_batch(self, places: Iterable[int]) -> tuple[TokenBatch, Tensor]:
        """What the method reads of these examples, a refusal before its forget text, and the reference's log-likelihoods (zeros where it needs none)."""
        reads = [(role, self._place(role, i)) for i in places for role in self.method.reads]
        tokens = [self.read[role][i] for role, i in reads]
        if self.reference:
            given = np.concatenate([self.reference[role][i] for role, i in reads])
        else:
            given = np.zeros(sum(len(t.scored) for t in tokens) if self.method.token else len(tokens))
        return self.collate(tokens, range(len(tokens))), torch.as_tensor(given, dtype=torch.float32, device=self.device)

    def forget_weights(self, places: Iterable[int]) -> Tensor | None:
        """The weights of the tokens of `forget_batch`, (n,): 1 in what is read beside the forget texts; None where none are weighted."""
        if self.weights is None:
            return None
        reads = [(role, i, self.read[role][self._place(role, i)]) for i in places for role in self.method.reads]
        each = [self.weighed(role, i, np.ones(len(t.scored))) for role, i, t in reads]
        return torch.as_tensor(np.concatenate(each), dtype=torch.float32, device=self.device)

    def weighed(self, role: str, i: int, values: Floats) -> Floats:
        """(T,) the values of one text's tokens times its weights; what is read beside the forget texts has none."""
        return values if self.weights is None or role != "forget" else self.weights[i] * values

    def pieces(self, places: Iterable[int]) -> list[list[int]]:
        """Examples in groups that go through the model together, and leave their gradients one group after the other."""
        every, size = [int(i) for i in places], self.micro_batch_size
        return [every[i : i + size] for i in range(0, len(every), size)]

    @torch.no_grad()
    def greedy_match(self) -> Floats:
        """(B,) share of each forget example's tokens that are the model's first choice."""
        out = np.zeros(len(self.forget))
        for places, batch in self.batches(self.forget):
            with self.accelerator.autocast():
                found = self.likelihood.greedy_matches(batch)
            out[places] = _means(found.float(), sizes(self.forget, places))
        return self.workers.sum_array(out)

    def measure(self) -> Measured:
        """Scores everything that is watched, under the present weights."""
        return self._measured(self.mean_log_likelihood(self.forget), -self.mean_log_likelihood(self.watch))

    def _measured(self, forget: Floats, watched: Floats) -> Measured:
        if not (np.isfinite(forget).all() and np.isfinite(watched).all()):
            bad = np.full(len(forget), np.nan)
            return Measured(forget, bad, bad, watched, math.nan)
        exposure = generalized_exposure(-forget, self.reference_scores)
        rise = (watched.mean() - self.watched_before.mean()) / max(self.watched_before.mean(), 1.0)
        return Measured(forget, exposure.lower, exposure.upper, watched, float(rise))

    def active(self) -> NDArray[np.int64]:
        """Indices of the examples that are still to be forgotten."""
        return np.flatnonzero(self.memorized & (self.now.lower > self.until))

    def in_order(self, round_number: int) -> NDArray[np.int64]:
        """Those still to be forgotten, in the order in which a round takes them."""
        return in_order(self.active(), self.emphasis.order, self.difficulty, (self.seed, round_number))

    def objection(self, found: Measured) -> str | None:
        """Why a state may not be kept, or None."""
        if not math.isfinite(found.utility):
            return "not finite"
        if found.utility > self.budget:
            return "utility budget"
        over = (found.upper >= self.significant) & (self.start_state.upper < self.significant)
        return "over-unlearning" if over.any() else None

    def _place(self, role: str, i: int) -> int:
        """Where in `read[role]` the example's text stands; of its alternates each has its turn."""
        if role != "alternate":
            return i
        count = len(self.read[role]) // len(self.forget)
        return i * count + int(self.steps[i]) % count

    # -- reporting

    def verdicts(self, texts: Sequence[str]) -> list[ExampleResult]:
        """One for each forget example."""
        greedy = self.greedy_match() if self.steps.any() else self.greedy_before
        return [
            ExampleResult(
                i, texts[i], len(t.scored), float(self.original[i]), float(self.now.forget[i]), float(self.start_state.lower[i]),
                float(self.now.lower[i]), float(self.now.upper[i]), float(self.greedy_before[i]), float(greedy[i]), int(self.steps[i]),
                self._verdict(i),
            )
            for i, t in enumerate(self.forget)
        ]  # fmt: skip

    def _verdict(self, i: int) -> str:
        if self.now.upper[i] >= self.significant > self.start_state.upper[i]:
            return "over-unlearned"
        if not self.memorized[i]:
            return "not memorized"
        return "forgotten" if self.now.lower[i] <= self.until else "still exposed"

    def utility(self) -> Utility:
        """What the run has cost the watched text."""
        before, after = self.watched_before, self.now.watched
        rng = np.random.default_rng(self.seed)
        draws = rng.integers(0, len(before), (2000, len(before)))
        rises = (after[draws].mean(1) - before[draws].mean(1)) / np.maximum(before[draws].mean(1), 1.0)
        low, high = np.quantile(rises, [0.025, 0.975])
        return Utility(
            self.watched_on, len(before), float(before.mean()), float(after.mean()), self.now.utility, (float(low), float(high)),
            self.budget, self._drift(),
        )  # fmt: skip

    def _drift(self) -> float:
        """How much less likely the references have become, nats a token: the yardsticks stay where they were, so whoever reads an exposure wants to know."""
        if not self.steps.any():
            return 0.0
        return float((-self.mean_log_likelihood(self.references) - self.reference_scores).mean())


def sizes(tokens: Sequence[Tokens], places: Iterable[int]) -> list[int]:
    """Scored tokens of each: known here without asking the card."""
    return [len(tokens[i].scored) for i in places]


def _means(values: Tensor, sizes: list[int]) -> Floats:
    """(B,) means of values (n,), which stand example by example: no atomics, so the same bits every time."""
    sums = torch.stack([part.sum() for part in values.split(sizes)])
    means: Floats = sums.double().cpu().numpy() / sizes
    return means


def _within(tokens: list[Tokens], budget: int) -> list[Tokens]:
    """Evenly spaced sequences whose scored tokens fit the budget, one at least."""
    total = sum(len(t.scored) for t in tokens)
    count = max(1, min(len(tokens), len(tokens) * budget // max(total, 1)))
    return tokens if count == len(tokens) else [tokens[i * len(tokens) // count] for i in range(count)]


def _accelerator(kind: Any, model: Any) -> Any:
    """An Accelerator; on a card that has bfloat16, float32 weights compute in it."""
    from accelerate.state import AcceleratorState

    if AcceleratorState._shared_state:
        return kind()
    wide = next(models.unwrapped(model).parameters()).dtype == torch.float32
    mixed = wide and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return kind(mixed_precision="bf16" if mixed else "no")
