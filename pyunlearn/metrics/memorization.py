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
        memorized, whether because any model knows it or because none does.

    Raises:
        ArgumentError: shapes that differ, scores that are not finite, an example that every model or no model trained on: its other
            half would be a mean of nothing, which public code lets pass as NaN or 0.

    Source: Zhang et al. 2021, arXiv 2112.12938; for classifiers Feldman and Zhang 2020, arXiv 2008.03703.
    """
    mask, values = truths(included, "included", dimensions=2), finite(scores, "scores", dimensions=2)
    if mask.shape != values.shape:
        raise ArgumentError(f"included and scores must both be (models, examples): {mask.shape}, {values.shape}.")
    for missing, what in ((~mask.any(axis=0), "no"), (mask.all(axis=0), "every")):
        if missing.any():
            mend = "train more models, or leave them out"
            raise ArgumentError(f"{what} model was trained on example(s) {first(missing)}: {mend}.")
    inside = np.where(mask, values, 0).sum(axis=0) / mask.sum(axis=0)
    outside = np.where(mask, 0, values).sum(axis=0) / (~mask).sum(axis=0)
    return inside - outside


def exact_memorization(matches: ArrayLike) -> float:
    """The share of a completion's tokens that are the model's first choice, given prompt and true tokens before them.

        EM(x, y) = mean over t of [argmax p(. | x, y_<t) = y_t]

    The prompt is left out of the count, so that a long prompt does not dilute a secret.

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
