"""The worked example of docs/contributing/add-an-edit.md: its code runs, and the registry takes its row."""

import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
from test_edits import adapted, check_undone, gpt2, llama, narrow, weights
from test_edits_arguments import refusal, wrong_values

from pyunlearn import edits
from pyunlearn.edits import EDITS, Edit
from pyunlearn.edits.registry import edit_named, parse_edit_options

pytestmark = pytest.mark.usefixtures("one_thread")

DOCUMENT = Path(__file__).parent.parent / "docs" / "contributing" / "add-an-edit.md"


@pytest.fixture
def example(tmp_path, monkeypatch):
    """(the edit's row, the test's code): the edit is in the package for a while."""
    source, row, test = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "signed_step.py").write_text(source, encoding="utf-8")
    monkeypatch.setattr(edits, "__path__", [*edits.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "pyunlearn.edits.signed_step", raising=False)
    edit = eval(row, {"Edit": Edit})
    monkeypatch.setitem(EDITS, edit.name, edit)
    return edit, test


@pytest.mark.parametrize("make_pair", [llama, gpt2, narrow, adapted])
def test_the_example_s_test_passes(example, make_pair):
    """The document's test runs on every kind of model."""
    edit, test = example
    tokenizer, make, rows = make_pair()
    torch.manual_seed(0)
    names = {"weights": weights, "check_undone": check_undone, "signed_step": edit.function}
    exec(compile(test, str(DOCUMENT), "exec"), names)
    names["test_a_signed_step_is_its_formula"]((make(len(tokenizer)).train(), tokenizer, rows))


def test_the_example_s_arguments_are_checked_and_read(example):
    """Wrong values are refused like those of the other edits; words become options."""
    edit, _ = example
    assert edit_named("signed-step") is edit
    assert edit.options == {"rate": 1e-4}
    assert parse_edit_options(edit, ["rate=0.01"]) == {"rate": 0.01}
    assert "batch_size: Texts in one forward pass." in edit.function.__doc__
    tokenizer, make, rows = llama()
    arguments = {"model": make(len(tokenizer)), "forget": rows, "retain": rows, "tokenizer": tokenizer}
    for name, parameter in inspect.signature(edit.function).parameters.items():
        for value in wrong_values(edit.name, name, parameter):
            assert name in refusal(edit.function, arguments, **{name: value})


def test_the_example_is_a_page():
    """The document has ninety lines or fewer, none longer than 120."""
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 90
    assert max(map(len, lines)) <= 120
