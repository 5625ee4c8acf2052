"""Kernelized Stein discrepancy: how strongly the training set supports an example."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from pyunlearn.errors import ArgumentError
from pyunlearn.metrics._check import Floats, finite


def stein_kernel(
    points: ArrayLike, scores: ArrayLike, other_points: ArrayLike, other_scores: ArrayLike, *, bandwidth: float
) -> Floats:
    """Compute the Stein kernel of an RBF between every pair of two sets of points.

        kappa(z, z') = k (s.s' + d.(s - s') / sigma + (p - ||d||^2 / sigma) / sigma),
        k = exp(-||d||^2 / (2 sigma)),  d = z - z',  p the dimension

    Args:
        points: (n, p) representations z.
        scores: (n, p) Stein scores s, the gradient of the log-density at each point; for a language model
            grad_h ln p(y | x) at the last hidden state (`probes.representations`).
        other_points: (m, p) representations of the other set.
        other_scores: (m, p) its Stein scores.
        bandwidth: sigma, a squared length. The source takes a temperature times p.

    Returns:
        (n, m), any sign. Its mean under the model's own density is 0 in either argument.

    Raises:
        ArgumentError: shapes that do not match, NaN or Inf, a bandwidth that is not above 0.

    Example:
        >>> stein_kernel([[0.0]], [[1.0]], [[0.0]], [[1.0]], bandwidth=2.0).tolist()
        [[1.5]]

    Source: Sarvmaili et al. 2024, arXiv 2403.15576 (HD-Explain), used by arXiv 2410.03043.
    """
    z, s = _pair(points, scores, "points", "scores")
    y, t = _pair(other_points, other_scores, "other_points", "other_scores")
    if z.shape[1] != y.shape[1] or not bandwidth > 0:
        raise ArgumentError(
            f"both sets must have one width, and bandwidth must be above 0: got {z.shape}, {y.shape}, {bandwidth}"
        )
    d = z[:, None, :] - y[None, :, :]  # (n, m, p)
    squared = (d**2).sum(axis=2)  # (n, m)
    along = (d * (s[:, None, :] - t[None, :, :])).sum(axis=2)  # (n, m)
    trace = (z.shape[1] - squared / bandwidth) / bandwidth
    return np.exp(-squared / (2 * bandwidth)) * (s @ t.T + along / bandwidth + trace)


def ksd_difficulty(
    points: ArrayLike,
    scores: ArrayLike,
    corpus_points: ArrayLike,
    corpus_scores: ArrayLike,
    *,
    bandwidth: float | None = None,
) -> Floats:
    """Compute how strongly a sample of the training set supports each example: its mean Stein kernel with the sample.

        (1 / m) sum over r of kappa(z, z_r)

    A heuristic: check in your own runs whether it correlates with the steps that examples take (Spearman, against
    `steps_to_forget`).

    Args:
        points: (n, p) representations of the examples (`probes.representations`).
        scores: (n, p) their Stein scores (not attack scores), the gradient of the log-likelihood at each point.
        corpus_points: (m, p) representations of the sample.
        corpus_scores: (m, p) Stein scores of the sample.
        bandwidth: sigma; None for p times the mean variance of the corpus, so that the scale of the representations
            does not matter.

    Returns:
        (n,), any sign. High = supported by many training examples: hard to unlearn.

    Raises:
        ArgumentError: shapes that do not match, NaN or Inf, a bandwidth that is not above 0, a corpus without variance
            and no bandwidth.

    Example:
        >>> near, far = [0.0, 0.0], [30.0, 0.0]
        >>> corpus = [[0.0, 1.0], [1.0, 0.0]]
        >>> ones = [[1.0, 1.0], [1.0, 1.0]]
        >>> supported, alone = ksd_difficulty([near, far], ones, corpus, ones)
        >>> bool(supported > alone)
        True

    Source: the marginal score of arXiv 2410.03043 (from memory; its exact list is not public).
    """
    corpus = finite("corpus_points", corpus_points, dimensions=2)
    sigma = float(corpus.shape[1] * corpus.var(axis=0).mean()) if bandwidth is None else bandwidth
    z, s = _pair(points, scores, "points", "scores")
    step = max(1, (1 << 22) // max(1, corpus.size))  # (step, m, p) differences are in memory at a time
    chunks = [
        stein_kernel(z[i : i + step], s[i : i + step], corpus, corpus_scores, bandwidth=sigma).mean(axis=1)
        for i in range(0, len(z), step)
    ]
    return np.concatenate(chunks)


def _pair(points: ArrayLike, scores: ArrayLike, name: str, other: str) -> tuple[Floats, Floats]:
    """Check points and their scores: (n, p) each."""
    z, s = finite(name, points, dimensions=2), finite(other, scores, dimensions=2)
    if z.shape != s.shape:
        raise ArgumentError(f"{name} and {other} must have one shape, got {z.shape} and {s.shape}")
    return z, s
