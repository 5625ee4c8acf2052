"""Statistics of every scored token of a text, from one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyunlearn.data import Tokens
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.scoring import Scorer, evaluation_mode
from pyunlearn.probes.cache import RecordStore

Floats = NDArray[np.float64]
FIELDS = ("log_likelihood", "rank", "entropy", "variance")


@dataclass(frozen=True, eq=False)
class TeacherForced:
    """Statistics of n texts with N scored tokens in total, text by text in the order of the input.

    log_likelihood  (N,) float32, nats: of each scored token given the true ones before it
    rank            (N,) int64: number of tokens that the model finds likelier; 0 is its first choice
    entropy         (N,) float32, nats: of the predicted distribution
    variance        (N,) float32, nats^2: of log p under p
    counts          (n,) int64: scored tokens of each text
    """

    log_likelihood: NDArray[np.float32]
    rank: NDArray[np.int64]
    entropy: NDArray[np.float32]
    variance: NDArray[np.float32]
    counts: NDArray[np.int64]

    def each(self, values: NDArray[np.generic]) -> list[NDArray[np.generic]]:
        """Split an array (N,) into n arrays, one for each text."""
        return np.split(values, np.cumsum(self.counts)[:-1])

    def part(self, first: int, end: int) -> TeacherForced:
        """Return the slice of texts first:end."""
        edges = np.concatenate([[0], np.cumsum(self.counts)])
        rows = slice(int(edges[first]), int(edges[end]))
        return TeacherForced(
            self.log_likelihood[rows], self.rank[rows], self.entropy[rows], self.variance[rows], self.counts[first:end]
        )

    @cached_property
    def mean_log_likelihood(self) -> Floats:
        """(n,) float64, nats a token."""
        return self._means(self.log_likelihood)

    @cached_property
    def greedy_match(self) -> Floats:
        """(n,) float64, 0 to 1: the share of a text's tokens that are the model's first choice."""
        return self._means(self.rank == 0)

    def _means(self, values: NDArray[np.generic]) -> Floats:
        starts = np.cumsum(self.counts) - self.counts
        means: Floats = np.add.reduceat(values.astype(np.float64), starts) / self.counts
        return means


@torch.no_grad()
def teacher_forced(
    model: Any,
    tokens: Sequence[Tokens],
    *,
    batch_size: int = 16,
    workspace: int | None = None,
    store: RecordStore | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> TeacherForced:
    """Compute log-likelihood, rank, entropy and variance of every scored token, by one forward pass for each text.

    Batches hold texts of like length. A text that occurs twice, or that the store has, is not computed again; a batch
    with any new text is computed whole, so that an interrupted run ends with the bits of an uninterrupted one. Dropout
    is off meanwhile.

    Args:
        model: a transformers language model, or a LanguageModel, which checks its fast path only once for all calls.
        tokens: n texts, at least 1.
        batch_size: texts in one pass.
        workspace: bytes for logits, see `pyunlearn.ops.token_statistics`; a LanguageModel has its own.
        store: records to look up and to add to; default: in memory, for this call.
        advance: called with the number of texts of each finished batch.

    Returns:
        TeacherForced, in the order of `tokens`.

    Raises:
        ArgumentError: no text, or a batch size below 1. ModelError: no language model.
    """
    lm = LanguageModel.of(model, workspace=workspace, needs_tokenizer=False)
    store = RecordStore(None, FIELDS) if store is None else store
    keys = [store.key(t) for t in tokens]
    once = list(dict(zip(keys, tokens, strict=True)).items())
    try:
        with evaluation_mode(lm.module):
            for indices, batch in Scorer(lm, batch_size).batches([t for _, t in once]):
                if any(once[i][0] not in store for i in indices):
                    statistics = lm.likelihood.statistics(batch)
                    _add(store, [once[i][0] for i in indices], statistics, batch.counts.tolist())
                advance(len(indices))
    finally:
        store.flush()
    records = [store[key] for key in keys]
    log_likelihood, rank, entropy, variance = (np.concatenate(parts) for parts in zip(*records, strict=True))
    return TeacherForced(log_likelihood, rank, entropy, variance, np.array([len(r[0]) for r in records]))


def _add(store: RecordStore, keys: Sequence[object], statistics: Sequence[torch.Tensor], counts: list[int]) -> None:
    ends = np.cumsum(counts)[:-1]
    parts = [np.split(values.cpu().numpy(), ends) for values in statistics]
    for key, record in zip(keys, zip(*parts, strict=True), strict=True):
        store.add(key, record)  # type: ignore[arg-type]


def without_prompt(tokens: Tokens, start: int) -> Tokens:
    """Return the text from its first scored token on after `start` alone: the answer without its question.

    Args:
        tokens: a text with a prompt.
        start: the token id of the beginning of text.

    >>> without_prompt(Tokens((5, 6, 7, 8), first=2), start=0)
    Tokens(ids=(0, 7, 8), first=1, decoder=None)
    """
    if tokens.decoder is not None:
        return Tokens((start,), tokens.first, tokens.decoder, tokens.chosen)
    return Tokens.at((start, *tokens.ids[tokens.first :]), [i - tokens.first + 1 for i in tokens.indices])
