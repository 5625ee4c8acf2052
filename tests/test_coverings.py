"""Pairwise coverings of parameter grids, and which cases of a grid run by default."""

import itertools
import math
import pathlib
from types import SimpleNamespace

import conftest
import pytest
from coverings import covering, grid, in_full
from hypothesis import given
from hypothesis import strategies as st


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=7))
def test_every_pair_occurs(sizes):
    """Every pair of values of any two axes, and every value of an only axis, occurs in one parameter set at least."""
    axes = {f"axis{at}": range(size) for at, size in enumerate(sizes)}
    rows = covering(**axes)
    assert all(list(row) == list(axes) for row in rows)
    for a, b in itertools.combinations(axes, 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(axes[a], axes[b]))
    for name, axis in axes.items():
        assert {row[name] for row in rows} == set(axis)
    assert len({tuple(row.values()) for row in rows}) == len(rows)


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_deterministic(sizes):
    """Two calls give the same parameter sets in the same order, so that every process collects the same tests."""
    axes = {f"axis{at}": range(size) for at, size in enumerate(sizes)}
    assert covering(**axes) == covering(**axes)


@pytest.mark.parametrize(
    ("sizes", "most"), [((4, 2, 3, 2, 3, 2), 14), ((2, 2, 3, 2, 2, 2, 2), 10), ((4, 4, 4, 4), 24), ((3, 3, 3), 11)]
)
def test_far_smaller_than_the_product(sizes, most):
    """The covering stays near the product of the two longest axes, which no covering can go below."""
    rows = covering(**{f"axis{at}": range(size) for at, size in enumerate(sizes)})
    assert math.prod(sorted(sizes)[-2:]) <= len(rows) <= most <= math.prod(sizes) / 2


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=7))
def test_strength_1(sizes):
    """With strength 1 every value of every axis occurs, in as few parameter sets as the longest axis has values."""
    axes = {f"axis{at}": range(size) for at, size in enumerate(sizes)}
    rows = covering(strength=1, **axes)
    assert len(rows) == max(sizes)
    assert all({row[name] for row in rows} == set(axis) for name, axis in axes.items())


def test_corners():
    """A corner, complete or not, occurs in the covering, and a named axis gives its values."""
    axes = {"a": range(4), "b": {"low": -1, "high": 1}, "c": [None, 2.5], "d": range(4)}
    corners = [{"a": 3, "b": 1, "c": 2.5, "d": 3}, {"b": -1, "c": None, "d": 2}]
    rows = covering(*corners, **axes)
    for corner in corners:
        assert any(corner.items() <= row.items() for row in rows)


def test_a_corner_off_the_grid_is_an_error():
    """A corner with a value that its axis lacks raises, instead of being dropped."""
    with pytest.raises(ValueError, match="not in list"):
        covering({"a": 7}, a=range(3), b=range(2))


def test_grid_is_the_full_product(monkeypatch):
    """grid holds every case once, with a readable id, and marks exactly the pairwise covering as such."""
    monkeypatch.setenv("WHOLE_GRIDS", "1")
    axes = {"a": [1, 2, 3], "b": {"low": -1, "high": 1}, "c": [None, (2, 3)], "backend": ["compiled", "reference"]}
    corner = {"a": 3, "b": -1, "c": None, "backend": "reference"}
    _, cases = (mark := grid(corner, **axes).mark).args
    assert mark.args[0] == list(axes)
    assert mark.kwargs["indirect"] == ["backend"]
    assert [case.values for case in cases] == list(itertools.product([1, 2, 3], [-1, 1], *list(axes.values())[2:]))
    assert cases[0].id == "1-low-None-compiled"
    assert cases[3].id == "1-low-2x3-reference"
    assert all(case.marks[0].name == "full" for case in cases)
    covered = [dict(zip(axes, case.values, strict=True)) for case in cases if case.marks[0].kwargs["covering"]]
    assert sorted(map(str, covered)) == sorted(map(str, covering(corner, **axes)))
    assert corner in covered


class Item:
    """A collected test with the given marks, as far as conftest looks at it."""

    path = pathlib.Path("test_x.py")

    def __init__(self, *marks):
        self.marks = {mark.name: mark for mark in marks}

    def get_closest_marker(self, name):
        """Return the mark of that name, or None."""
        return self.marks.get(name)


def test_a_run_that_does_not_ask_for_full_makes_the_covering_alone(monkeypatch):
    """With WHOLE_GRIDS=0 the cases are those of the covering, in the same order."""
    axes = {"a": [1, 2, 3], "b": [1, 2, 3], "c": [1, 2, 3]}
    monkeypatch.setenv("WHOLE_GRIDS", "1")
    _, whole = grid(**axes).mark.args
    monkeypatch.setenv("WHOLE_GRIDS", "0")
    _, part = grid(**axes).mark.args
    assert [case.id for case in part] == [case.id for case in whole if case.marks[0].kwargs["covering"]]
    assert len(part) < len(whole)


@pytest.mark.parametrize(("expression", "rest_runs"), [("", False), ("not real_model", False), ("full", True)])
def test_what_runs_by_default(expression, rest_runs):
    """Without `full` in -m, cases outside the covering are deselected; with it, none; other tests always run."""
    covered, rest, plain = Item(pytest.mark.full(covering=True)), Item(pytest.mark.full(covering=False)), Item()
    items, deselected = [covered, rest, plain], []
    hook = SimpleNamespace(pytest_deselected=lambda items: deselected.extend(items))
    conftest.pytest_collection_modifyitems(SimpleNamespace(getoption=lambda name: expression, hook=hook), items)
    assert items == ([covered, rest, plain] if rest_runs else [covered, plain])
    assert deselected == ([] if rest_runs else [rest])


def test_cases_in_full_have_the_mark_and_are_in_no_covering():
    """Their values are single ones or tuples."""
    single, pair = in_full("a", ("b", 2))
    assert (single.values, pair.values) == (("a",), ("b", 2))
    assert [(mark.name, mark.kwargs) for case in (single, pair) for mark in case.marks] == [("full", {})] * 2
