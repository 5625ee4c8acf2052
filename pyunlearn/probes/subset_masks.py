"""Random halves of a training set for several models: each example is in some of them and out of the others."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pyunlearn.errors import ArgumentError
from pyunlearn.options import Number, Whole, require

Booleans = NDArray[np.bool_]


def subset_masks(examples: int, *, count: int, fraction: float = 0.5, seed: int = 0) -> Booleans:
    """Draw the training set of each of `count` models: each example is in exactly round(count * fraction) of them.

    So every example is in and out at least once, and all have the same precision; the subsets' sizes differ a little.

    Args:
        examples: n, 1 or more.
        count: K models, 2 or more.
        fraction: of the models that train on an example; it must leave one in and one out. The source has 0.25 of 400.
        seed: seed of the draw.

    Returns:
        (K, n) bool.

    Raises:
        ArgumentError: no example, or a count and fraction that leave an example in no model or in every one.

    >>> subset_masks(5, count=4, fraction=0.5).sum(axis=0)
    array([2, 2, 2, 2, 2])
    """
    require(Whole(1), examples=examples, count=count)
    require(Number(0, 1), fraction=fraction)
    require(Whole(0), seed=seed)
    inside = round(count * fraction)
    if not 1 <= inside <= count - 1:
        raise ArgumentError(
            f"fraction must leave each example in at least one model and out of one: of {count} models {fraction} is "
            f"{inside}"
        )
    rng = np.random.default_rng(seed)
    return rng.permuted(np.arange(count)[:, None] < np.full((1, examples), inside), axis=0)
