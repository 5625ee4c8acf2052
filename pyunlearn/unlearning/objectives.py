"""Terms of the loss in one optimizer step: the forget term and the retain term."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyunlearn.data import TokenBatch, Tokens
from pyunlearn.methods import Method, Multiplier
from pyunlearn.methods.match import match
from pyunlearn.methods.retain import retain_hold, retain_kl, retain_nll, retain_representation
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.scoring import scored_tokens
from pyunlearn.unlearning.loss_tensors import example_tensors, token_tensors
from pyunlearn.unlearning.reference import Reference
from pyunlearn.unlearning.representation import RepresentationTarget
from pyunlearn.unlearning.token_stopping import above_level, stopped_by_token

Floats = NDArray[np.float64]

_LEAST_SLOPE = 1e-4  # derivative below which a loss is not scaled up: a text that rises would be pulled too hard


class Unseen(NamedTuple):
    """Log-likelihoods that the forget texts would have if they were unseen, nats."""

    level: Floats  # (B,) mean per token at which each text is to end
    likely: Floats  # (B,) share of each text's tokens that may stay likelier than the rest
    tokens: Floats  # (Q,) of tokens of the non-members, ascending


class ForgetTerm:
    """Forget loss of a method: `term(indices)` -> () the sum of those examples' losses.

    Args:
        lm: the model.
        method: the method.
        options: the method's options that the user set.
        texts: role -> texts; the roles are "forget", and "refusal", "winner" or "alternate".
        reference: the reference model's numbers.
        weights: (T,) token weights of each forget text, or None.
        target: the layer, for methods on hidden states.
        unseen: log-likelihoods of unseen text, for `match` and for `restore`.
        visits: (B,) steps that took each example so far, counted by the loop; they select the alternate of a step.
        batch_reduction: "token" multiplies each example's loss by its scored tokens, so that `divisor` makes the mean
            over all tokens of a step; for methods of which `Method.token_mean` is true.
    """

    def __init__(
        self,
        lm: LanguageModel,
        method: Method,
        options: Mapping[str, Any],
        texts: Mapping[str, list[Tokens]],
        *,
        reference: Reference,
        weights: Sequence[Floats] | None = None,
        target: RepresentationTarget | None = None,
        unseen: Unseen | None = None,
        visits: NDArray[np.int64],
        batch_reduction: str = "example",
    ) -> None:
        self.by_token = batch_reduction == "token"
        self.lm, self.method, self.options, self.texts = lm, method, options, texts
        self.reference, self.weights, self.target = reference, weights, target
        self.unseen, self.visits = unseen, visits
        loss = {"vocabulary": self._on_distributions, "hidden": self._on_hidden_states}
        self._loss: Callable[[list[int]], Tensor] = loss.get(method.kind, self._on_log_likelihoods)

    def scale(self, log_likelihood: Floats, indices: NDArray[np.int64]) -> float:
        """Return the factor that makes the loss pull the examples at `indices` as gradient ascent does, on average.

        It is 1 / the mean derivative of a loss on summed log-likelihoods with respect to a text's mean a token. So a
        loss of long sums does not outweigh the retain loss, and one that fades does not vanish. The examples'
        weights relative to each other are the method's. A winner counts as unchanged. It is 1 for other methods, and
        with token weights, a temperature or a share of the tokens, under which the sums are not known.

        Args:
            log_likelihood: (B,) of the forget set, mean a token, nats.
            indices: of the examples that are to be unlearned.
        """
        method = self.method
        whole = self.weights is None and all(self.options.get(name, 1) == 1 for name in ("temperature", "top_fraction"))
        sums = method.kind == "example" and "forget" in method.roles and whole
        if not sums or not len(indices):
            return 1.0
        rows = [(role, int(i)) for i in indices for role in method.roles]
        reference = torch.as_tensor(self._example_reference(rows), dtype=torch.float64).view(-1, len(method.roles))
        lengths = torch.tensor([len(self.texts["forget"][int(i)].scored) for i in indices], dtype=torch.float64)
        forget = (torch.as_tensor(log_likelihood[indices]) * lengths).requires_grad_()
        if method.pairs:
            tensors = example_tensors(method, torch.stack([reference[:, 0], forget], dim=1), lengths, reference)
        else:
            tensors = example_tensors(method, forget, lengths, reference[:, 0])
        (slope,) = torch.autograd.grad(method.loss(tensors, self.options).sum(), forget)
        return 1 / max(float((slope.abs() * lengths).mean()), _LEAST_SLOPE)

    def _example_reference(self, rows: list[tuple[str, int]]) -> Floats:
        """Return (n,) the reference model's sums of (role, example) rows, 0 without a reference model."""
        reference = self.reference.gather([(role, self._index(role, i)) for role, i in rows])
        return np.zeros(len(rows)) if reference is None else reference

    def __call__(self, indices: list[int]) -> Tensor:
        """Return () the sum of the losses of the forget examples at `indices`, differentiable."""
        return self._loss(indices)

    def divisor(self, indices: NDArray[np.int64], restored: NDArray[np.int64] | None = None) -> int:
        """Return what a step's sum of losses is divided by: its examples, or the tokens in them that the losses score.

        Args:
            indices: of the examples that are to be unlearned.
            restored: of those that `restore` brings back.
        """
        rows = [(self.method.roles[0], i) for i in indices]
        rows += [] if restored is None else [("forget", i) for i in restored]
        return sum(len(self.texts[role][int(i)].scored) for role, i in rows) if self.by_token else len(rows)

    def _summed(self, losses: Tensor, counts: Tensor) -> Tensor:
        """Return (B,) losses as a step adds them up: with batch_reduction "token", times their scored tokens (B,)."""
        return losses * counts if self.by_token else losses

    def aim(self, level: Floats, likely: Floats) -> None:
        """Set where the texts are to end.

        Args:
            level: (B,) mean log-likelihoods, nats a token.
            likely: (B,) share of each text's tokens that may stay likelier than the rest.
        """
        if self.unseen is not None:
            self.unseen = self.unseen._replace(level=level, likely=likely)

    def restore(self, indices: list[int]) -> Tensor:
        """Return () the sum of the examples' losses of `match`, which bring back those that went too far."""
        batch = self.lm.collate(self.texts["forget"], indices)
        unseen = self._unseen()

        def loss(log_likelihood: Tensor, example: Tensor, counts: Tensor, level: Tensor, likely: Tensor) -> Tensor:
            losses = match(log_likelihood, example, counts, level, unseen, likely, reduction="none")
            return self._summed(losses, counts)

        return self.lm.likelihood.token_objective(batch, loss, *self._aim(indices, batch)).loss

    def _on_log_likelihoods(self, indices: list[int]) -> Tensor:
        """Compute the loss of a method on summed log-likelihoods or on those of single tokens."""
        method, device = self.method, self.lm.device
        rows = [(role, self._index(role, i)) for i in indices for role in method.roles]
        tokens = [self.texts[role][i] for role, i in rows]
        batch = self.lm.collate(tokens)
        reference = self.reference.gather(rows)
        if reference is None:
            reference = np.zeros(sum(len(t.scored) for t in tokens) if method.token else len(tokens))
        reference_values = torch.as_tensor(reference, dtype=torch.float32, device=device)
        weights = self._weights(rows, tokens)
        selection = {k: v for k, v in self.options.items() if k in ("temperature", "top_fraction")}
        group_size = len(method.roles)
        likelihood = self.lm.likelihood

        if method.token:
            per_token = {"reference": reference_values} | ({} if weights is None else {"weights": weights})
            constants = {}
            if "unseen" in method.inputs:
                per_token["level"], per_token["likely"] = self._aim(indices, batch)
                constants["unseen"] = self._unseen()

            def token_loss(log_likelihood: Tensor, example: Tensor, counts: Tensor, *values: Tensor) -> Tensor:
                named = dict(zip(per_token, values, strict=True)) | constants
                return method.loss(token_tensors(log_likelihood, example, counts, **named), self.options)

            # heated log-likelihoods are none that unseen text has, and token weights say themselves what is unlearned
            plain = self.options.get("temperature", 1.0) == 1 and weights is None
            values = [*per_token.values()]
            if self.unseen is not None and "unseen" not in method.inputs and plain:
                token_loss = stopped_by_token(token_loss, self._unseen(), group_size=group_size)
                values += self._aim(indices, batch, len(method.roles))

            function = token_loss

            def summed(log_likelihood: Tensor, example: Tensor, counts: Tensor, *tensors: Tensor) -> Tensor:
                return self._summed(function(log_likelihood, example, counts, *tensors), counts)

            token_loss = summed if self.by_token else token_loss
            return likelihood.token_objective(batch, token_loss, *values, group_size=group_size, **selection).loss

        def loss(sums: Tensor, counts: Tensor, *tensors: Tensor) -> Tensor:
            return self._summed(method.loss(example_tensors(method, sums, counts, *tensors), self.options), counts)

        return likelihood.objective(
            batch, loss, reference_values, group_size=group_size, weights=weights, **selection
        ).loss

    def _on_distributions(self, indices: list[int]) -> Tensor:
        """Compute the loss of a method on whole next-token distributions."""
        batch = self.lm.collate(self.texts["forget"], indices)
        model, cache = self.lm.likelihood.distributions(batch), self.reference.forget
        tensors: dict[str, Any] = {
            "model": model,
            "reference": None if cache is None else cache.at(indices),
            "targets": batch.targets,
            "example": batch.example,
            "counts": batch.counts,
        }
        if self.unseen is not None:
            log_likelihood = model.log_likelihood(batch.targets)
            level, likely = self._aim(indices, batch)
            aim = level, self._unseen(), likely
            tensors["weights"] = above_level(log_likelihood, batch.example, batch.counts, *aim)
        return self._summed(self.method.loss(tensors, self.options), batch.counts).sum()

    def _on_hidden_states(self, indices: list[int]) -> Tensor:
        """Compute the loss of a method on the hidden states of one layer."""
        assert self.target is not None
        return self.target.forget_loss(indices)

    def _aim(self, indices: Sequence[int], batch: TokenBatch, repeats: int = 1) -> tuple[Tensor, Tensor]:
        """Return (n,) the mean log-likelihood at which each token's text is to end, nats, and (n,) its `likely`."""
        assert self.unseen is not None
        rows, device = np.repeat(list(indices), repeats), self.lm.device
        both = (self.unseen.level[rows], self.unseen.likely[rows])
        level, likely = (torch.as_tensor(x, dtype=torch.float32, device=device)[batch.example] for x in both)
        return level, likely

    def _unseen(self) -> Tensor:
        """Return (Q,) log-likelihoods of tokens of unseen text, nats."""
        assert self.unseen is not None
        return torch.as_tensor(self.unseen.tokens, dtype=torch.float32, device=self.lm.device)

    def _weights(self, rows: Sequence[tuple[str, int]], tokens: Sequence[Tokens]) -> Tensor | None:
        """Return (n,) token weights of the texts, 1 in all but the forget texts; None without token weights."""
        if self.weights is None:
            return None
        own = self.weights
        each = [
            own[i] if role == "forget" else np.ones(len(t.scored)) for (role, i), t in zip(rows, tokens, strict=True)
        ]
        return torch.as_tensor(np.concatenate(each), dtype=torch.float32, device=self.lm.device)

    def _index(self, role: str, i: int) -> int:
        """Return the index in `texts[role]` of example i's text; the alternates of an example take turns."""
        if role != "alternate":
            return i
        count = len(self.texts[role]) // len(self.texts["forget"])
        return i * count + int(self.visits[i]) % count


def token_quantiles(log_likelihoods: Sequence[Floats], count: int = 512) -> Floats:
    """Return (count,) evenly spaced quantiles of the tokens' log-likelihoods in all texts, ascending."""
    return np.quantile(np.concatenate(log_likelihoods), (np.arange(count) + 0.5) / count)


class RetainBatch(NamedTuple):
    """Retain examples of one optimizer step."""

    indices: list[int]
    tokens: int  # scored tokens of all of them


class RetainTerm:
    """Retain loss: `term(micro_batch, step_batch)` returns its share of the step's loss and the sum for the history.

    Args:
        lm: the model.
        loss: "nll", "hold", "kl" or "representation"; None where there is no retain loss.
        weight: factor on the loss.
        retain: the retain texts, or None.
        initial_nll: (R,) negative log-likelihoods per token before the run, nats, for "hold".
        reference: the reference model's numbers, for "kl".
        target: the layer, for "representation".
        multiplier: PDU's dual variable, a further factor on the loss.
        rests: index of a forget text -> index in `retain` of its rest, of which each step on the text takes one more.
    """

    def __init__(
        self,
        lm: LanguageModel,
        loss: str | None,
        weight: float,
        retain: list[Tokens] | None,
        *,
        initial_nll: Floats | None = None,
        reference: Reference,
        target: RepresentationTarget | None = None,
        multiplier: Multiplier | None = None,
        rests: Mapping[int, int] | None = None,
    ) -> None:
        self.lm, self.loss, self._weight, self.retain = lm, loss, weight, retain or []
        self.rests = rests or {}
        self.initial_nll, self.reference, self.target, self.multiplier = initial_nll, reference, target, multiplier
        terms = {"kl": self._kl, "representation": self._representation}
        self._term = terms.get(loss or "nll", self._nll)

    @property
    def active(self) -> bool:
        """True where a step has a retain term."""
        return bool(self.retain and (self._weight or self.multiplier))

    @property
    def weight(self) -> float:
        """Factor on the loss in this step."""
        return self._weight if self.multiplier is None else self._weight * self.multiplier.value

    def batch(self, indices: list[int], forget_indices: Iterable[int] = ()) -> RetainBatch | None:
        """Return the step's retain examples and the rests of its forget texts, with the number of scored tokens.

        None where there are neither.
        """
        chosen = indices + [self.rests[int(i)] for i in forget_indices if int(i) in self.rests]
        return RetainBatch(chosen, sum(scored_tokens(self.retain, chosen))) if chosen else None

    def __call__(self, indices: list[int], step: RetainBatch) -> tuple[Tensor, float]:
        """Return the loss of a micro-batch of the step, and the sum over its tokens (or examples) for the history."""
        return self._term(indices, step)

    def report(self, total: float, step: RetainBatch | None) -> dict[str, float | None]:
        """Return a step's record for the history, and update the multiplier.

        The record holds `retain_nll`, the mean negative log-likelihood per token, `retain_kl`, the mean divergence per
        token, or `retain_drift`, the mean squared distance of the hidden states from their original values; and the
        `multiplier`.
        """
        if step is None:
            return {"retain_nll": None}
        if self.loss == "representation":
            return {"retain_nll": None, "retain_drift": finite(total / len(step.indices))}
        mean = total / step.tokens
        report: dict[str, float | None] = {"retain_nll": finite(mean)}
        if self.loss == "kl":
            report = {"retain_nll": None, "retain_kl": finite(mean)}
        if self.multiplier is not None:
            report["multiplier"] = self.multiplier.value
            self.multiplier.update(mean)
        return report

    def _nll(self, indices: list[int], step: RetainBatch) -> tuple[Tensor, float]:
        """Compute the loss "nll", the NLL a token, or "hold", its rise above the value before the run."""

        def loss(log_likelihood: Tensor, lengths: Tensor, initial: Tensor | None = None) -> Tensor:
            if initial is None:
                return retain_nll(log_likelihood, self.weight, step.tokens)
            return retain_hold(log_likelihood, lengths, initial, self.weight, len(step.indices))

        initial = []
        if self.initial_nll is not None:
            initial = [torch.as_tensor(self.initial_nll[indices], dtype=torch.float32, device=self.lm.device)]
        objective = self.lm.likelihood.objective(self._collate(indices), loss, *initial)
        return objective.loss, -objective.log_likelihood.sum().item()

    def _kl(self, indices: list[int], step: RetainBatch) -> tuple[Tensor, float]:
        """Compute the loss "kl"."""
        assert self.reference.retain is not None
        batch = self._collate(indices)
        reference = self.reference.retain.at(indices)
        divergence = self.lm.likelihood.distributions(batch).kl_from(reference, batch.targets)  # (n,)
        return retain_kl(divergence, self.weight, step.tokens), divergence.sum().item()

    def _representation(self, indices: list[int], step: RetainBatch) -> tuple[Tensor, float]:
        """Compute the loss "representation"."""
        assert self.target is not None
        drift = self.target.retain_drift(indices)  # (b,)
        loss = retain_representation(drift, self.weight, self.target.alpha, len(step.indices))
        return loss, drift.sum().item()

    def _collate(self, indices: list[int]) -> TokenBatch:
        return self.lm.collate(self.retain, indices)


def multiplier_of(
    settings: Mapping[str, Any], retain_loss: str | None, retain: Sequence[Tokens], retain_nll: Floats
) -> Multiplier:
    """Return PDU's multiplier, whose bound is a little above the initial retain loss.

    That is the mean negative log-likelihood per token of retain texts; 0 for retain_loss "kl".
    """
    lengths = [len(t.scored) for t in retain]
    initial = 0.0 if retain_loss == "kl" else float(np.average(retain_nll, weights=lengths))
    bound = initial + settings["retain_tolerance"] * max(initial, 1.0)
    return Multiplier(settings["multiplier"], settings["multiplier_step_size"], bound, settings["multiplier_warmup"])


def finite(x: float) -> float | None:
    """Return the number, or None where it is NaN or infinite, which JSON cannot represent."""
    return float(x) if math.isfinite(x) else None
