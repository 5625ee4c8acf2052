"""What of a forget set is ascended on more, and what first: weights of its tokens, and the order of its examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyunlearn.data import Tokens
from pyunlearn.errors import ArgumentError
from pyunlearn.methods import METHODS, Method

Floats = NDArray[np.float64]
Score = Callable[[Sequence[Tokens]], list[Floats]]  # the log-likelihoods of each one's scored tokens, nats

ORDERS = ("random", "easy_first", "hard_first")
_AT_A_TIME = 4096  # masked copies in memory


class Emphasis(NamedTuple):
    """The caller's choice: see `unlearn`."""

    token_weights: Any = None
    token_share: float = 1.0
    order: str = "random"
    difficulty: Any = "nll"

    @property
    def compares(self) -> bool:
        """Whether it reads the forget set under the reference model."""
        kinds = (self.token_weights, self.difficulty if self.order != "random" else None)
        return any(isinstance(kind, str) and kind in ("reference", "nll") for kind in kinds)

    def check(self, method: Method, *, has_reference: bool, has_retain: bool) -> None:
        """Raises ArgumentError for a choice that does not exist, or that the method or the texts given do not allow."""
        weights, ranks = self.token_weights, self.difficulty
        if weights is not None and not method.weighted:
            able = ", ".join(m.name for m in METHODS.values() if m.weighted)
            raise ArgumentError(
                f"token_weights weigh the forget text's own log-likelihoods, and method {method.name!r} reads none: choose from {able}"
            )
        if isinstance(weights, str) and weights not in ("importance", "reference"):
            raise ArgumentError(
                f'token_weights must be "importance", "reference", a list of numbers for each forget example or None, got {weights!r}'
            )
        if isinstance(weights, str) and weights == "reference" and not has_reference:
            raise ArgumentError(
                'token_weights="reference" weighs what is memorized beyond a reference: pass reference_model='
            )
        if not isinstance(self.token_share, (int, float)) or not 0 < self.token_share <= 1:
            raise ArgumentError(f"token_share must be above 0 and at most 1, got {self.token_share!r}")
        if self.token_share < 1 and weights is None:
            raise ArgumentError(
                'token_share keeps the tokens of the largest weight: pass token_weights="importance", say'
            )
        if self.order not in ORDERS:
            raise ArgumentError(f"order must be {', '.join(map(repr, ORDERS))}, got {self.order!r}")
        if isinstance(ranks, str) and ranks not in ("nll", "ksd"):
            raise ArgumentError(
                f'difficulty must be "nll", "ksd" or a list of one number for each forget example, got {ranks!r}'
            )
        if isinstance(ranks, str) and ranks == "ksd" and self.order != "random" and not has_retain:
            raise ArgumentError(
                'difficulty="ksd" is how much the training set supports an example: pass some of it as retain='
            )


def importance(tokens: Sequence[Tokens], score: Score, *, mask_id: int | None, seed: int) -> list[Floats]:
    """For each text (T,), how much the rest of it hangs on each token.

        delta_t = max(0, NLL(rest | token t masked) - NLL(rest))

    The rest are the tokens after it, for a language model reads nothing else behind a mask; so the last token has 0. Masked means replaced by `mask_id`, or,
    where there is none, by another token of the forget set, drawn from the seed. T - 1 forward passes for a text, in batches.

    Source: the causal objective of arXiv 1910.12336 (CXPlain), which arXiv 2009.14454 builds on; for tokens of a language model, ours.
    """
    rng, pool = np.random.default_rng((seed, 4)), sorted({i for t in tokens for i in t.scored})
    out = []
    for some in _within(tokens, _AT_A_TIME):
        copies = [_masked(t, at, mask_id, pool, rng) for t in some for at in range(len(t.scored) - 1)]
        whole, found = score(some), iter(score(copies) if copies else [])
        for own in whole:
            after = own.sum() - own.cumsum()  # of the tokens behind each
            masked = np.array([*(next(found).sum() for _ in own[:-1]), 0.0])
            out.append(np.append(np.maximum(after - masked, 0.0)[:-1], 0.0))
    return out


def beyond(log_likelihood: Sequence[Floats], reference: Sequence[Floats]) -> list[Floats]:
    """For each text (T,), how much likelier each token is than under the reference: max(0, ln p_t - ln q_t)."""
    return [np.maximum(x - r, 0.0) for x, r in zip(log_likelihood, reference, strict=True)]


def scaled(weights: Sequence[Floats], share: float) -> list[Floats]:
    """The weights with mean 1 in each text, the smallest of them 0 if only a share is to be kept; all 1 where a text has none above 0."""
    out = []
    for w in weights:
        kept = np.zeros_like(w)
        most = np.argsort(-w, kind="stable")[: math.ceil(share * len(w) - 1e-9)]
        kept[most] = w[most]
        total = kept.sum()
        out.append(kept * len(w) / total if total > 0 else np.ones_like(w))
    return out


def given(weights: Any, tokens: Sequence[Tokens]) -> list[Floats]:
    """The caller's own. Raises ArgumentError unless there is a number, 0 or more, for each scored token of each example."""
    if isinstance(weights, str) or not hasattr(weights, "__len__") or len(weights) != len(tokens):
        got = len(weights) if hasattr(weights, "__len__") and not isinstance(weights, str) else repr(weights)
        raise ArgumentError(f"token_weights must be {len(tokens)} lists, one for each forget example, got {got}")
    out = []
    for number, (w, t) in enumerate(zip(weights, tokens, strict=True), 1):
        try:
            found = np.asarray(w, dtype=np.float64)
        except (TypeError, ValueError):
            found = np.array(np.nan)
        if found.shape != (len(t.scored),) or not (np.isfinite(found) & (found >= 0)).all():
            raise ArgumentError(
                f"token_weights of forget example {number} must be {len(t.scored)} numbers, 0 or more, one for each of its scored tokens, got {w!r}"
            )
        out.append(found)
    return out


def ranks(values: Any, count: int) -> Floats:
    """(count,) the caller's own difficulties. Raises ArgumentError unless they are one number for each example."""
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        found = np.array(np.nan)
    if found.shape != (count,) or not np.isfinite(found).all():
        raise ArgumentError(f"difficulty must be {count} numbers, one for each forget example, got {values!r}")
    return found


def in_order(todo: NDArray[np.int64], order: str, difficulty: Floats | None, seed: Sequence[int]) -> NDArray[np.int64]:
    """Those examples shuffled, or by their difficulty, equals as they stand."""
    if order == "random" or difficulty is None:
        return np.random.default_rng(seed).permutation(todo)
    sign = 1.0 if order == "easy_first" else -1.0
    return todo[np.argsort(sign * difficulty[todo], kind="stable")]


def _masked(t: Tokens, at: int, mask_id: int | None, pool: Sequence[int], rng: np.random.Generator) -> Tokens:
    """The text with its scored token `at` replaced, scored behind it."""
    place, ids = t.first + at, list(t.written)
    if mask_id is None:
        others = [i for i in pool if i != ids[place]] or list(pool)
        mask_id = others[int(rng.integers(len(others)))]
    ids[place] = mask_id
    changed = {"ids": tuple(ids)} if t.decoder is None else {"decoder": tuple(ids)}
    return replace(t, first=place + 1, **changed)


def _within(tokens: Sequence[Tokens], most: int) -> list[list[Tokens]]:
    """The texts in groups of so many scored tokens at most, one text at least."""
    groups: list[list[Tokens]] = []
    size = most
    for t in tokens:
        if size + len(t.scored) > most:
            groups.append([])
            size = 0
        groups[-1].append(t)
        size += len(t.scored)
    return groups
