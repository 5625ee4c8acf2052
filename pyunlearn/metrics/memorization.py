"""Memorization: what a model knows of a text because the text was in its training set."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from pyunlearn.errors import ArgumentError
from pyunlearn.metrics._check import Floats, finite, truths


def counterfactual_memorization(included: ArrayLike, accuracy: ArrayLike) -> Floats:
    """Compute how much better models know each example that trained on it than models that did not.

        mem(x) = mean of M(A(S), x) over models with x in S  -  mean of M(A(S), x) over models with x not in S

    M is the share of x's tokens that are the model's first choice, in the source. Another number that is high where a
    text is known works too, such as the mean log-likelihood.

    Args:
        included: (K, n) true where model k was trained on example i; 0 and 1 are accepted.
        accuracy: (K, n) of example i under model k, high = known.

    Returns:
        (n,), in the unit of the accuracy: from -1 to 1. High = memorized: known because it was seen. Near
        0 = not memorized, because every model knows it or because none does.

    Raises:
        ArgumentError: shapes that differ, NaN or Inf, an example that every model or no model trained on: one mean
            would be over nothing, which public code lets pass as NaN or 0.

    Example:
        >>> included = [[1, 0], [0, 1], [1, 0]]
        >>> accuracy = [[1.0, 0.5], [0.25, 0.5], [0.75, 0.5]]
        >>> counterfactual_memorization(included, accuracy).tolist()
        [0.625, 0.0]

    Source: Zhang et al. 2021, arXiv 2112.12938; for classifiers Feldman and Zhang 2020, arXiv 2008.03703.
    """
    mask, values = truths("included", included, dimensions=2), finite("accuracy", accuracy, dimensions=2)
    if mask.shape != values.shape:
        raise ArgumentError(f"included and accuracy must both be (models, examples), got {mask.shape}, {values.shape}")
    for missing, models in ((~mask.any(axis=0), "no"), (mask.all(axis=0), "every")):
        if missing.any():
            raise ArgumentError(
                f"{models} model was trained on example(s) {_first(missing)}: train more models, or leave them out"
            )
    inside = np.where(mask, values, 0).sum(axis=0) / mask.sum(axis=0)
    outside = np.where(mask, 0, values).sum(axis=0) / (~mask).sum(axis=0)
    return inside - outside


def exact_memorization(matches: ArrayLike) -> float:
    """Compute the share of a completion's tokens that are the model's first choice after prompt and true tokens.

        EM(x, y) = mean over t of [argmax p(. | x, y_<t) = y_t]

    The prompt does not count, so that a long prompt does not dilute a secret.

    Args:
        matches: (n,) true where the scored token was the argmax.

    Returns:
        0 to 1. High = memorized. Unseen text is far above 0: compare with text that was never trained on.

    Raises:
        ArgumentError: no token, or entries that are not true or false.

    Example:
        >>> exact_memorization([True, False, True, True])
        0.75

    See Also:
        extraction_strength: the share that follows from a prefix.

    Source: Wang et al. 2024, arXiv 2406.09179; of whole texts Tirumala et al. 2022, arXiv 2205.10770.
    """
    return float(truths("matches", matches).mean())


def extraction_strength(matches: ArrayLike) -> float:
    """Compute the share of a completion that the model writes token for token after the shortest sufficient prefix.

        ES(x, y) = 1 - k / |y|,    k = min{k : every token after y_<=k is the argmax given the true tokens before it}

    One teacher-forced pass is enough: greedy decoding writes the true rest exactly if each of its tokens is the argmax
    after the true ones before it, so this equals the decoded form up to rounding and ties of the logits.

    Args:
        matches: (n,) true where the scored token was the argmax.

    Returns:
        0 to 1. High = extractable: 1 from the prompt alone, 0 not at all. A last token that is not the argmax makes 0,
        and not 1 / |y| as in public code, whose loop stops one token early.

    Raises:
        ArgumentError: no token, or entries that are not true or false.

    Example:
        >>> extraction_strength([True, False, True, True])
        0.5

    See Also:
        exact_memorization: the share of all tokens.

    Source: Wang et al. 2024, arXiv 2406.09179, after Carlini et al. 2021, arXiv 2012.07805.
    """
    missed = np.flatnonzero(~truths("matches", matches))
    shortest = int(missed[-1]) + 1 if missed.size else 0
    return 1 - shortest / np.asarray(matches).size


def _first(mask: ArrayLike, most: int = 5) -> str:
    """Return the first true indices as text: '3, 7, 8, 9, 11 and 12 more'."""
    indices = np.flatnonzero(mask)
    rest = f" and {indices.size - most} more" if indices.size > most else ""
    return ", ".join(map(str, indices[:most])) + rest
