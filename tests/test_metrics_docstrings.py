"""Docstrings of pyunlearn.metrics: every public function states arguments and results, and has an example that runs."""

import doctest
import importlib.util
import inspect
import sys

import pytest

from pyunlearn import metrics

FUNCTIONS = [name for name in metrics.__all__ if inspect.isfunction(getattr(metrics, name))]
NEEDS = {"rouge_l": "rouge_score", "bleu": "sacrebleu"}
FRAGMENTS = ("What", "Whether", "Of", "Those", "That", "How", "Where", "As", "By", "Beside", "So", "See")


def failures(name):
    """Run the examples of a function's docstring in its module; return the number of examples and what failed."""
    function, report = getattr(metrics, name), []
    runner = doctest.DocTestRunner(verbose=False)
    (test,) = doctest.DocTestFinder(recurse=False).find(
        function, name, globs=dict(vars(sys.modules[function.__module__]))
    )
    runner.run(test, out=report.append)
    return len(test.examples), report


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_example_of_a_public_function_runs(name):
    """Each docstring has an example, and it prints what it shows."""
    count, report = failures(name)
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"needs {NEEDS[name]}")
    assert count, f"{name} has no example"
    assert not report, "".join(report)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_states_arguments_results_and_errors(name):
    """Args names every parameter, and Returns is there; the first word is a verb in the imperative."""
    function = getattr(metrics, name)
    text = inspect.getdoc(function)
    args = text.split("Args:\n")[1].split("\n\n")[0]
    assert all(f"    {parameter}: " in args for parameter in inspect.signature(function).parameters)
    assert "Returns:\n" in text
    assert "Raises:\n" in text or name == "verbatim_match"


@pytest.mark.parametrize("name", metrics.__all__)
def test_no_docstring_begins_with_a_fragment(name):
    """A constant has no docstring of its own; a class starts with a noun, a function with a verb."""
    thing = getattr(metrics, name)
    if inspect.isclass(thing) or inspect.isfunction(thing):
        assert inspect.getdoc(thing).split()[0] not in FRAGMENTS


def test_a_wrong_example_is_noticed(monkeypatch):
    """The check compares the output: an example that shows another number fails."""
    text = metrics.loss_score.__doc__
    monkeypatch.setattr(metrics.loss_score, "__doc__", text.replace("[0.5, 3.0]", "[0.5, 3.5]"))
    count, report = failures("loss_score")
    assert (count, len(report)) == (1, 1)
