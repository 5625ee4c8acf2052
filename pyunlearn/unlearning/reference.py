"""Precomputed numbers of the reference model: log-likelihoods and hidden states, computed before the first step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyunlearn.data import Tokens
from pyunlearn.errors import ModelError
from pyunlearn.methods import Method
from pyunlearn.models.condition import to_device
from pyunlearn.models.distributions import Distributions
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.likelihood import Likelihood
from pyunlearn.models.loading import without_weights
from pyunlearn.models.scoring import Scorer, evaluation_mode
from pyunlearn.models.sharding import is_sharded
from pyunlearn.unlearning.distributed import Processes, fills_in_weights
from pyunlearn.unlearning.hidden_cache import HiddenStateCache

Floats = NDArray[np.float64]


class Reference:
    """Log-likelihoods and distributions of a run's texts under the reference model.

    `log_likelihood`   role -> for each text (T,) of its tokens, or (1,) their sum, nats; empty where none is needed
    `forget`           distributions of the forget texts, for methods on the whole vocabulary
    `retain`           distributions of the retain texts that the run may use, for retain_loss "kl"
    """

    def __init__(self) -> None:
        self.log_likelihood: dict[str, list[Floats]] = {}
        self.forget: HiddenStateCache | None = None
        self.retain: HiddenStateCache | None = None

    def read_log_likelihoods(
        self,
        scorer: Scorer,
        likelihood: Likelihood,
        method: Method,
        texts: dict[str, list[Tokens]],
        weights: Sequence[Floats] | None,
    ) -> None:
        """Score the method's texts by role; for methods on whole texts, as sums with the token weights."""
        for role in method.roles:
            tokens = scorer.token_log_likelihood(texts[role], likelihood)
            if not method.token:
                weighted = (
                    [x * w for x, w in zip(tokens, weights, strict=True)] if weights and role == "forget" else tokens
                )
                tokens = [x.sum(keepdims=True) for x in weighted]
            self.log_likelihood[role] = tokens

    def gather(self, rows: Sequence[tuple[str, int]]) -> Floats | None:
        """Return the concatenated log-likelihoods of texts (role, index); None where none are needed."""
        if not self.log_likelihood:
            return None
        return np.concatenate([self.log_likelihood[role][i] for role, i in rows])

    def fingerprint(self, forget: int, first_retain: Sequence[int]) -> dict[str, Floats]:
        """Return numbers that identify the reference model to a resumed run; later retain steps may differ."""
        scores = {f"{role}s": np.array([x.sum() for x in each]) for role, each in self.log_likelihood.items()}
        if self.forget is not None:
            scores["reference_model"] = self.forget.magnitudes(range(forget))
        elif self.retain is not None and self.retain.states is not None:
            scores["reference_model"] = self.retain.magnitudes(first_retain)
        return scores


@contextmanager
def reference_on_device(
    lm: LanguageModel, reference_model: Any, processes: Processes | None = None
) -> Iterator[LanguageModel]:
    """Provide the reference model, in evaluation mode, on the original model's device within the context.

    Without a reference model, the original model. Where the processes shard the model, they shard a reference model too
    that is loaded here; one that is loaded already is whole in each. Raises ModelError where it has another vocabulary,
    or cannot be sharded.
    """
    if reference_model is None:
        yield lm
        return
    workspace = lm.likelihood.workspace
    shares = processes is not None and processes.sharded and isinstance(reference_model, (str, Path))
    with without_weights(shares and fills_in_weights()):
        reference = LanguageModel.of(reference_model, lm.tokenizer, workspace=workspace, needs_tokenizer=False)
    lm.require_vocabulary(reference, "reference_model")
    module, original_device = reference.module, reference.device
    try:
        if processes is not None and shares:
            _shard(processes, reference)
        else:
            to_device(module, lm.device)
        with evaluation_mode(module):
            yield replace(reference, module=module, tokenizer=lm.tokenizer, workspace=workspace)
    finally:
        if not shares:
            to_device(module, original_device)


def _shard(processes: Processes, reference: LanguageModel) -> None:
    """Shard a reference model. Raises ModelError, which names it, where it cannot be."""
    try:
        processes.place(reference.module.requires_grad_(False), reference.inner)
    except ModelError as error:
        raise ModelError(
            f"reference_model: {error}; or pass it in Python as a loaded model, which each process holds whole"
        ) from error


@torch.no_grad()
def cached_states(
    scorer: Scorer, likelihood: Likelihood, tokens: Sequence[Tokens], indices: Sequence[int], batch_size: int
) -> HiddenStateCache:
    """Cache the distributions of texts, in every process: a process's share of a later step is not known yet."""

    def parts() -> Iterator[tuple[list[int], Distributions]]:
        for within, batch in scorer.lm.batches([tokens[i] for i in indices], batch_size):
            with scorer.autocast():
                distributions = likelihood.distributions(batch)
            yield [indices[i] for i in within], distributions

    sizes = {i: len(tokens[i].scored) for i in indices}
    return HiddenStateCache(parts(), sizes, scorer.lm.device, copies_head=is_sharded(likelihood.inner))
