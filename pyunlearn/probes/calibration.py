"""The negative log-likelihood that a text would have if the model had never seen it, from texts that no model has seen.

A text that is known by heart is likelier than its words alone make it. How likely they make it, the model itself says
when it sees two tokens of context at a time, too few to recite from; and so do texts of its kind among those that were
written for this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pyunlearn.data import Tokens
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.scoring import Scorer, by_example, evaluation_mode
from pyunlearn.ops._portable import to_float64
from pyunlearn.ops.token_statistics import token_statistics

Floats = NDArray[np.float64]
_CONTEXT = 2  # tokens of context in the short windows
_NEIGHBOURS = 20  # texts of like kind


class Features(NamedTuple):
    """Numbers of n texts under one model, means over their scored tokens."""

    nll: Floats
    """(n,) negative log-likelihood, nats."""
    greedy_match: Floats
    """(n,) share of the tokens that are the model's first choice, 0 to 1."""
    hidden: Floats
    """(n, D) last hidden state, which tells the kind of a text."""
    short_nll: Floats
    """(n,) negative log-likelihood after two or three tokens of context, nats."""
    short_entropy: Floats
    """(n,) entropy of those predictions, nats."""


class Expected(NamedTuple):
    """Numbers that n texts would have if they were unseen."""

    nll: Floats
    """(n,) nats a token."""
    greedy_match: Floats
    """(n,) 0 to 1."""


def features(lm: LanguageModel, tokens: Sequence[Tokens], *, batch_size: int = 16) -> Features:
    """Read each text once as it is, and once more in windows of four tokens, of which the last two are scored.

    Args:
        lm: a causal model with a plain linear head.
        tokens: n texts without prompts.
        batch_size: texts in one pass.
    """
    n = len(tokens)
    nll, match, hidden = np.zeros(n), np.zeros(n), np.zeros((n, 0))
    with evaluation_mode(lm.module), torch.no_grad():
        for indices, batch in Scorer(lm, batch_size).batches(tokens):
            states, head = lm.likelihood.hidden(batch)
            if not hidden.size:
                hidden = np.zeros((n, states.shape[1]))
            statistics = token_statistics(states, head.weight, batch.targets, **lm.likelihood.head_options(head))
            for out, values in ((nll, -statistics.log_likelihood), (match, statistics.rank == 0), (hidden, states)):
                out[indices] = [to_float64(x).mean(dim=0).cpu().numpy() for x in by_example(values, tokens, indices)]
    windows, owner = _windows(tokens)
    sums = np.zeros((3, n))  # of NLL, entropy and tokens
    with evaluation_mode(lm.module), torch.no_grad():
        for indices, batch in Scorer(lm, batch_size * 8).batches(windows):
            statistics = lm.likelihood.statistics(batch)
            owners = np.repeat(owner[indices], [len(windows[i].scored) for i in indices])
            parts = (-statistics.log_likelihood, statistics.entropy, torch.ones_like(statistics.entropy))
            for row, values in zip(sums, parts, strict=True):
                np.add.at(row, owners, to_float64(values).cpu().numpy())
    return Features(nll, match, hidden, sums[0] / sums[2], sums[1] / sums[2])


class Expectation:
    """The regression of unseen texts' negative log-likelihood on their short windows, corrected by texts of like kind.

        expected = a + b * short_nll + c * short_entropy + mean residual of the 20 texts of the nearest hidden states

    Args:
        unseen: features of texts that the model has not seen, 22 or more.

    Source: ours.
    """

    def __init__(self, unseen: Features) -> None:
        design, self._centre = _design(unseen), unseen.hidden.mean(axis=0)
        inverse = np.linalg.pinv(design)
        self._coefficients = inverse @ unseen.nll
        leverage = np.einsum("ij,ji->i", design, inverse)
        self._residuals = (unseen.nll - design @ self._coefficients) / (1 - leverage)  # each text left out
        self._directions, self._unseen = self._direction(unseen.hidden), unseen

    def of_unseen(self) -> Expected:
        """Return what each of the unseen texts was expected to have from the others."""
        alike = self._directions @ self._directions.T
        np.fill_diagonal(alike, -np.inf)
        local, match = self._local(alike)
        return Expected(self._unseen.nll - self._residuals + local, match)

    def of(self, texts: Features) -> Expected:
        """Return what other texts would have if they were unseen."""
        local, match = self._local(self._direction(texts.hidden) @ self._directions.T)
        return Expected(_design(texts) @ self._coefficients + local, match)

    def _direction(self, hidden: Floats) -> Floats:
        centred = hidden - self._centre
        unit: Floats = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
        return unit

    def _local(self, alike: Floats) -> tuple[Floats, Floats]:
        """Return the mean residual and greedy match of the nearest texts, (n,) each, from (n, m) cosines."""
        nearest = np.argsort(-alike, axis=1, kind="stable")[:, :_NEIGHBOURS]
        return self._residuals[nearest].mean(axis=1), self._unseen.greedy_match[nearest].mean(axis=1)


def _design(texts: Features) -> Floats:
    return np.stack([np.ones_like(texts.nll), texts.short_nll, texts.short_entropy], axis=1)


def _windows(tokens: Sequence[Tokens]) -> tuple[list[Tokens], NDArray[np.int64]]:
    """Return windows of two tokens of context and two scored ones, and the index of each one's text.

    >>> [w.ids for w in _windows([Tokens((5, 6, 7, 8, 9, 4), first=1)])[0]]
    [(5, 6, 7), (6, 7, 8, 9), (8, 9, 4)]
    """
    windows, owner = [], []
    for i, t in enumerate(tokens):
        for at in range(t.first, len(t.ids), _CONTEXT):
            begin = max(0, at - _CONTEXT)
            windows.append(Tokens(t.ids[begin : at + _CONTEXT], at - begin))
            owner.append(i)
    return windows, np.array(owner)
