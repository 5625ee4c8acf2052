"""Likelihood: token log-likelihoods of batches under one model.

The fast path does not materialize logits. It runs the model with its output head replaced by the identity, which
returns the head's input for any architecture (after OPT's projection, T5's d_model ** -0.5). Operations on the logits
after the head (Gemma 2's softcap, Cohere's and Granite's scales) are read from the config. The first batch of a run is
computed both ways. If they differ by more than rounding, the model's own logits are used for the whole run, with one
warning that names the reason.
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
from pyunlearn.errors import ModelError, first_line
from pyunlearn.models.attention import attention_of
from pyunlearn.models.condition import device_of, float_types
from pyunlearn.models.distributions import Distributions, Head
from pyunlearn.models.inspection import require_language_model, text_config
from pyunlearn.models.sharding import first_of_all, is_part, is_sharded
from pyunlearn.ops import _backend
from pyunlearn.ops.example_objective import ExampleObjective, example_objective, objective_of
from pyunlearn.ops.linear_log_likelihood import linear_log_likelihood
from pyunlearn.ops.log_likelihood import log_likelihood
from pyunlearn.ops.token_objective import TokenObjective, token_objective, tokens_objective_of
from pyunlearn.ops.token_statistics import TokenStatistics, token_statistics, token_statistics_from_logits
from pyunlearn.options import Whole, require


class Likelihood:
    """Token log-likelihoods of batches under one model: `Likelihood(model)(batch)` -> (n,) float32, nats.

    The order is that of batch.rows. `fused` is True where the fast path is used, and None before the first batch has
    been computed both ways.

    Args:
        model: a transformers language model, wrapped or not.
        workspace: bytes for cached logits, see `pyunlearn.ops.linear_log_likelihood`.

    Raises:
        ArgumentError: a workspace that is not a whole number, 0 or more.
        ModelError: a model without a language-model head.
    """

    def __init__(self, model: Any, *, workspace: int | None = None) -> None:
        self.model: Any = model
        self.inner = require_language_model(model)
        if workspace is not None:
            require(Whole(0), workspace=workspace)
        # an unavailable backend raises here; in the comparison of both ways it would look like a fault of the model
        _backend.kernels_for(next(self.inner.parameters()))
        self.workspace = workspace
        self.fused: bool | None = None

    def __call__(self, batch: TokenBatch) -> Tensor:
        """Return (n,) log-likelihoods of batch.targets; differentiable."""
        batch = self._near(batch)
        return self._from_hidden(batch) if self._use_fused(batch) else self._from_logits(batch)

    def objective(
        self,
        batch: TokenBatch,
        function: Callable[..., Tensor],
        *per_example: Tensor,
        group_size: int = 1,
        top_fraction: float = 1.0,
        temperature: float = 1.0,
        weights: Tensor | None = None,
    ) -> ExampleObjective:
        """Return the sum over examples of function(log-likelihoods (b,), scored tokens (b,), *per_example).

        See `pyunlearn.ops.example_objective`.

        Args:
            batch: B examples.
            function: from summed log-likelihoods to losses (b,).
            per_example: (B,) further arguments of the function.
            group_size: neighbouring examples that the function sees together, as (b, group_size).
            top_fraction: share of each example's tokens that count, those of the largest log-likelihood.
            temperature: the log-likelihoods are those of logits / temperature.
            weights: (n,) factors on batch.targets' log-likelihoods in the sums.
        """
        if not self._use_fused(batch):
            live = torch.ones_like(batch.targets, dtype=torch.bool)
            values, count = self._from_logits(batch, temperature), len(batch.counts)
            return objective_of(
                values, live, batch.example, count, function, per_example, group_size, top_fraction, weights
            )
        hidden, head = self.hidden(batch)
        return example_objective(
            hidden,
            head.weight,
            batch.targets,
            batch.example,
            function,
            *per_example,
            group_size=group_size,
            top_fraction=top_fraction,
            weights=weights,
            **self.head_options(head, temperature),
        )

    def token_objective(
        self,
        batch: TokenBatch,
        function: Callable[..., Tensor],
        *per_token: Tensor,
        group_size: int = 1,
        temperature: float = 1.0,
    ) -> TokenObjective:
        """Return a differentiable objective on single tokens: a sum over examples of a function of log-likelihoods.

        The function gets log-likelihoods (m,), the example of each token (m,), token counts (b,) and `per_token`.

        See `pyunlearn.ops.token_objective`; the arguments are those of `objective`.
        """
        if not self._use_fused(batch):
            live = torch.ones_like(batch.targets, dtype=torch.bool)
            values, count = self._from_logits(batch, temperature), len(batch.counts)
            return tokens_objective_of(values, live, batch.example, count, function, per_token, group_size)
        hidden, head = self.hidden(batch)
        return token_objective(
            hidden,
            head.weight,
            batch.targets,
            batch.example,
            function,
            *per_token,
            examples=len(batch.counts),
            group_size=group_size,
            **self.head_options(head, temperature),
        )

    @torch.no_grad()
    def statistics(self, batch: TokenBatch) -> TokenStatistics:
        """Return (n,) log-likelihood, rank, entropy and variance of batch.targets, see `ops.token_statistics`."""
        batch = self._near(batch)
        if not self._use_fused(batch):
            return token_statistics_from_logits(self.logits(batch), batch.targets)
        hidden, head = self.hidden(batch)
        return token_statistics(hidden, head.weight, batch.targets, **self.head_options(head))

    def distributions(self, batch: TokenBatch) -> Distributions:
        """Return the next-token distributions (n, V) at the scored positions; differentiable."""
        batch = self._near(batch)
        if not self._use_fused(batch):
            return Distributions(self.logits(batch), None, self.workspace)
        return Distributions(*self.hidden(batch), self.workspace)

    def greedy_matches(self, batch: TokenBatch) -> Tensor:
        """Return (n,) bool: True where a target is the model's first choice."""
        return self.statistics(batch).rank == 0

    def hidden(self, batch: TokenBatch) -> tuple[Tensor, Head]:
        """Return the head's input at the scored rows, (n, D), and the head, for which `head_problem` returns None."""
        module = self.inner.get_output_embeddings()
        with _captured(module, copies=is_sharded(self.inner)) as captured:
            self._run(batch)
        return scored_rows(captured[0], batch), head_of(self.inner)

    def _near(self, batch: TokenBatch) -> TokenBatch:
        """Return a batch on the device of this model's outputs, which may not be that of the model it was made for."""
        device = device_of(self.inner)
        return batch if batch.targets.device == device else batch.to(device)

    def _from_hidden(self, batch: TokenBatch) -> Tensor:
        hidden, head = self.hidden(batch)
        return linear_log_likelihood(hidden, head.weight, batch.targets, **self.head_options(head))

    def _from_logits(self, batch: TokenBatch, temperature: float = 1.0) -> Tensor:
        return log_likelihood(self.logits(batch), batch.targets, logit_scale=1 / temperature)

    def logits(self, batch: TokenBatch) -> Tensor:
        """Return (n, V) the model's own logits at batch.rows; differentiable."""
        logits = self._run(batch).logits  # (B, T, V)
        return logits.flatten(0, 1).index_select(0, batch.rows)  # (n, V)

    def _run(self, batch: TokenBatch) -> Any:
        """Return the outputs of the model's forward pass."""
        with attention_of(self.model):
            return self.model(**inputs_of(batch))

    def head_options(self, head: Head, temperature: float = 1.0) -> dict[str, Any]:
        """Return the keyword arguments of every op that describe the head."""
        return {
            "bias": head.bias,
            "logit_scale": head.logit_scale / temperature,
            "softcap": head.softcap and head.softcap / temperature,
            "ignore_index": None,
            "workspace": self.workspace,
        }

    def _use_fused(self, batch: TokenBatch) -> bool:
        """Return True where the fast path works for this model; decided on the first batch, with a warning if not."""
        if self.fused is None:
            problem = head_problem(self.inner) or self._difference(batch)
            if is_sharded(self.inner):  # the passes of all processes must be the same
                problem = first_of_all(problem)
            self.fused = problem is None
            if problem:
                warnings.warn(
                    f"{type(self.inner).__name__}: {problem}. The run uses the model's own logits: right, but slower "
                    "and with more memory.",
                    stacklevel=4,
                )
        return self.fused

    @torch.no_grad()
    def _difference(self, batch: TokenBatch) -> str | None:
        """Compute the batch's first example both ways, without dropout; return how they differ, or None.

        Running out of memory is not a fault of the head, and the other way needs more, so that error is raised.
        """
        first = _first_example(batch)
        try:
            with evaluation_mode(self.model):
                logits = self._own_logits(first)
                fused, plain = self._from_hidden(first), log_likelihood(logits, first.targets)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError, AttributeError, TypeError) as error:
            return f"its forward does not run without its head ({(str(error).splitlines() or [''])[0]})"
        # rounding error of a logit: about its dtype's epsilon times the largest logit
        device = logits.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else logits.dtype
        tolerance = 8 * torch.finfo(dtype).eps * max(1.0, float(logits.float().abs().max())) + 1e-4
        if not torch.isfinite(plain).all():
            return None  # broken weights, not a head that is read wrong: their numbers are reported where they are used
        difference = float((fused - plain).abs().max()) if fused.numel() else 0.0
        if difference <= tolerance:
            return None
        return f"log-likelihoods from its head differ from those of its own logits by up to {difference:.3g} nats"

    def _own_logits(self, batch: TokenBatch) -> Tensor:
        """Return the model's own logits. Raises ModelError where its dtypes do not fit together."""
        try:
            return self.logits(batch)
        except RuntimeError as error:
            types = float_types(self.model)
            if "dtype" not in str(error) or len(types) < 2:
                raise
            raise ModelError(
                f"the model's weights are of several dtypes ({', '.join(types)}) that its forward pass cannot combine "
                f"({first_line(error)}): convert them to one, for example model.to(torch.bfloat16)"
            ) from error


def head_problem(inner: Any) -> str | None:
    """Return the reason why the fast path cannot use a transformers model's head, as a clause, or None."""
    module: Any = inner.get_output_embeddings()
    if type(module) is not nn.Linear:
        return (
            f"its head is a {type(module).__name__}, not a plain linear layer (an adapter or quantization on the head?)"
        )
    if (is_part(module.weight) and not is_sharded(inner)) or module.weight.is_meta:
        return "its head is spread over several devices"
    return None


def head_of(inner: Any) -> Head:
    """Return the weights of a transformers model's head, with the operations on its logits that the config names."""
    module, config = inner.get_output_embeddings(), text_config(inner)
    scale = 1.0
    if getattr(config, "logits_scaling", None):  # Granite divides
        scale = 1.0 / float(config.logits_scaling)
    if getattr(config, "logit_scale", None):  # Cohere multiplies
        scale = float(config.logit_scale)
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return Head(module.weight, module.bias, scale, float(cap) if cap else None)


def inputs_of(batch: TokenBatch) -> dict[str, Any]:
    """Return the keyword arguments of a transformers model's forward pass."""
    inputs: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if batch.decoder_ids is not None:
        inputs["decoder_input_ids"] = batch.decoder_ids
    return inputs


def scored_rows(hidden: Tensor, batch: TokenBatch) -> Tensor:
    """Return hidden states (B, T, D) at batch.rows, (n, D), on the batch's device."""
    rows = batch.rows.to(hidden.device)
    return hidden.flatten(0, 1).index_select(0, rows).to(batch.rows.device)


def _first_example(batch: TokenBatch) -> TokenBatch:
    """Return the batch of the first example alone."""
    rows = batch.example == 0  # (n,) bool
    return replace(
        batch,
        ids=batch.ids[:1],
        attention_mask=batch.attention_mask[:1],
        rows=batch.rows[rows],
        targets=batch.targets[rows],
        example=batch.example[rows],
        counts=batch.counts[:1],
        decoder_ids=None if batch.decoder_ids is None else batch.decoder_ids[:1],
    )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch a model to evaluation mode (no dropout), and restore every module's mode at the end."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _captured(module: nn.Module, *, copies: bool = False) -> Iterator[list[Tensor]]:
    """Replace a module's forward by the identity; the yielded list holds the input of the last call.

    `copies`: a copy of it, for FSDP has no hook on a view that is safe from operations in place.
    """
    captured: list[Tensor] = []

    def identity(x: Tensor, *_: Any, **__: Any) -> Tensor:
        captured[:] = [x.clone() if copies else x]
        return captured[0]

    had, before = "forward" in vars(module), module.forward
    module.forward = identity  # type: ignore[method-assign]
    try:
        yield captured
    finally:
        if had:
            module.forward = before  # type: ignore[method-assign]
        else:
            del module.forward
