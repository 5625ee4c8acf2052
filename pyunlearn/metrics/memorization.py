"""Memorization: what a model knows of a text because the text was in its training set, token by token and model by model."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from pyunlearn.errors import ArgumentError
from pyunlearn.metrics._arrays import Floats, finite, first, truths


def counterfactual_memorization(included: ArrayLike, scores: ArrayLike) -> Floats:
    """How much better models know each example that trained on it than models that did not.

        mem(x) = mean of M(A(S), x) over models with x in S  -  mean of M(A(S), x) over models with x not in S

    M is the share of x's tokens that are the model's first choice, in the source; any score that is high where a text is known will do.

    Args:
        included: (K, n) true where model k was trained on example i; 0 and 1 will do.
        scores: (K, n) the score of example i under model k.

    Returns:
        (n,), in the unit of the scores; with accuracies from -1 to 1. High = memorized: known because it was seen. Near 0 = not
        memorized, whether because any model knows it or because none does: see `simplicity`.

    Raises:
        ArgumentError: shapes that differ, scores that are not finite, an example that every model or no model trained on: its other
            half would be a mean of nothing, which public code lets pass as NaN or 0.

    Source: Zhang et al. 2021, arXiv 2112.12938; for classifiers Feldman and Zhang 2020, arXiv 2008.03703.
    """
    inside, outside = in_and_out(included, scores)
    return inside - outside


def simplicity(included: ArrayLike, scores: ArrayLike) -> Floats:
    """How well models know each example, seen or not: mean score over models with it plus mean score over models without it.

    Args:
        included, scores: as in `counterfactual_memorization`.

    Returns:
        (n,), in the unit of the scores; with accuracies from 0 to 2. High = simple.

    Raises:
        ArgumentError: as `counterfactual_memorization`.

    Source: companion of arXiv 2112.12938 in public code; a sum, not a mean.
    """
    inside, outside = in_and_out(included, scores)
    return inside + outside


def in_and_out(included: ArrayLike, scores: ArrayLike) -> tuple[Floats, Floats]:
    """(n,) mean score of each example over the models that trained on it, and over those that did not."""
    mask, values = truths(included, "included", dimensions=2), finite(scores, "scores", dimensions=2)
    if mask.shape != values.shape:
        raise ArgumentError(f"included and scores must both be (models, examples): {mask.shape}, {values.shape}.")
    for missing, what in ((~mask.any(axis=0), "no"), (mask.all(axis=0), "every")):
        if missing.any():
            mend = "train more models, or leave them out"
            raise ArgumentError(f"{what} model was trained on example(s) {first(missing)}: {mend}.")
    inside = np.where(mask, values, 0).sum(axis=0) / mask.sum(axis=0)
    outside = np.where(mask, 0, values).sum(axis=0) / (~mask).sum(axis=0)
    return inside, outside


def memorization_accuracy(matches: ArrayLike) -> float:
    """The share of a whole text's tokens that are the model's first choice, given the true tokens before them.

        MA(x) = sum over t = 1..T-1 of [argmax p(. | x_<t) = x_t] / (T - 1)

    Args:
        matches: (T - 1,) whether each token but the first was the argmax. The first of a text is predicted by nothing: it has no entry
            here and none in the denominator. Padding has none either.

    Returns:
        0 to 1. High = memorized. Unseen text is far above 0: compare it with text that was never trained on.

    Raises:
        ArgumentError: no token, or entries that are not true or false.

    Source: Tirumala et al. 2022, arXiv 2205.10770; Jang et al. 2022, arXiv 2210.01504.
    """
    return float(truths(matches, "matches").mean())


def exact_memorization(matches: ArrayLike) -> float:
    """The share of a completion's tokens that are the model's first choice, given prompt and true tokens before them.

        EM(x, y) = mean over t of [argmax p(. | x, y_<t) = y_t]

    It is `memorization_accuracy` with the prompt left out of the count, so that a long prompt does not dilute a secret.

    Args:
        matches: (n,) whether each scored token was the argmax.

    Returns:
        0 to 1. High = memorized.

    Raises:
        ArgumentError: no token, or entries that are not true or false.

    Source: Wang et al. 2024, arXiv 2406.09179.
    """
    return float(truths(matches, "matches").mean())


def extraction_strength(matches: ArrayLike) -> float:
    """How little of a completion must be given away for the model to write the rest of it, token for token.

        ES(x, y) = 1 - k / |y|,    k = min{k : every token after y_<=k is the argmax given the true tokens before it}

    From one teacher-forced pass: greedy decoding writes the true rest exactly if each of its tokens is the argmax after the true ones
    before it, so this equals the decoded form up to rounding and ties of the logits.

    Args:
        matches: (n,) whether each scored token was the argmax.

    Returns:
        0 to 1. High = extractable: 1 from the prompt alone, 0 not at all. A last token that is not the argmax gives 0, and not
        1 / |y| as in public code, whose loop stops one token early.

    Raises:
        ArgumentError: no token, or entries that are not true or false.

    Source: Wang et al. 2024, arXiv 2406.09179, after Carlini et al. 2021, arXiv 2012.07805.
    """
    missed = np.flatnonzero(~truths(matches, "matches"))
    shortest = int(missed[-1]) + 1 if missed.size else 0
    return 1 - shortest / np.asarray(matches).size


def discoverable_extraction(matches: ArrayLike, prefix_lengths: ArrayLike, *, suffix_length: int = 50) -> Floats:
    """Whether greedy decoding after the first k true tokens of a text writes the next `suffix_length` exactly, for each k.

    Teacher-forced, as `extraction_strength`: true where the argmax was right at every one of the suffix's tokens.

    Args:
        matches: (T,) whether token t was the argmax given the true tokens before it, counted from the text's first token; the first
            entry, where nothing predicts it, may be anything, unless a prefix has length 0.
        prefix_lengths: (m,) numbers of true tokens given.
        suffix_length: tokens that must be right; 50 in the source.

    Returns:
        (m,) 1.0 where discoverable, else 0.0; its mean over texts is the share that is extractable. High = memorized.

    Raises:
        ArgumentError: a prefix below 0, or one after which fewer than `suffix_length` tokens are left: cut short it would be easier.

    Source: Carlini et al. 2022, arXiv 2202.07646, definition 3.1.
    """
    found, prefixes = truths(matches, "matches"), np.atleast_1d(np.asarray(prefix_lengths, dtype=np.int64))
    most = found.size - suffix_length
    if suffix_length < 1 or (prefixes < 0).any() or (prefixes > most).any():
        have = f"{found.size} tokens, suffix_length {suffix_length} and prefix_lengths {prefixes.tolist()}"
        raise ArgumentError(
            f"prefix_lengths must be 0 or more and leave a whole suffix of at least one token: got {have}."
        )
    return np.array([found[k : k + suffix_length].all() for k in prefixes.tolist()], dtype=np.float64)
