"""TokenBatch -> token log-likelihoods under one model.

The fast path never makes logits. It lets the model run with its output head replaced by the identity, so what the head would have read
comes out untouched, whatever the architecture does before it (OPT's projection, T5's d_model ** -0.5); what a model does to logits after the head
(Gemma 2's softcap, Cohere's and Granite's scales) is read off its config. The first batch of a run is computed both ways. If they disagree beyond
rounding, the model's own logits are used from then on, and one warning says why.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pyunlearn.data import TokenBatch
from pyunlearn.models.distributions import Distributions, Head
from pyunlearn.models.inspection import _text_config, require_language_model, unwrapped
from pyunlearn.ops import _backend
from pyunlearn.ops.example_objective import ExampleObjective, example_objective, objective_of
from pyunlearn.ops.linear_log_likelihood import linear_log_likelihood
from pyunlearn.ops.log_likelihood import log_likelihood
from pyunlearn.ops.token_objective import TokenObjective, token_objective, tokens_objective_of
from pyunlearn.ops.token_statistics import TokenStatistics, token_statistics, token_statistics_from_logits


class Likelihood:
    """Token log-likelihoods of batches under one model: `Likelihood(model)(batch)` -> (n,) float32, nats, in the order of batch.rows.

    `fused` says whether the fast path is used; it is None until the first batch has been computed both ways.
    """

    def __init__(self, model: Any, *, workspace: int | None = None) -> None:
        require_language_model(model)
        _backend.kernels_for(
            next(unwrapped(model).parameters())
        )  # a backend that cannot be had is said here, not held against the model later
        self.model: Any = model
        self.workspace = workspace
        self.fused: bool | None = None

    def __call__(self, batch: TokenBatch) -> Tensor:
        """(n,) log-likelihoods of batch.targets; differentiable."""
        if self.fused is None:
            self._choose(batch)
        return self._from_hidden(batch) if self.fused else self._from_logits(batch)

    def objective(
        self, batch: TokenBatch, function: Callable[..., Tensor], *per_example: Tensor, group_size: int = 1, likeliest: float = 1.0,
        temperature: float = 1.0, weights: Tensor | None = None,
    ) -> ExampleObjective:  # fmt: skip
        """The sum over the batch's examples of function(summed log-likelihood (b,), scored tokens (b,), *per_example): see ops.example_objective.

        temperature: the log-likelihoods are those of logits / temperature. weights: (n,) factors on batch.targets' in the sums.
        """
        if self.fused is None:
            self._choose(batch)
        if not self.fused:
            live = torch.ones_like(batch.targets, dtype=torch.bool)
            found, count = self._from_logits(batch, temperature), len(batch.counts)
            return objective_of(
                found, live, batch.example, count, function, per_example, group_size, likeliest, weights
            )
        hidden, head = self.hidden(batch)
        return example_objective(
            hidden, head.weight, batch.targets, batch.example, function, *per_example, bias=head.bias,
            logit_scale=head.logit_scale / temperature, softcap=head.softcap and head.softcap / temperature, workspace=self.workspace,
            group_size=group_size, likeliest=likeliest, weights=weights, ignore_index=None,
        )  # fmt: skip

    def token_objective(
        self, batch: TokenBatch, function: Callable[..., Tensor], *per_token: Tensor, group_size: int = 1, temperature: float = 1.0
    ) -> TokenObjective:  # fmt: skip
        """The sum over the batch's examples of function(log-likelihood (m,), example (m,), counts (b,), *per_token): see ops.token_objective."""
        if self.fused is None:
            self._choose(batch)
        if not self.fused:
            live = torch.ones_like(batch.targets, dtype=torch.bool)
            found, count = self._from_logits(batch, temperature), len(batch.counts)
            return tokens_objective_of(found, live, batch.example, count, function, per_token, group_size)
        hidden, head = self.hidden(batch)
        return token_objective(
            hidden, head.weight, batch.targets, batch.example, function, *per_token, bias=head.bias,
            logit_scale=head.logit_scale / temperature, softcap=head.softcap and head.softcap / temperature, workspace=self.workspace,
            examples=len(batch.counts), group_size=group_size, ignore_index=None,
        )  # fmt: skip

    @torch.no_grad()
    def statistics(self, batch: TokenBatch) -> TokenStatistics:
        """Log-likelihood, rank, entropy and variance of each of batch.targets, (n,): see ops.token_statistics."""
        if self.fused is None:
            self._choose(batch)
        if not self.fused:
            return token_statistics_from_logits(self._logits(batch), batch.targets)
        hidden, head = self.hidden(batch)
        return token_statistics(
            hidden, head.weight, batch.targets, bias=head.bias, logit_scale=head.logit_scale, softcap=head.softcap,
            ignore_index=None, workspace=self.workspace,
        )  # fmt: skip

    def distributions(self, batch: TokenBatch) -> Distributions:
        """The whole distribution at each of batch.rows; differentiable."""
        if self.fused is None:
            self._choose(batch)
        if not self.fused:
            return Distributions(self._logits(batch), None, self.workspace)
        return Distributions(*self.hidden(batch), self.workspace)

    def greedy_matches(self, batch: TokenBatch) -> Tensor:
        """(n,) bool: whether each target is the model's first choice there."""
        return self.statistics(batch).rank == 0

    def _from_hidden(self, batch: TokenBatch) -> Tensor:
        hidden, head = self.hidden(batch)
        return linear_log_likelihood(
            hidden, head.weight, batch.targets, bias=head.bias, logit_scale=head.logit_scale, softcap=head.softcap,
            ignore_index=None, workspace=self.workspace,
        )  # fmt: skip

    def _from_logits(self, batch: TokenBatch, temperature: float = 1.0) -> Tensor:
        return log_likelihood(self._logits(batch), batch.targets, logit_scale=1 / temperature)

    def _logits(self, batch: TokenBatch) -> Tensor:
        logits = self.model(**inputs_of(batch)).logits
        return logits.flatten(0, 1).index_select(0, batch.rows)

    def hidden(self, batch: TokenBatch) -> tuple[Tensor, Head]:
        """What the head would read at the scored rows, (n, D), and the head, which must be one that `head_problem` lets pass."""
        inner = unwrapped(self.model)
        module = inner.get_output_embeddings()
        with _captured(module) as captured:
            self.model(**inputs_of(batch))
        return captured[0].flatten(0, 1).index_select(0, batch.rows), _head(inner, module)

    @torch.no_grad()
    def _choose(self, batch: TokenBatch) -> None:
        """Compares both paths on the batch's first example, without dropout, and settles which is used."""
        name = type(unwrapped(self.model)).__name__
        problem = head_problem(self.model)
        if problem is None:
            one = _first_example(batch)
            training = self.model.training
            self.model.eval()
            try:
                own = self._logits(one)
                fast, slow = self._from_hidden(one), log_likelihood(own, one.targets)
            except (RuntimeError, IndexError, AttributeError, TypeError, ValueError) as error:
                problem = f"its forward does not run without its head ({(str(error).splitlines() or [''])[0]})"
            else:
                # a logit is good to about its dtype's epsilon times the largest of its row
                device = own.device.type
                dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else own.dtype
                rounding = 8 * torch.finfo(dtype).eps * max(1.0, float(own.float().abs().max())) + 1e-4
                apart = float((fast - slow).abs().max()) if fast.numel() else 0.0
                if not apart <= rounding:
                    problem = (
                        f"log-likelihoods from its head differ from those of its own logits by up to {apart:.3g} nats"
                    )
            finally:
                self.model.train(training)
        self.fused = problem is None
        if problem:
            warnings.warn(
                f"{name}: {problem}. The run uses the model's own logits: right, but slower and with more memory.",
                stacklevel=4,
            )


def head_problem(model: nn.Module) -> str | None:
    """Why the fused path cannot serve this model's head, as half a sentence, or None."""
    module: Any = unwrapped(model).get_output_embeddings()
    if type(module) is not nn.Linear:
        return (
            f"its head is a {type(module).__name__}, not a plain linear layer (an adapter or quantization on the head?)"
        )
    if type(module.weight).__name__ == "DTensor" or module.weight.is_meta:
        return "its head is spread over several devices"
    return None


def _head(inner: Any, module: Any) -> Head:
    config = _text_config(inner.config)
    scale = 1.0
    if getattr(config, "logits_scaling", None):  # Granite divides
        scale = 1.0 / float(config.logits_scaling)
    if getattr(config, "logit_scale", None):  # Cohere multiplies
        scale = float(config.logit_scale)
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return Head(module.weight, module.bias, scale, float(cap) if cap else None)


def inputs_of(batch: TokenBatch) -> dict[str, Any]:
    """What a transformers model is called with."""
    inputs: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if batch.decoder_ids is not None:
        inputs["decoder_input_ids"] = batch.decoder_ids
    return inputs


def _first_example(batch: TokenBatch) -> TokenBatch:
    mine = batch.example == 0
    return replace(
        batch, ids=batch.ids[:1], attention_mask=batch.attention_mask[:1], rows=batch.rows[mine], targets=batch.targets[mine],
        example=batch.example[mine], counts=batch.counts[:1], decoder_ids=None if batch.decoder_ids is None else batch.decoder_ids[:1],
    )  # fmt: skip


@contextmanager
def _captured(module: nn.Module) -> Iterator[list[Tensor]]:
    """While it lasts, the module returns its input, and the list holds it."""
    captured: list[Tensor] = []

    def identity(x: Tensor, *_: Any, **__: Any) -> Tensor:
        captured[:] = [x]
        return x

    had, before = "forward" in vars(module), module.forward
    module.forward = identity  # type: ignore[method-assign]
    try:
        yield captured
    finally:
        if had:
            module.forward = before  # type: ignore[method-assign]
        else:
            del module.forward
