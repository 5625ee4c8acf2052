"""The negative log-likelihood that a text would have if the model had never seen it, from texts that no model has seen.

A text that is known by heart is likelier than its words alone make it. How likely they make it, the model itself says
when it sees two tokens of context at a time, too few to recite from; and so do texts of its kind among those that were
written for this package. An answer is likelier, too, where it takes words from its question, and less likely, a token,
where it is short.
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
    copied: Floats
    """(n,) share of the tokens that are in the prompt too, 0 to 1; 0 without a prompt."""
    copied_nll: Floats
    """(n,) sum of short_nll's parts over those tokens, divided by the number of all."""
    tokens: Floats
    """(n,) number of scored tokens."""


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
        tokens: n texts.
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
    windows, owner, copied = _windows(tokens)
    sums = np.zeros((5, n))  # of NLL, entropy, copied tokens, their NLL, and tokens
    with evaluation_mode(lm.module), torch.no_grad():
        for indices, batch in Scorer(lm, batch_size * 8).batches(windows):
            statistics = lm.likelihood.statistics(batch)
            owners = np.repeat(owner[indices], [len(windows[i].scored) for i in indices])
            short_nll, entropy = (to_float64(x).cpu().numpy() for x in (-statistics.log_likelihood, statistics.entropy))
            repeated = np.concatenate([copied[i] for i in indices])
            parts = (short_nll, entropy, repeated, repeated * short_nll, np.ones_like(short_nll))
            for row, values in zip(sums, parts, strict=True):
                np.add.at(row, owners, values)
    short, uncertain, share, of_copied = sums[:4] / sums[4]
    return Features(nll, match, hidden, short, uncertain, share, of_copied, sums[4])


class Expectation:
    """The regression of unseen texts' negative log-likelihood on their short windows, corrected by texts of like kind.

        expected = a + b * short_nll + c * short_entropy + mean residual of the 20 texts of the nearest hidden states

    For answers to prompts the regression has three more terms, copied, copied_nll and 1 / tokens, and the share of
    first-choice tokens has a regression on the same numbers; without prompts it is the mean of the 20 nearest texts.

    Args:
        unseen: features of texts that the model has not seen, 30 or more, all with prompts or all without.

    Source: ours.
    """

    def __init__(self, unseen: Features) -> None:
        self._prompted, self._centre = bool(unseen.copied.any()), unseen.hidden.mean(axis=0)
        self._directions = self._direction(unseen.hidden)
        terms = self._terms(unseen)
        self._nll = _Regression(terms, unseen.nll)
        self._match = _Regression(terms if self._prompted else terms[:, :0], unseen.greedy_match)

    def of_unseen(self) -> Expected:
        """Return what each of the unseen texts was expected to have from the others."""
        alike = self._directions @ self._directions.T
        np.fill_diagonal(alike, -np.inf)
        nearest = _nearest(alike)
        return Expected(self._nll.of_its_own(nearest), self._match.of_its_own(nearest))

    def of(self, texts: Features) -> Expected:
        """Return what other texts would have if they were unseen."""
        nearest, terms = _nearest(self._direction(texts.hidden) @ self._directions.T), self._terms(texts)
        return Expected(*(each.of(terms[:, : each.count], nearest) for each in (self._nll, self._match)))

    def _direction(self, hidden: Floats) -> Floats:
        centred = hidden - self._centre
        unit: Floats = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
        return unit

    def _terms(self, texts: Features) -> Floats:
        """Return (n, 3) terms of the regression, or (n, 6) for answers to prompts."""
        terms = [np.ones_like(texts.nll), texts.short_nll, texts.short_entropy]
        return np.stack(terms + [texts.copied, texts.copied_nll, 1 / texts.tokens] * self._prompted, axis=1)


class _Regression:
    """Least squares of (n,) outcomes on (n, K) terms; each text's residual is that from the fit to the others."""

    def __init__(self, terms: Floats, outcomes: Floats) -> None:
        inverse = np.linalg.pinv(terms)
        self._coefficients, self._outcomes, self.count = inverse @ outcomes, outcomes, terms.shape[1]
        leverage = np.einsum("ij,ji->i", terms, inverse)
        self._residuals: Floats = (outcomes - terms @ self._coefficients) / (1 - leverage)

    def of(self, terms: Floats, nearest: NDArray[np.int64]) -> Floats:
        """Return the outcomes of other texts, corrected by the mean residual of the texts `nearest` to each."""
        outcomes: Floats = terms @ self._coefficients + self._residuals[nearest].mean(axis=1)
        return outcomes

    def of_its_own(self, nearest: NDArray[np.int64]) -> Floats:
        """Return the same for the texts of the fit, each left out."""
        return self._outcomes - self._residuals + self._residuals[nearest].mean(axis=1)


def _nearest(alike: Floats) -> NDArray[np.int64]:
    """Return (n, 20) indices of the texts of like kind from (n, m) cosines."""
    return np.argsort(-alike, axis=1, kind="stable")[:, :_NEIGHBOURS]


def _windows(tokens: Sequence[Tokens]) -> tuple[list[Tokens], NDArray[np.int64], list[NDArray[np.bool_]]]:
    """Return windows of two tokens of context and two scored ones, their texts' indices, and which tokens are copied.

    >>> [w.ids for w in _windows([Tokens((5, 6, 7, 8, 9, 4), first=1)])[0]]
    [(5, 6, 7), (6, 7, 8, 9), (8, 9, 4)]
    """
    windows, owner, copied = [], [], []
    for i, t in enumerate(tokens):
        prompt = set(t.ids[: t.first]) if t.first > 1 else set()
        for at, end in ((at, min(at + _CONTEXT, run.stop)) for run in t.runs for at in run[::_CONTEXT]):
            begin = max(0, at - _CONTEXT)
            windows.append(Tokens(t.ids[begin:end], at - begin))
            owner.append(i)
            copied.append(np.array([each in prompt for each in t.ids[at:end]]))
    return windows, np.array(owner), copied
