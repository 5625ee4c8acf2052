"""Checks of the metrics' inputs: conversion to arrays, and an error message of one sentence for invalid ones."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence, Sized
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyunlearn.errors import ArgumentError, brief

Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]
Integers = NDArray[np.int64]


def as_floats(name: str, values: ArrayLike) -> Floats:
    """Return values as float64, any shape.

    Raises:
        ArgumentError: no numbers, rows of different lengths, a tensor that numpy cannot read.
    """
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ArgumentError(
            f"{name} must be numbers in an array, which numpy could not make of this {type(values).__name__}: make "
            "rows equally long, and pass a tensor as .detach().float().cpu()"
        ) from None


def numbers(name: str, values: ArrayLike, *, empty: bool = True) -> Floats:
    """Return values as (n,) finite float64; one number becomes an array of one.

    Raises:
        ArgumentError: no numbers, more than one dimension, NaN or Inf, or nothing where `empty` is False.
    """
    array = as_floats(name, values)
    if array.ndim > 1:
        raise ArgumentError(f"{name} must be one number for each text, shape (n,), got shape {array.shape}")
    array = array.reshape(-1)
    if not empty and array.size == 0:
        raise ArgumentError(f"{name} must hold at least one number, got none")
    if not np.isfinite(array).all():
        raise ArgumentError(f"{name} must be finite, got NaN or Inf: leave out the texts that the model cannot score")
    return array


def finite(name: str, values: ArrayLike, *, dimensions: int) -> Floats:
    """Return values as finite float64 with this number of dimensions.

    Raises:
        ArgumentError: another number of dimensions, no number, NaN or Inf.
    """
    array = as_floats(name, values)
    if array.ndim != dimensions:
        raise ArgumentError(f"{name} must have {dimensions} dimension(s), got shape {array.shape}")
    if array.size == 0:
        raise ArgumentError(f"{name} must hold at least one number, got none")
    if not np.isfinite(array).all():
        raise ArgumentError(f"{name} must be finite, got {int((~np.isfinite(array)).sum())} NaN or Inf")
    return array


def truths(name: str, values: ArrayLike, *, dimensions: int = 1) -> Booleans:
    """Return values as booleans; 0 and 1 are accepted.

    Raises:
        ArgumentError: any other value, another number of dimensions, or no value.
    """
    array = as_floats(name, values)
    if array.ndim != dimensions or array.size == 0:
        raise ArgumentError(f"{name} must be {dimensions}-dimensional and not empty, got shape {array.shape}")
    if not np.isin(array, (0, 1)).all():
        raise ArgumentError(f"{name} must hold true and false, or 1 and 0, got other values")
    return array.astype(np.bool_)


def log_likelihoods(name: str, values: ArrayLike) -> Floats:
    """Return values as float64, any shape; -inf, a probability of 0, is accepted.

    Raises:
        ArgumentError: NaN or a value above 0.
    """
    array = as_floats(name, values)
    if np.isnan(array).any() or (array > 0).any():
        raise ArgumentError(f"{name} must be log-likelihoods in nats, 0 or less, got NaN or a value above 0")
    return array


def texts_of_tokens(name: str, values: Sequence[ArrayLike] | ArrayLike) -> list[Floats]:
    """Return (T_i,) finite float64 for each text; one text alone becomes a list of one.

    Raises:
        ArgumentError: a text without tokens, NaN or Inf.
    """
    rows = list(values) if isinstance(values, Sequence | np.ndarray) else [values]
    if rows and all(np.ndim(row) == 0 for row in rows):
        rows = [rows]
    texts = [numbers(f"{name}[{i}]", row) for i, row in enumerate(rows)]
    for i, row in enumerate(texts):
        if row.size == 0:
            raise ArgumentError(f"{name}[{i}] has no token: leave the text out")
    return texts


def tokens_of_text(name: str, values: Any) -> list[Hashable]:
    """Return the tokens of one text as a list; those of an array or a tensor as numbers.

    Entries of a tensor are objects that equal nothing else as keys: each would count as a token of its own.

    Raises:
        ArgumentError: something else, such as the tokens of several texts.

    Example:
        >>> tokens_of_text("tokens", np.array([7, 7]))
        [7, 7]
    """
    plain = values.tolist() if hasattr(values, "tolist") else values
    tokens = [x.tolist() if hasattr(x, "tolist") else x for x in plain] if isinstance(plain, Sequence) else None
    if tokens is None or not all(isinstance(x, Hashable) for x in tokens):
        raise ArgumentError(
            f"{name} must be the tokens of one text, a sequence of ids or words, got another {type(values).__name__}: "
            "pass one row of a batch at a time"
        )
    return tokens


def same_length(first: str, a: Sized, second: str, b: Sized) -> None:
    """Raise ArgumentError unless both have one entry for each of the same texts."""
    if len(a) != len(b):
        raise ArgumentError(
            f"{first} and {second} must hold one entry for each of the same texts, got {len(a)} and {len(b)}"
        )


def between(name: str, value: float, low: float, high: float) -> None:
    """Raise ArgumentError unless low < value < high."""
    if not (isinstance(value, Real) and low < value < high):
        raise ArgumentError(f"{name} must lie between {low:g} and {high:g}, got {value!r}")


def at_least_one(**values: int) -> None:
    """Raise ArgumentError for the first argument that is below 1 or no whole number."""
    for name, value in values.items():
        if not isinstance(value, Integral):
            raise ArgumentError(f"{name} must be a whole number, 1 or more, got {brief(value)}")
        if value < 1:
            raise ArgumentError(f"{name} must be 1 or more, got {value}")


def lists_of_texts(**values: object) -> None:
    """Raise ArgumentError for the first argument that is no list of texts: the characters of a string are none."""
    for name, value in values.items():
        if isinstance(value, str):
            raise ArgumentError(f"{name} must be a list of texts, got one string")
        if not isinstance(value, Collection) or not all(isinstance(text, str) for text in value):
            raise ArgumentError(
                f"{name} must be a list of texts, got a {type(value).__name__} with entries that are no texts"
            )


def one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ArgumentError unless value is one of the choices."""
    if value not in choices:
        raise ArgumentError(
            f"{name} must be {', '.join(repr(c) for c in choices[:-1])} or {choices[-1]!r}, got {value!r}"
        )
