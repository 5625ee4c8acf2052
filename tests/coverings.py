"""Pairwise coverings of parameter grids: the cases of a grid test that run by default."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping

import pytest
import torch

FIXTURES = {"device", "backend"}  # axes of these names go to the fixtures of conftest.py
BACKENDS = ("compiled", "reference")


def covering(*corners, strength=2, **axes):
    """Return parameter sets in which all values of any `strength` axes meet in every combination, as a list of dicts.

    With the default strength of 2 every pair of values of any two axes occurs; with 1, every value of every axis. The
    sets are the same in every call. `axes` maps each name to its values, or to {id: value}. Each corner, a dict that
    names values of some axes, occurs in one set at least. The number of sets is near the product of the `strength`
    longest axes, where the full product multiplies all of them.

    >>> covering(dtype=["float32", "bfloat16"], bias=[False, True], strength=1)
    [{'dtype': 'float32', 'bias': False}, {'dtype': 'bfloat16', 'bias': True}]
    """
    values = {name: _values(axis) for name, axis in axes.items()}
    rows = _cover({name: len(axis) for name, axis in values.items()}, _indices(corners, values), strength)
    return [{name: values[name][at] for name, at in row.items()} for row in rows]


def grid(*corners, strength=2, **axes):
    """Parametrize a test with the full product of `axes`, of which only a covering runs by default.

    Every case carries the mark `full`, by which `pytest -m full` selects it. Those of the covering, pairwise unless
    `strength` is 1, carry `full(covering=True)`; tests/conftest.py deselects the others unless the run asks for `full`.
    The covering contains each corner, see `covering`. An axis named `device` or `backend` replaces the parameters of
    that fixture. Where conftest.py has set WHOLE_GRIDS=0, because the run does not ask for `full`, the other cases are
    not even made: collecting them would take longer than running the covering.
    """
    values = {name: _values(axis) for name, axis in axes.items()}
    names = {name: _names(axis) for name, axis in axes.items()}
    sizes = {name: len(axis) for name, axis in values.items()}
    covered = {tuple(row.values()) for row in _cover(sizes, _indices(corners, values), strength)}
    cases = [
        pytest.param(
            *(values[name][at] for name, at in zip(sizes, row, strict=True)),
            marks=pytest.mark.full(covering=row in covered),
            id="-".join(names[name][at] for name, at in zip(sizes, row, strict=True)),
        )
        for row in itertools.product(*map(range, sizes.values()))
        if row in covered or os.environ.get("WHOLE_GRIDS") != "0"
    ]
    return pytest.mark.parametrize(list(sizes), cases, indirect=sorted(FIXTURES & set(sizes)))


def in_full(*cases):
    """Return cases of a parametrization, values or tuples of them, that run with `pytest -m full` alone."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.full) for case in cases]


def slow(*cases):
    """Return cases, as `in_full`, that take so long that CI leaves them out on a slow machine."""
    marks = [pytest.mark.full, pytest.mark.slow]
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks) for case in cases]


def _values(axis):
    """Return the values of an axis as a list."""
    return list(axis.values()) if isinstance(axis, Mapping) else list(axis)


def _names(axis):
    """Return the id of each value of an axis."""
    return [str(name) for name in axis] if isinstance(axis, Mapping) else [_name(value) for value in axis]


def _name(value):
    """Return a readable id of a value."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return ",".join(f"{key}={_name(item)}" for key, item in value.items()) or "no_options"
    if isinstance(value, tuple):
        return "x".join(map(_name, value)) or "()"
    return getattr(value, "__name__", None) or str(value)


def _indices(corners, values):
    """Return the corners with each value replaced by its index on its axis."""
    return [{name: values[name].index(value) for name, value in corner.items()} for corner in corners]


def _cover(sizes, corners, strength):
    """Return rows {axis: index} that cover every combination, made greedily: each takes the first that is missing.

    The other axes of a row are filled one by one with the value that covers most missing combinations; of equal ones,
    with the one used least so far, so that single values are spread evenly.
    """
    strength = min(strength, len(sizes))
    missing = dict.fromkeys(
        frozenset(zip(names, at, strict=True))
        for names in itertools.combinations(sizes, strength)
        for at in itertools.product(*(range(sizes[name]) for name in names))
    )
    used = dict.fromkeys(((name, at) for name, size in sizes.items() for at in range(size)), 0)
    rows, corners = [], list(corners)
    while corners or missing:
        row = dict(corners.pop(0) if corners else sorted(next(iter(missing))))
        for name in sizes:
            if name not in row:
                items = [(name, at) for at in range(sizes[name])]
                row[name] = min(items, key=lambda item: _rank(item, row, missing, used, strength))[1]
        for items in itertools.combinations(row.items(), strength):
            missing.pop(frozenset(items), None)
        for item in row.items():
            used[item] += 1
        row = {name: row[name] for name in sizes}
        if row not in rows:
            rows.append(row)
    return rows


def _rank(item, row, missing, used, strength):
    """Return the sort key of a value for an unfilled axis: first the one that covers most missing combinations."""
    covered = sum(frozenset({item, *rest}) in missing for rest in itertools.combinations(row.items(), strength - 1))
    return -covered, used[item], item[1]
