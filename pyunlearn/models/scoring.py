"""Scorer: the loop over batches that computes a number for each text or each token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyunlearn.data import TokenBatch, Tokens
from pyunlearn.errors import ArgumentError
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.likelihood import Likelihood
from pyunlearn.models.likelihood import evaluation_mode as evaluation_mode

Floats = NDArray[np.float64]
_Batch = tuple[list[int], TokenBatch]


class Processes(Protocol):
    """Interface of the processes that share the work."""

    rank: int
    count: int

    def sum_array(self, values: Floats) -> Floats:
        """Return the sum over all processes."""

    def batches(self, batches: Iterator[_Batch]) -> Iterator[_Batch]:
        """Return this process's share; a batch without indices is computed and not counted."""


class OneProcess:
    """The work of scoring undivided: one process scores all batches."""

    rank = 0
    count = 1

    def sum_array(self, values: Floats) -> Floats:
        """Return the values unchanged."""
        return values

    def batches(self, batches: Iterator[_Batch]) -> Iterator[_Batch]:
        """Return all batches."""
        return batches


class Scorer:
    """Computes log-likelihoods and greedy matches of texts under one model.

    Args:
        lm: the model.
        batch_size: texts in one forward pass.
        autocast: returns the mixed-precision context of a forward pass.
        processes: the processes that share the work; each scores its share of the batches, and all get all numbers.
    """

    def __init__(
        self,
        lm: LanguageModel,
        batch_size: int,
        *,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        processes: Processes | None = None,
    ) -> None:
        self.lm, self.batch_size, self.autocast = lm, batch_size, autocast
        self.processes = OneProcess() if processes is None else processes

    def batches(self, tokens: Sequence[Tokens]) -> Iterator[_Batch]:
        """Yield (indices into `tokens`, their batch) for this process's share, texts of like length together."""
        if not tokens:
            raise ArgumentError("tokens must hold at least one example, and are empty")
        return self.processes.batches(self.lm.batches(tokens, self.batch_size))

    @torch.no_grad()
    def mean_log_likelihood(self, tokens: Sequence[Tokens], likelihood: Likelihood | None = None) -> Floats:
        """Return (len(tokens),) mean log-likelihoods per scored token, nats.

        Args:
            tokens: the texts.
            likelihood: of another model with the same vocabulary; default: of this one.
        """
        return self._means(tokens, likelihood or self.lm.likelihood)

    @torch.no_grad()
    def greedy_match(self, tokens: Sequence[Tokens], likelihood: Likelihood | None = None) -> Floats:
        """Return (len(tokens),) the share of each text's scored tokens that are the model's first choice, 0 to 1.

        Arguments as above.
        """
        matches = (likelihood or self.lm.likelihood).greedy_matches
        return self._means(tokens, lambda batch: matches(batch).float())

    @torch.no_grad()
    def token_log_likelihood(self, tokens: Sequence[Tokens], likelihood: Likelihood | None = None) -> list[Floats]:
        """Return for each text (T,) the log-likelihoods of its scored tokens, nats; arguments as above."""
        score = likelihood or self.lm.likelihood
        ends = np.cumsum([len(t.scored) for t in tokens])
        out = np.zeros(int(ends[-1]))
        for indices, batch in self.batches(tokens):
            with self.autocast():
                values = score(batch)
            for i, part in zip(indices, by_example(values, tokens, indices) if indices else (), strict=True):
                out[ends[i] - len(part) : ends[i]] = part.cpu().double().numpy()
        return np.split(self.processes.sum_array(out), ends[:-1])

    def _means(self, tokens: Sequence[Tokens], score: Callable[[TokenBatch], Tensor]) -> Floats:
        """Return (len(tokens),) means over each text's scored tokens of (n,) values of a batch."""
        out = np.zeros(len(tokens))
        for indices, batch in self.batches(tokens):
            with self.autocast():
                values = score(batch)  # (n,)
            if not indices:
                continue
            # one sum per text, without atomics: deterministic
            sums = torch.stack([part.sum() for part in by_example(values, tokens, indices)])
            out[indices] = sums.cpu().double().numpy() / scored_tokens(tokens, indices)
        return self.processes.sum_array(out)


def by_example(values: Tensor, tokens: Sequence[Tokens], indices: Sequence[int]) -> list[Tensor]:
    """Split the values of a batch's scored tokens (n, ...) into one tensor for each example."""
    return list(values.split(scored_tokens(tokens, indices)))


def scored_tokens(tokens: Sequence[Tokens], indices: Sequence[int]) -> list[int]:
    """Return the number of scored tokens of each text at `indices`, without a GPU synchronization."""
    return [len(tokens[i].indices) for i in indices]
