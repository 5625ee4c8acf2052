"""The one place where a metric's numbers are checked and brought to float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyunlearn.errors import ArgumentError

Floats = NDArray[np.float64]


def numbers(name: str, values: ArrayLike, *, least: int = 0) -> Floats:
    """(n,) finite float64 of anything array-like; one number is an array of one. Raises ArgumentError."""
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ArgumentError(f"{name} must be numbers, one for each text, got {_say(values)}") from None
    if found.ndim > 1:
        raise ArgumentError(f"{name} must be one number for each text, shape (n,), got shape {found.shape}")
    found = found.reshape(-1)
    if found.size < least:
        raise ArgumentError(f"{name} must hold {least} numbers or more, got {found.size}")
    if not np.isfinite(found).all():
        raise ArgumentError(f"{name} must be finite, got NaN or Inf: leave out the texts that the model cannot score")
    return found


def same_length(first: str, a: NDArray[np.float64], second: str, b: NDArray[np.float64]) -> None:
    """Raises ArgumentError unless both hold one number for each of the same texts."""
    if len(a) != len(b):
        raise ArgumentError(
            f"{first} and {second} must hold one number for each of the same texts, got {len(a)} and {len(b)}"
        )


def between(name: str, value: float, low: float, high: float) -> None:
    """Raises ArgumentError unless low < value < high."""
    if not low < value < high:
        raise ArgumentError(f"{name} must lie between {low:g} and {high:g}, got {value!r}")


def one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises ArgumentError unless value is one of the choices."""
    if value not in choices:
        raise ArgumentError(
            f"{name} must be {', '.join(repr(c) for c in choices[:-1])} or {choices[-1]!r}, got {value!r}"
        )


def _say(values: object) -> str:
    return values if isinstance(values, str) else type(values).__name__


def texts_of_tokens(name: str, values: Sequence[ArrayLike] | ArrayLike) -> list[Floats]:
    """(T_i,) finite float64 for each text; one text alone is a list of one. Raises ArgumentError."""
    rows = list(values) if isinstance(values, Sequence | np.ndarray) else [values]
    if rows and all(np.ndim(row) == 0 for row in rows):
        rows = [rows]
    found = [numbers(f"{name}[{i}]", row) for i, row in enumerate(rows)]
    for i, row in enumerate(found):
        if row.size == 0:
            raise ArgumentError(f"{name}[{i}] has no token: leave the text out")
    return found
