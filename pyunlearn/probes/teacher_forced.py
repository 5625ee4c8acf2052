"""What a model thinks of every token of a text: one forward pass for each text, and everything teacher-forced follows from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from pyunlearn.data import Tokens, batches
from pyunlearn.models import Likelihood, decoder_start_id, is_encoder_decoder
from pyunlearn.probes.cache import Shelf

Floats = NDArray[np.float64]
FIELDS = ("log_likelihood", "rank", "entropy", "variance")


@dataclass(frozen=True, eq=False)
class TeacherForced:
    """What one pass found, for n texts of N scored tokens together, text by text in the order given.

    log_likelihood  (N,) float32, nats: of each scored token given the true ones before it
    rank            (N,) int64: how many tokens the model holds likelier; 0 is its first choice
    entropy         (N,) float32, nats: of what it expects there
    variance        (N,) float32, nats^2: of log p under p
    counts          (n,) int64: scored tokens of each text
    """

    log_likelihood: NDArray[np.float32]
    rank: NDArray[np.int64]
    entropy: NDArray[np.float32]
    variance: NDArray[np.float32]
    counts: NDArray[np.int64]

    def each(self, values: NDArray[np.generic]) -> list[NDArray[np.generic]]:
        """One of the arrays (N,) in n parts, one for each text."""
        return np.split(values, np.cumsum(self.counts)[:-1])

    def part(self, first: int, end: int) -> TeacherForced:
        """Of the texts from `first` on, up to `end`."""
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
    likelihood: Likelihood,
    tokens: Sequence[Tokens],
    *,
    pad_id: int,
    batch_size: int = 16,
    shelf: Shelf | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> TeacherForced:
    """Log-likelihood, rank, entropy and variance of every scored token of every text, by one forward pass for each text.

    Batches hold texts of like length. A text that occurs twice, or that the shelf knows, is not asked about again; a batch of which any text is
    new is computed whole, so that an interrupted run ends with the bits of an uninterrupted one. The model is put in evaluation mode while it lasts.

    Args:
        likelihood: of the model; its first batch is computed a second way, one text of it, to see that both agree (`Likelihood`).
        tokens: n texts, at least 1.
        pad_id: any token id, see `padding_id`.
        batch_size: texts in one pass.
        shelf: where answers are kept and looked up; default: in memory, for this call.
        advance: called with the number of texts of each batch that is done.

    Returns:
        TeacherForced, in the order of `tokens`.
    """
    model = likelihood.model
    shelf = Shelf(None, FIELDS) if shelf is None else shelf
    start = decoder_start_id(model) if is_encoder_decoder(model) else None
    keys = [shelf.key(t) for t in tokens]
    once = list(dict(zip(keys, tokens, strict=True)).items())
    training = model.training
    model.eval()
    try:
        for places, batch in batches([t for _, t in once], batch_size, pad_id=pad_id, decoder_start_id=start):
            if any(once[i][0] not in shelf for i in places):
                found = likelihood.statistics(batch.to(model.device))
                _keep(shelf, [once[i][0] for i in places], found, batch.counts.tolist())
            advance(len(places))
    finally:
        model.train(training)
        shelf.flush()
    records = [shelf[key] for key in keys]
    log_likelihood, rank, entropy, variance = (np.concatenate(parts) for parts in zip(*records, strict=True))
    return TeacherForced(log_likelihood, rank, entropy, variance, np.array([len(r[0]) for r in records]))


def _keep(shelf: Shelf, keys: Sequence[object], found: Sequence[torch.Tensor], counts: list[int]) -> None:
    ends = np.cumsum(counts)[:-1]
    parts = [np.split(values.cpu().numpy(), ends) for values in found]
    for key, record in zip(keys, zip(*parts, strict=True), strict=True):
        shelf.add(key, record)  # type: ignore[arg-type]


def without_prompt(tokens: Tokens, start: int) -> Tokens:
    """The same scored tokens, with nothing before them but `start`, the beginning of text: what the answer is worth by itself."""
    if tokens.decoder is not None:
        return Tokens((start,), tokens.first, tokens.decoder)
    return Tokens((start, *tokens.scored), 1)
