"""Wrong arguments of the edits: each is refused in one sentence that names it, before a text is scored."""

import copy
import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_edits import gpt2, same, weights

from pyunlearn import edits
from pyunlearn.edits import EDITS, calibrate_by_mixing, saliency_mask
from pyunlearn.edits.base import Editing
from pyunlearn.edits.config import EditConfig
from pyunlearn.errors import ArgumentError, DataError, ModelError

pytestmark = pytest.mark.usefixtures("one_thread")

NO_NUMBERS = [True, np.True_, "3", b"3", [3], math.inf, math.nan, -1, object()]
NEVER = {
    "float": NO_NUMBERS,
    "int": [*NO_NUMBERS, 1.5],
    "bool": [0, 1, "yes", "true", np.True_],
    "str": ["nonsense", "", 3, True, ["nonsense"]],
}
NEVER_NAMED: dict[str, list[Any]] = {
    "model": [3, None, "", ["a"], torch.nn.Linear(2, 2)],
    "forget": [3, [], [3], b"text"],
    "retain": [5, [], [None]],
    "tokenizer": [1, True, "", ["a"]],
    "progress": [3, "yes"],
    "config": [3, {"batch_size": 3}, True],
    "template": ["nonsense", "", 3, True, None, ["auto"]],
    "corrected": [5, [], [3]],
    "fine_tuned": [7, None, [1.0]],
    "unanswerable": ["why?", 3, [], [3], [""], True],
}
ZERO_ALLOWED = ("workspace", "seed", "layer", "second_order_influence's damping")


def wrong_values(edit, name, parameter):
    """Return values that an option never has, by its name or its annotation."""
    if name in NEVER_NAMED:
        return NEVER_NAMED[name] + ([None] if name == "forget" and parameter.default is parameter.empty else [])
    kind = str(parameter.annotation).removesuffix(" | None")
    values = NEVER[kind] + ([None] if kind == parameter.annotation else [])
    positive = kind in ("int", "float") and not {name, f"{edit}'s {name}"} & set(ZERO_ALLOWED)
    return values + ([0] if positive else [])


CASES = [
    pytest.param(edit, name, wrong_values(edit, name, parameter), id=f"{edit}-{name}")
    for edit, row in EDITS.items()
    for name, parameter in inspect.signature(row.function).parameters.items()
]


@pytest.fixture(scope="module")
def answering(one_thread):
    """A model, and arguments with which every edit would run."""
    tokenizer, make, _ = gpt2()
    torch.manual_seed(0)
    model, rows = make(len(tokenizer)), tiny.facts(5, 1)
    return {
        "model": model,
        "forget": rows[:2],
        "retain": rows[2:],
        "tokenizer": tokenizer,
        "fine_tuned": copy.deepcopy(model),
    }


@pytest.fixture
def no_pass(monkeypatch):
    """Fail where a text is scored: the arguments must be checked before."""

    def scored(self):
        raise AssertionError("a text was scored before the arguments were checked")

    monkeypatch.setattr(Editing, "nll", scored)


def call(function, arguments, **options):
    """Call an edit with those of the arguments that it has, and the options."""
    names = inspect.signature(function).parameters
    return function(**{name: value for name, value in arguments.items() if name in names} | options)


def refusal(function, arguments, **options):
    """The message of the error that a call raises."""
    try:
        call(function, arguments, **options)
    except (ArgumentError, DataError, ModelError) as error:
        return str(error)
    return pytest.fail(f"{function.__name__} accepted {options}")


@pytest.mark.parametrize(("edit", "name", "values"), CASES)
def test_a_wrong_value_is_one_sentence_that_names_the_argument(answering, no_pass, edit, name, values):
    """Every argument of every edit is tried; no text is scored and no weight changes."""
    before = weights(answering["model"])
    assert values
    for value in values:
        message = refusal(EDITS[edit].function, answering, **{name: value})
        assert name in message, message
        assert "\n" not in message, message
        assert len(message) < 400, message
    assert same(weights(answering["model"]), before)


@pytest.mark.parametrize("edit", EDITS)
def test_an_unknown_option_names_the_nearest(answering, no_pass, edit):
    """It is not ignored."""
    with pytest.raises(ArgumentError, match=f"{edit} has no option 'batchsize': did you mean \"batch_size\""):
        call(EDITS[edit].function, answering, batchsize=3)


@pytest.mark.parametrize("edit", [name for name, row in EDITS.items() if "retain" in row.needs])
def test_missing_retain_texts_are_named_before_a_text_is_scored(answering, no_pass, edit):
    """The registry's needs are those of the functions."""
    with pytest.raises(ArgumentError, match=f"{edit} needs retain texts, .*: pass retain="):
        call(EDITS[edit].function, answering | {"retain": None})


def test_a_config_is_the_same_as_its_keywords_and_a_keyword_comes_after(answering, tmp_path):
    """The same edit comes from keywords, a config, its file, and a keyword that overrides a config."""
    file = tmp_path / "edit.toml"
    file.write_text("batch_size = 1\nseed = 7\n", encoding="utf-8")
    step = EDITS["zero_shot_smoothing"].function
    made = []
    for options in (
        {"batch_size": 1, "seed": 7},
        {"config": EditConfig(batch_size=1, seed=7)},
        {"config": file},
        {"config": EditConfig(batch_size=1, seed=5), "seed": 7},
        {"seed": 8, "batch_size": 1},
    ):
        copied = copy.deepcopy(answering["model"])
        call(step, answering | {"model": copied}, samples=1, **options)
        made.append(weights(copied))
    assert same(made[0], made[1])
    assert same(made[0], made[2])
    assert same(made[0], made[3])
    assert not same(made[0], made[4])


@pytest.mark.parametrize("edit", EDITS)
def test_signature_and_help_list_the_shared_settings(edit):
    """Each setting has the default of EditConfig, and a line under Args."""
    function = EDITS[edit].function
    parameters = inspect.signature(function).parameters
    for name, option in EditConfig.options().items():
        assert parameters[name].default == getattr(EditConfig(), name)
        assert f"\n    {name}: {option.help}" in inspect.getdoc(function)
    assert "{options}" not in function.__doc__
    assert not set(EDITS[edit].options) & {"model", "forget", "retain", "config", "progress", *EditConfig.options()}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        *(({"share": value}, "share") for value in (*NO_NUMBERS, 0, 1.5, None)),
        *(({"batch_size": value}, "batch_size") for value in (0, 1.5, True, "8", None)),
        ({"truncate": 1}, "truncate"),
        ({"workspace": -1}, "workspace"),
        *(({"tokenizer": value}, "tokenizer") for value in NEVER_NAMED["tokenizer"]),
        *(({"forget": value}, "forget") for value in (*NEVER_NAMED["forget"], None)),
        *(({"model": value}, "model") for value in NEVER_NAMED["model"]),
    ],
)
def test_a_wrong_value_of_the_saliency_mask_is_one_sentence(answering, options, name):
    """The sentence names the argument."""
    with pytest.raises((ArgumentError, DataError, ModelError), match=name):
        call(saliency_mask, answering, **options)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        *(({"tau": value}, "tau") for value in (*NO_NUMBERS, 0, 1.5, None)),
        *(({"tolerance": value}, "tolerance") for value in (*NO_NUMBERS, 0, 1, None)),
        ({"metric": 3}, "metric"),
        ({"metric": lambda _: "much"}, "metric"),
        ({"metric": lambda _: None}, "metric"),
        ({"unlearned_model": 3}, "unlearned_model"),
        ({"original": 3}, "original"),
    ],
)
def test_a_wrong_value_of_the_calibration_is_one_sentence(answering, options, name):
    """The unlearned weights are unchanged then."""
    before = weights(answering["model"])
    arguments = {"original": answering["fine_tuned"], "unlearned_model": answering["model"], "metric": lambda _: 1.0}
    with pytest.raises((ArgumentError, ModelError), match=name):
        calibrate_by_mixing(**arguments | options)
    assert same(weights(answering["model"]), before)


def test_every_edit_is_in_the_package_the_registry_and_the_document():
    """The name in the package is the function in the registry's row, and docs/edits.md has a row for it."""
    text = (Path(__file__).parent.parent / "docs" / "edits.md").read_text(encoding="utf-8")
    for name, row in EDITS.items():
        assert getattr(edits, name) is row.function
        assert row.function.__name__ == row.name == name
        assert f"| `{name}` |" in text
