"""In or out of distribution: how far an example lies from the text that a model was trained on."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial.distance import cdist

from pyunlearn.errors import ArgumentError
from pyunlearn.metrics._arrays import Booleans, Floats, finite

_CHUNK = 1 << 22  # distances held at a time: 32 MiB


def knn_radius(examples: ArrayLike, corpus: ArrayLike, *, neighbours: int = 10, among_corpus: bool = False) -> Floats:
    """The distance from each example to its M-th nearest neighbour in the corpus, its fill radius rho_M.

    Args:
        examples: (n, D) representations, `probes.representations` for one.
        corpus: (m, D) representations of text that the model was trained on, by the same model.
        neighbours: M, 1 to m (m - 1 with among_corpus).
        among_corpus: the examples are themselves rows of the corpus, so each has one neighbour at distance 0 that is itself; it is not
            counted. Without this an example that was trained on always looks nearer than one that was not.

    Returns:
        (n,) Euclidean distances, 0 or more. High = out of distribution. From differences, not from norms and products: the distance
        between near vectors of large norm would cancel.

    Raises:
        ArgumentError: widths that differ, values that are not finite, M out of range.

    Source: Lederer et al. 2020, arXiv 2005.12062 (density of data); k nearest neighbours as in Sun et al. 2022, arXiv 2204.06507.
    """
    x, y = _points(examples, corpus)
    place, most = neighbours - 1 + among_corpus, y.shape[0] - among_corpus
    if not 1 <= neighbours <= most:
        raise ArgumentError(f"neighbours must be 1 to {most}, the corpus's size, and is {neighbours}.")
    step = max(1, _CHUNK // y.shape[0])
    parts = [np.partition(cdist(x[i : i + step], y), place, axis=1)[:, place] for i in range(0, x.shape[0], step)]
    return np.concatenate(parts)


def out_of_distribution(scores: ArrayLike, held_out_scores: ArrayLike, *, quantile: float = 0.95) -> Booleans:
    """Whether each example lies further out than a share `quantile` of held-out text of the training distribution does.

        score > quantile(held_out_scores)

    Held-out text must not have been trained on: text that was lies nearer, and too many examples would come out as OOD.

    Args:
        scores: (n,) high = far out: `knn_radius`, or the NLL under a model without the example.
        held_out_scores: (m,) the same score of held-out text, at least 1 / (1 - quantile) of it.
        quantile: above 0 and below 1; so 1 - quantile of in-distribution text is called OOD by mistake.

    Returns:
        (n,) true = out of distribution.

    Raises:
        ArgumentError: scores that are not finite, a quantile out of range, too few held-out scores to have it.

    Source: the split by held-out quantiles is ours, for the question of Baluta et al. 2024, arXiv 2411.04388.
    """
    x, held = finite(scores, "scores", dimensions=1), finite(held_out_scores, "held_out_scores", dimensions=1)
    if not 0 < quantile < 1:
        raise ArgumentError(f"quantile must lie between 0 and 1, both left out, and is {quantile}.")
    needed = int(np.ceil(1 / (1 - quantile) - 1e-9))
    if held.size < needed:
        raise ArgumentError(
            f"held_out_scores must be at least {needed} for the quantile {quantile}, and are {held.size}."
        )
    return x > np.quantile(held, quantile, method="higher")


def _points(examples: ArrayLike, corpus: ArrayLike) -> tuple[Floats, Floats]:
    x, y = finite(examples, "examples", dimensions=2), finite(corpus, "corpus", dimensions=2)
    if x.shape[1] != y.shape[1]:
        raise ArgumentError(f"examples and corpus must have the same width, and have {x.shape[1]} and {y.shape[1]}.")
    return x, y
