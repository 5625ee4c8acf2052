"""Token weights of the forget set: factors that unlearn some tokens of a text more than others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyunlearn.data import Tokens
from pyunlearn.errors import ArgumentError, brief
from pyunlearn.methods import METHODS, Method
from pyunlearn.models.likelihood import Likelihood
from pyunlearn.models.scoring import Scorer

Floats = NDArray[np.float64]
Score = Callable[[Sequence[Tokens]], list[Floats]]  # log-likelihoods of each text's scored tokens, nats

_MASKED_TOKENS = 4096  # scored tokens whose masked copies are scored together


def check_token_weights(token_weights: Any, method: Method, *, has_reference: bool) -> None:
    """Raise ArgumentError where the method accepts no token weights, or "reference" has no reference model."""
    if token_weights is not None and not method.weighted:
        able = ", ".join(m.name for m in METHODS.values() if m.weighted)
        raise ArgumentError(
            f"token_weights weigh the forget text's own log-likelihoods, and method {method.name!r} reads none: "
            f"choose from {able}"
        )
    if isinstance(token_weights, str) and token_weights == "reference" and not has_reference:
        raise ArgumentError(
            'token_weights="reference" weighs what is memorized beyond a reference: pass reference_model='
        )


def token_weights_of(
    kind: Any, share: float, forget: Sequence[Tokens], scorer: Scorer, reference: Likelihood, *, seed: int
) -> list[Floats] | None:
    """Return one array of token weights (T,) for each forget example, T its scored tokens; None if `kind` is None.

    Args:
        kind: "importance", "reference", the caller's own list, or None.
        share: share of each text's tokens that get a weight above 0.
        forget: the forget texts.
        scorer: scorer of the model that is unlearned.
        reference: likelihood of the reference model.
        seed: seed of the draw of tokens that replace masked ones.
    """
    if kind is None:
        return None
    if not isinstance(kind, str):
        return largest(check_weights(kind, forget), share)
    if kind == "importance":
        mask_id = scorer.lm.tokenizer.mask_token_id
        return scaled(importance(forget, scorer.token_log_likelihood, mask_id=mask_id, seed=seed), share)
    model, other = scorer.token_log_likelihood(forget), scorer.token_log_likelihood(forget, reference)
    return scaled(beyond_reference(model, other), share)


def importance(tokens: Sequence[Tokens], score: Score, *, mask_id: int | None, seed: int) -> list[Floats]:
    """Compute for each text (T,) the effect of each token on the likelihood of the tokens after it.

        delta_t = max(0, NLL(rest | token t masked) - NLL(rest))

    The rest are the tokens after t, the only ones on which a causal model's mask has an effect; the last token has 0. A
    masked token is replaced by `mask_id`, or, where there is none, by another token of the forget set, drawn from the
    seed. It takes T - 1 forward passes per text, in batches.

    Source: the causal objective of arXiv 1910.12336 (CXPlain), used by arXiv 2009.14454; the form for tokens of a
    language model is ours.
    """
    rng, pool = np.random.default_rng((seed, 4)), sorted({i for t in tokens for i in t.scored})
    weights = []
    for group in _groups(tokens, _MASKED_TOKENS):
        copies = [_masked(t, at, mask_id, pool, rng) for t in group for at in range(len(t.scored) - 1)]
        unmasked, masked = score(group), iter(score(copies) if copies else [])
        for own in unmasked:
            rest = own.sum() - own.cumsum()  # (T,) of the tokens after each
            rest_masked = np.array([*(next(masked).sum() for _ in own[:-1]), 0.0])
            weights.append(np.append(np.maximum(rest - rest_masked, 0.0)[:-1], 0.0))
    return weights


def beyond_reference(log_likelihood: Sequence[Floats], reference: Sequence[Floats]) -> list[Floats]:
    """Return for each text (T,) max(0, ln p_t - ln q_t), the log-likelihood in excess of the reference model's."""
    return [np.maximum(x - r, 0.0) for x, r in zip(log_likelihood, reference, strict=True)]


def largest(weights: Sequence[Floats], share: float) -> list[Floats]:
    """Return the weights, with 0 for all but the largest `share` of each text's.

    >>> largest([np.array([3.0, 1.0, 0.0, 0.0])], 0.25)
    [array([3., 0., 0., 0.])]
    """
    out = []
    for w in weights:
        chosen = np.zeros_like(w)
        indices = np.argsort(-w, kind="stable")[: math.ceil(share * len(w) - 1e-9)]
        chosen[indices] = w[indices]
        out.append(chosen)
    return out


def scaled(weights: Sequence[Floats], share: float) -> list[Floats]:
    """Return the largest weights, scaled to mean 1 in each text; a text without a weight above 0 gets all 1.

    >>> scaled([np.array([3.0, 1.0, 0.0, 0.0])], 0.25)
    [array([4., 0., 0., 0.])]
    """
    return [w / w.mean() if w.any() else np.ones_like(w) for w in largest(weights, share)]


def check_weights(weights: Any, tokens: Sequence[Tokens]) -> list[Floats]:
    """Return the caller's own weights as arrays.

    Raises ArgumentError unless there is a number, 0 or more, for each scored token of each example.
    """
    if isinstance(weights, str) or not hasattr(weights, "__len__") or len(weights) != len(tokens):
        got = len(weights) if hasattr(weights, "__len__") and not isinstance(weights, str) else brief(weights)
        raise ArgumentError(
            f"token_weights must be {len(tokens)} lists, one for each forget example, got {got}: a window or another "
            'form of a text (scope="person") is an example, after the text, with a list of its own'
        )
    out = []
    for number, (w, t) in enumerate(zip(weights, tokens, strict=True), 1):
        try:
            array = np.asarray(w, dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            array = np.array(np.nan)
        if array.shape != (len(t.scored),) or not (np.isfinite(array) & (array >= 0)).all():
            raise ArgumentError(
                f"token_weights of forget example {number} must be {len(t.scored)} numbers, 0 or more, one for each of "
                f"its scored tokens, got {brief(w)}"
            )
        out.append(array)
    return out


def _masked(t: Tokens, at: int, mask_id: int | None, pool: Sequence[int], rng: np.random.Generator) -> Tokens:
    """Return a text with its scored token `at` replaced, in which only the tokens after it are scored."""
    index, ids = t.indices[at], list(t.written)
    if mask_id is None:
        others = [i for i in pool if i != ids[index]] or list(pool)
        mask_id = others[int(rng.integers(len(others)))]
    ids[index] = mask_id
    rest = t.indices[at + 1 :]
    return Tokens.at(ids, rest) if t.decoder is None else Tokens.at(t.ids, rest, tuple(ids))


def _groups(tokens: Sequence[Tokens], limit: int) -> list[list[Tokens]]:
    """Split texts into groups of at most `limit` scored tokens, one text at least."""
    groups: list[list[Tokens]] = []
    size = limit
    for t in tokens:
        if size + len(t.scored) > limit:
            groups.append([])
            size = 0
        groups[-1].append(t)
        size += len(t.scored)
    return groups
