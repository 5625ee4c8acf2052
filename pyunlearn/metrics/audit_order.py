"""Which examples to audit first, where there are more than time: a small regressor learns from what has been audited."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from pyunlearn.errors import ArgumentError
from pyunlearn.metrics._arrays import Floats, Integers, finite, same_length


class Audited(NamedTuple):
    """What a budget bought."""

    indices: Integers
    """(budget,) the examples, in the order in which they were audited."""
    values: Floats
    """(budget,) what the measurement gave for each."""


def audit_order(features: ArrayLike, audited: Sequence[int], values: ArrayLike, *, ridge: float = 4.0) -> Integers:
    """The examples that have not been audited, the one that is most likely still exposed first.

    Ridge regression of the values v on the features x, which are standardised over all examples, drawn to a prior that knows the first alone:

        w = argmin sum over the audited of (v_i - v_mean - w.(x_i - x_mean))^2 + ridge ||w - w_0||^2,   w_0 = (-s, 0, 0, ...)

    with s the standard deviation of the values, or 1 before there is any. The order is that of w.x, falling.

    Args:
        features: (n, F) cheap numbers of each example: NLL, zlib ratio, length, density, difficulty. The first is the prior's: the lower,
            the more exposed, so let it be the NLL under the model that is audited.
        audited: the k places that have been.
        values: (k,) what was found there; high = exposed (exposure, extraction strength).
        ridge: above 0; how many examples the prior weighs.

    Returns:
        (n - k,) places; equals stay in order.

    Raises:
        ArgumentError: features or values that are not finite, a place that does not exist or stands there twice, a ridge not above 0.

    Source: a reduced form of learned active learning, Bakker et al. 2023, arXiv 2309.05477: a regressor in place of its neural process.
    """
    x = finite(features, "features", dimensions=2)
    done = np.asarray(audited, dtype=np.int64)
    if len(set(done.tolist())) != done.size or (done < 0).any() or (done >= len(x)).any():
        raise ArgumentError(f"audited must be different places from 0 to {len(x) - 1}, and is {done.tolist()}.")
    if not ridge > 0:
        raise ArgumentError(f"ridge must be above 0, and is {ridge}.")
    found = finite(values, "values", dimensions=1) if done.size else np.empty(0)
    same_length(done, found, "audited and values")
    spread = x.std(axis=0)
    z = (x - x.mean(axis=0)) / np.where(spread > 0, spread, 1)
    weights = np.zeros(z.shape[1])
    weights[0] = -(found.std() if done.size and np.ptp(found) > 0 else 1.0)
    if done.size:
        seen = z[done] - z[done].mean(axis=0)
        surprise = seen.T @ (found - found.mean() - seen @ weights)
        weights = weights + np.linalg.solve(seen.T @ seen + ridge * np.eye(len(weights)), surprise)
    expected = z @ weights
    rest = np.setdiff1d(np.arange(len(x)), done)
    return rest[np.argsort(-expected[rest], kind="stable")]


def audit_within(
    measure: Callable[[list[int]], ArrayLike], features: ArrayLike, budget: int, *, batch: int = 8, ridge: float = 4.0
) -> Audited:
    """Audits `budget` examples, a batch at a time, each batch chosen by what those before it showed.

    Args:
        measure: takes places and returns the value of each, high = exposed: the expensive part, decoding say.
        features, ridge: as in `audit_order`.
        budget: examples to audit, 1 or more; more than there are means all.
        batch: examples between two fits.

    Returns:
        Audited. What it finds is exposed; what it has not looked at may be as well. Its share of exposed examples is *not* that of the set:
        they were chosen to be exposed. For that, audit a random sample.

    Raises:
        ArgumentError: as `audit_order`; a budget or batch below 1.
    """
    x = finite(features, "features", dimensions=2)
    if budget < 1 or batch < 1:
        raise ArgumentError(f"budget and batch must be at least 1 example, and are {budget} and {batch}.")
    places: list[int] = []
    values: list[float] = []
    while len(places) < min(budget, len(x)):
        chosen = audit_order(x, places, values, ridge=ridge)[: min(batch, budget - len(places))].tolist()
        found: Any = finite(measure(chosen), "what measure returned", dimensions=1)
        same_length(chosen, found, "the places measured and the values returned")
        places += chosen
        values += found.tolist()
    return Audited(np.array(places), np.array(values))
