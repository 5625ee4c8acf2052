"""The examples in the docstrings of the package run, and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import pyunlearn

MODULES = sorted(
    m.name for m in pkgutil.walk_packages(pyunlearn.__path__, "pyunlearn.") if not m.name.endswith((".__main__", "._C"))
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_run(name):
    """Each prints what stands behind it."""
    assert doctest.testmod(importlib.import_module(name)).failed == 0
