"""Order of an audit: a ridge regression learns from the audited examples which ones to audit next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from pyunlearn.errors import ArgumentError
from pyunlearn.metrics._check import Floats, Integers, at_least_one, finite, same_length


class Audited(NamedTuple):
    """Examples audited within a budget, and their values."""

    indices: Integers
    """(budget,) index of each audited example, in the order of the audit."""
    values: Floats
    """(budget,) the measured value of each."""


def audit_order(features: ArrayLike, audited: Sequence[int], values: ArrayLike, *, ridge: float = 4.0) -> Integers:
    """Rank the examples that have not been audited, the one most likely still exposed first.

    Ridge regression of the values v on the features x, standardised over all examples, shrunk towards a prior that
    uses the first feature alone:

        w = argmin sum over the audited of (v_i - v_mean - w.(x_i - x_mean))^2 + ridge ||w - w_0||^2,
        w_0 = (-s, 0, 0, ...)

    with s the standard deviation of the values, or 1 before there are any. The order is that of w.x, descending.

    Args:
        features: (n, F) cheap numbers of each example: NLL, zlib ratio, length. The first is the prior's, low =
            exposed: take the NLL under the audited model.
        audited: k indices of audited examples.
        values: (k,) their measured values; high = exposed (exposure, extraction strength).
        ridge: above 0; how many examples the prior weighs.

    Returns:
        (n - k,) indices; ties stay in order.

    Raises:
        ArgumentError: NaN or Inf, an index that is out of range or repeated, a ridge that is not above 0.

    Example:
        >>> audit_order([[3.0], [1.0], [2.0]], audited=[], values=[]).tolist()
        [1, 2, 0]

    Source: a reduced form of learned active learning, Bakker et al. 2023, arXiv 2309.05477: a regression in place of
        its neural process.
    """
    x = finite("features", features, dimensions=2)
    done = np.asarray(audited, dtype=np.int64)
    if len(set(done.tolist())) != done.size or (done < 0).any() or (done >= len(x)).any():
        raise ArgumentError(f"audited must be different indices from 0 to {len(x) - 1}, got {done.tolist()}")
    if not ridge > 0:
        raise ArgumentError(f"ridge must be above 0, got {ridge!r}")
    measured = finite("values", values, dimensions=1) if done.size else np.empty(0)
    same_length("audited", done, "values", measured)
    spread = x.std(axis=0)
    z = (x - x.mean(axis=0)) / np.where(spread > 0, spread, 1)  # (n, F)
    weights = np.zeros(z.shape[1])
    weights[0] = -(measured.std() if done.size and np.ptp(measured) > 0 else 1.0)
    if done.size:
        seen = z[done] - z[done].mean(axis=0)  # (k, F)
        surprise = seen.T @ (measured - measured.mean() - seen @ weights)
        weights = weights + np.linalg.solve(seen.T @ seen + ridge * np.eye(len(weights)), surprise)
    expected = z @ weights
    rest = np.setdiff1d(np.arange(len(x)), done)
    return rest[np.argsort(-expected[rest], kind="stable")]


def audit_within(
    measure: Callable[[list[int]], ArrayLike], features: ArrayLike, budget: int, *, batch: int = 8, ridge: float = 4.0
) -> Audited:
    """Audit `budget` examples in batches, each batch chosen by a regression on the values measured before it.

    Args:
        measure: a function of indices that returns the value of each, high = exposed: the expensive part.
        features: (n, F) cheap numbers of each example, the first low = exposed (NLL), the others of any kind.
        budget: examples to audit, 1 or more; all of them where there are fewer.
        batch: examples between two fits.
        ridge: above 0; how many examples the prior, which uses the first feature alone, weighs.

    Returns:
        Audited(indices, values). Examples that were not audited may be exposed as well. The exposed share of the
        audited is *not* that of the set, because they were chosen to be exposed: for that, audit a random sample.

    Raises:
        ArgumentError: NaN or Inf, another number of values than of indices, a budget or batch below 1.

    Example:
        >>> strength = [0.1, 0.9, 0.5, 0.0]
        >>> nll = [[3.0], [1.0], [2.0], [4.0]]
        >>> audit_within(lambda indices: [strength[i] for i in indices], nll, budget=2, batch=1).indices.tolist()
        [1, 2]

    Source: ours; the order in a batch after Bakker et al. 2023, arXiv 2309.05477.
    """
    x = finite("features", features, dimensions=2)
    at_least_one(budget=budget, batch=batch)
    indices: list[int] = []
    values: list[float] = []
    while len(indices) < min(budget, len(x)):
        chosen = audit_order(x, indices, values, ridge=ridge)[: min(batch, budget - len(indices))].tolist()
        measured = finite("the values that measure returns", measure(chosen), dimensions=1)
        same_length("the indices", chosen, "the values that measure returns", measured)
        indices += chosen
        values += measured.tolist()
    return Audited(np.array(indices), np.array(values))
