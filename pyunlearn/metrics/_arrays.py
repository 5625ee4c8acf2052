"""What several metrics ask of the arrays that they are given."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyunlearn.errors import ArgumentError

Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]
Integers = NDArray[np.int64]


def finite(values: ArrayLike, name: str, *, dimensions: int | None = None) -> Floats:
    """`values` as float64. Raises ArgumentError when it is empty, holds NaN or Inf, or has another number of dimensions."""
    found = np.asarray(values, dtype=np.float64)
    if dimensions is not None and found.ndim != dimensions:
        raise ArgumentError(f"{name} must have {dimensions} dimension(s), and has the shape {found.shape}.")
    if found.size == 0:
        raise ArgumentError(f"{name} must hold at least one number, and is empty.")
    if not np.isfinite(found).all():
        raise ArgumentError(f"{name} must be finite, and holds {int((~np.isfinite(found)).sum())} NaN or Inf.")
    return found


def truths(values: ArrayLike, name: str, *, dimensions: int = 1) -> Booleans:
    """`values` as booleans; 0 and 1 will do. Raises ArgumentError for anything else, and when it is empty."""
    found = np.asarray(values)
    if found.ndim != dimensions or found.size == 0:
        raise ArgumentError(f"{name} must be {dimensions}-dimensional and not empty, and has the shape {found.shape}.")
    if found.dtype != np.bool_ and not np.isin(found, (0, 1)).all():
        raise ArgumentError(f"{name} must hold true and false, or 1 and 0, and holds other values.")
    return found.astype(np.bool_)


def same_length(a: object, b: object, names: str) -> None:
    """Raises ArgumentError unless both have as many rows."""
    n, m = len(a), len(b)  # type: ignore[arg-type]
    if n != m:
        raise ArgumentError(f"{names} must be equally many, and are {n} and {m}.")


def log_likelihoods(values: ArrayLike, name: str) -> Floats:
    """`values` as float64. Raises ArgumentError when one is NaN or above 0; -inf, a probability of 0, passes."""
    found = np.asarray(values, dtype=np.float64)
    if np.isnan(found).any() or (found > 0).any():
        raise ArgumentError(f"{name} must be log-likelihoods in nats, 0 or less, and holds NaN or a value above 0.")
    return found


def first(places: ArrayLike, most: int = 5) -> str:
    """The first places that are true, as an error names them: '3, 7, 8 and 12 more'."""
    found = np.flatnonzero(places)
    rest = f" and {found.size - most} more" if found.size > most else ""
    return ", ".join(map(str, found[:most])) + rest
