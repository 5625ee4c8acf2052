"""Distance of an example from the text that a model was trained on: in or out of distribution."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial.distance import cdist

from pyunlearn.errors import ArgumentError
from pyunlearn.metrics._check import Booleans, Floats, between, finite

_CHUNK = 1 << 22  # distances in memory at a time: 32 MiB


def knn_radius(examples: ArrayLike, corpus: ArrayLike, *, neighbours: int = 10, among_corpus: bool = False) -> Floats:
    """Compute the distance from each example to its M-th nearest neighbour in the corpus, its fill radius rho_M.

    Distances come from differences, not from norms and products, which would cancel for near vectors of large norm.

    Args:
        examples: (n, D) representations, for instance `probes.representations(...).hidden`.
        corpus: (m, D) representations of text that the model was trained on, by the same model.
        neighbours: M, 1 to m (m - 1 with among_corpus).
        among_corpus: the examples are themselves rows of the corpus, so the neighbour at distance 0 that is the example
            itself is not counted. Otherwise a trained example always looks nearer than one that was not trained on.

    Returns:
        (n,) Euclidean distances, 0 or more. High = out of distribution.

    Raises:
        ArgumentError: widths that differ, NaN or Inf, M out of range.

    Example:
        >>> knn_radius([[0.0], [10.0]], [[0.0], [1.0], [3.0]], neighbours=2).tolist()
        [1.0, 9.0]

    See Also:
        out_of_distribution: the split by the distances of held-out text.

    Source: Lederer et al. 2020, arXiv 2005.12062 (density of data); k nearest neighbours as in Sun et al. 2022,
        arXiv 2204.06507.
    """
    x, y = finite("examples", examples, dimensions=2), finite("corpus", corpus, dimensions=2)
    if x.shape[1] != y.shape[1]:
        raise ArgumentError(f"examples and corpus must have the same width, got {x.shape[1]} and {y.shape[1]}")
    rank, most = neighbours - 1 + among_corpus, y.shape[0] - among_corpus
    if not 1 <= neighbours <= most:
        raise ArgumentError(f"neighbours must be 1 to {most}, the corpus's size, got {neighbours}")
    step = max(1, _CHUNK // y.shape[0])
    chunks = [np.partition(cdist(x[i : i + step], y), rank, axis=1)[:, rank] for i in range(0, x.shape[0], step)]
    return np.concatenate(chunks)


def out_of_distribution(scores: ArrayLike, held_out_scores: ArrayLike, *, quantile: float = 0.95) -> Booleans:
    """Decide whether each example lies further out than a share `quantile` of held-out in-distribution text.

        score > the k-th lowest of the m held-out scores,    k = ceil(quantile (m + 1))

    The order statistic is that of conformal prediction, with which 1 - quantile holds for any m; the sample's quantile
    lies lower, and would call 9 % out instead of 5 % with 21 texts. Held-out text must not have been trained on:
    trained text lies nearer, and too many examples would count as out.

    Args:
        scores: (n,) high = far out: `knn_radius`, or the NLL under a model without the example.
        held_out_scores: (m,) the same score of held-out text, quantile / (1 - quantile) of it or more: 19 for 0.95.
        quantile: above 0 and below 1; at most 1 - quantile of in-distribution text counts as out by mistake.

    Returns:
        (n,) true = out of distribution.

    Raises:
        ArgumentError: NaN or Inf, a quantile out of range, too few held-out scores for it.

    Example:
        >>> out_of_distribution([0.5, 9.0], range(5), quantile=0.8).tolist()
        [False, True]

    See Also:
        knn_radius: a score of distance.

    Source: ours, for the question of Baluta et al. 2024, arXiv 2411.04388; the order statistic: Vovk et al. 2005,
        Algorithmic Learning in a Random World.
    """
    x = finite("scores", scores, dimensions=1)
    typical = finite("held_out_scores", held_out_scores, dimensions=1)
    between("quantile", quantile, 0, 1)
    needed = int(np.ceil(quantile / (1 - quantile) - 1e-9))
    if typical.size < needed:
        raise ArgumentError(
            f"held_out_scores must be at least {needed} for the quantile {quantile}, got {typical.size}"
        )
    k = int(np.ceil(quantile * (typical.size + 1) - 1e-9))
    return x > np.sort(typical)[k - 1]
