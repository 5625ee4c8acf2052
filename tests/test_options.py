"""Options: what a setting may be is said once, and one sentence tells whoever gives something else."""

import json
import math
import re

import numpy as np
import pytest

from pyunlearn import metrics
from pyunlearn.auditing.config import AuditConfig
from pyunlearn.benchmarking.config import BenchConfig
from pyunlearn.comparing.config import CompareConfig
from pyunlearn.data.config import ChoiceOrFile
from pyunlearn.edits.config import EditConfig
from pyunlearn.errors import ArgumentError, DataError
from pyunlearn.models.config import FilePath
from pyunlearn.options import Choice, ChoiceOrObject, Config, Flag, Number, Several, Table, Text, Whole
from pyunlearn.unlearning import config
from pyunlearn.unlearning.config import UnlearnConfig

CONFIGS: list[type[Config]] = [UnlearnConfig, AuditConfig, CompareConfig, EditConfig, BenchConfig]


class Odd:
    """An object that is none of the things that a setting can be."""


def never(kind):
    """Values that a kind of setting never has."""
    common = [Odd(), math.nan, -1, b"x", object, 2 + 1j, lambda: 0, -(10**5000)]
    numbers = [True, "3", [3], math.inf, -math.inf, np.True_, 10**400, 10**5000]
    return (
        common
        + {
            Whole: [*numbers, 1.5, "", None.__class__],
            Number: numbers,
            Choice: ["", "nonsense", 3, True, ["nll"]],
            Flag: [0, 1, "yes", "true", None, np.True_],
            Text: ["", "  ", 3, True, ["ga"]],
            Several: ["membership", [], [3], ["nonsense"], 3, True],
            Table: [[("a", 1)], "a=1", 3, {1: 2}, True],
            FilePath: ["", "  ", 3, True, ["a.gguf"]],
            ChoiceOrFile: ["", "nonsense", "AUTO", 3, True, None, ".", "a\0b", ["auto"]],
            ChoiceOrObject: ["", "nonsense", 3, True, 0.5],
        }[type(kind)]
    )


CASES = [
    pytest.param(kind, name, option.kind, id=f"{kind.__name__}-{name}")
    for kind in CONFIGS
    for name, option in kind.options().items()
]


def wrong_values(name, kind):
    """Values that an option never has, by its kind; those that this one does have are left out."""
    for value in never(kind):
        sized = isinstance(kind, ChoiceOrObject) and isinstance(value, bytes)
        empty = isinstance(kind, Several) and kind.empty and value == []
        unknown_method = isinstance(kind, Several) and name in ("methods", "tasks") and value == ["nonsense"]
        if not (sized or empty or unknown_method):
            yield value


@pytest.mark.parametrize(("config", "name", "kind"), CASES)
def test_every_wrong_value_gets_one_sentence(config, name, kind):
    """It names the option, what is wanted and what came, on one line."""
    for value in wrong_values(name, kind):
        with pytest.raises(ArgumentError, match=rf"^{name} must be .+, got .+") as error:
            config(**{name: value})
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 400


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_option_has_help_and_a_default_that_is_allowed(kind):
    """A config without arguments can be made, and each field says what it is."""
    assert kind().to_dict().keys() == kind.options().keys()
    for name, option in kind.options().items():
        assert re.match(r"[A-Z].*\.$", option.help), name
        assert option.group in ("Data", "Method", "Loop", "Model", "Output"), name


def test_the_constants_are_those_of_the_metrics():
    """They are repeated so that the command line can print its help without loading numpy."""
    assert config.MEAN_OF_NON_MEMBERS == metrics.NULL_MEAN
    assert config.MEMORIZED == metrics.SIGNIFICANT


def test_numbers_become_plain_ones():
    """So that JSON takes them, whoever computed them."""
    made = UnlearnConfig(batch_size=np.int64(4), utility_budget=np.float32(0.5), l1=1)
    assert json.loads(json.dumps(made.to_dict())) == made.to_dict()
    assert (type(made.batch_size), type(made.utility_budget), type(made.l1)) == (int, float, float)


@pytest.mark.parametrize(
    ("kind", "inside", "outside"),
    [
        (Number(0), [0, 1e9], [-1e-9]),
        (Number(above=0), [1e-9], [0, -0.0]),
        (Number(maximum=1), [1, -1e9], [1 + 1e-9]),
        (Number(below=1), [1 - 1e-9], [1, 1 + 1e-9]),
        (Number(above=0, below=1), [1e-9, 1 - 1e-9], [0, 1]),
        (Number(0, maximum=1), [0, 1], [-1e-9, 1 + 1e-9]),
        (Whole(1), [1, 10**9], [0]),
    ],
)
def test_a_bound_is_allowed_unless_it_is_excluded(kind, inside, outside):
    """`minimum` and `maximum` are allowed values, `above` and `below` are not, by however little."""
    assert all(kind.accepts(x) for x in inside)
    assert not any(kind.accepts(x) for x in outside)


def test_a_list_has_different_values_and_one_at_least():
    """Unless it may be empty."""
    kind = Several(Whole(1))
    assert all(kind.accepts(x) for x in ([1], (1, 2), [2, 1]))
    assert not any(kind.accepts(x) for x in ([], [1, 1], (2, 1, 2), [0, 1], {1, 2}, "12"))
    assert Several(Whole(1), empty=True).accepts([])


def test_a_resumed_run_must_agree_in_all_settings_that_change_its_numbers():
    """All settings are fixed but those that save memory, extend the run, or are compared by the scores they give."""
    free = {"micro_batch_size", "workspace", "max_steps", "difficulty", "token_weights", "truncate", "show_text"}
    free |= {"checkpoint_every", "gradient_checkpointing", "offload_optimizer", "merge", "attacks", "log_with"}
    made = UnlearnConfig(seed=3, target_exposure=1.0, batch_size=2)
    assert made.fixed() == {name: value for name, value in made.to_dict().items() if name not in free}
    assert (made.fixed()["seed"], made.fixed()["target_exposure"], made.fixed()["batch_size"]) == (3, 1.0, 2)


def test_an_unknown_keyword_is_told_the_nearest():
    """Whichever way it comes."""
    with pytest.raises(ArgumentError, match="unlearn has no option 'max_step': did you mean \"max_steps\""):
        UnlearnConfig.of(None, {"max_step": 3}, "unlearn")


def test_files_give_settings(tmp_path):
    """TOML, and the settings of a result; keywords come after."""
    toml = tmp_path / "run.toml"
    toml.write_text('method = "npo"\nmax_steps = 7\n[method_options]\nbeta = 0.5\n')
    made = UnlearnConfig.of(toml, {"max_steps": 8}, "unlearn")
    assert (made.method, made.max_steps, made.method_options) == ("npo", 8, {"beta": 0.5})
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"settings": made.to_dict() | {"torch": "2", "model": "m"}}))
    assert UnlearnConfig.read(result) == made


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.toml", "max_step = 3", ArgumentError),
        ("a.toml", "max_steps = -3", ArgumentError),
        ("a.toml", "max_steps 3", DataError),
        ("a.json", "[1]", DataError),
        ("a.json", "{", DataError),
        ("b.toml", None, DataError),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, name, content, error):
    """It names the file or the option."""
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=r"the settings file|max_steps"):
        UnlearnConfig.read(tmp_path / name)


@pytest.mark.parametrize(
    ("kind", "word", "value"),
    [
        (Whole(), "12", 12),
        (Number(), "1e-4", 1e-4),
        (Flag(), "True", True),
        (Several(Whole()), "[1, 2]", (1, 2)),
        (Several(Text()), "ga,npo", ("ga", "npo")),
        (Table(), '{"a": 1}', {"a": 1}),
    ],
)
def test_words_of_the_command_line_become_values(kind, word, value):
    """As they are written there."""
    assert kind.parse(word) == value
