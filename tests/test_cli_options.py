"""The options of the command line are those of the functions; help, version, settings files, standard input."""

import dataclasses
import inspect
import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer

import pyunlearn
from pyunlearn import edits
from pyunlearn.auditing.config import AuditConfig
from pyunlearn.benchmarking.config import BenchConfig
from pyunlearn.cli import main as cli
from pyunlearn.cli import options
from pyunlearn.comparing.config import CompareConfig
from pyunlearn.data.find import FindConfig
from pyunlearn.edits.config import EditConfig
from pyunlearn.errors import ArgumentError
from pyunlearn.study import run_study
from pyunlearn.study.config import PRESETS, StudyConfig
from pyunlearn.unlearning.config import UnlearnConfig

GROUP: Any = typer.main.get_command(cli.program())
CONFIGS = {
    "unlearn": UnlearnConfig,
    "audit": AuditConfig,
    "compare": CompareConfig,
    "bench": BenchConfig,
    "edit": EditConfig,
    "find": FindConfig,
    "study": StudyConfig,
}
LIVE = {"progress": "--quiet", "on_step": "--log-with"}
"""Parameters of the functions that have no option of their own, and what stands for them."""
RENAMED = {"output_dir": "--out"}
"""Parameters whose option has another name."""


def flags(name):
    """Every option of a command."""
    return {flag for parameter in GROUP.commands[name].params for flag in parameter.opts}


@pytest.fixture
def seen(monkeypatch):
    """The arguments of the last call of unlearn, audit, compare or run_study: none of them runs."""
    arguments = {}

    def fake(*positional, **keywords):
        arguments.update(keywords, positional=positional)
        raise KeyboardInterrupt

    for name in ("audit", "compare", "unlearn"):
        monkeypatch.setattr(pyunlearn, name, fake)
    monkeypatch.setattr("pyunlearn.study.run_study", fake, raising=False)
    return arguments


# ---------------------------------------------------------------- one source


@pytest.mark.parametrize("name", CONFIGS)
def test_every_field_of_a_config_has_its_option(name):
    """Under its own name or its flag, with its help, in its group."""
    parameters = {p.name: p for p in GROUP.commands[name].params}
    for field, option in CONFIGS[name].options().items():
        assert parameters[field].opts[0] == options.flag_of(field, option)
        assert parameters[field].help.startswith(option.help)
        assert parameters[field].rich_help_panel == option.group


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("unlearn", pyunlearn.unlearn),
        ("audit", pyunlearn.audit),
        ("compare", pyunlearn.compare),
        ("bench", pyunlearn.bench),
        ("edit", edits.task_vector),
        ("find", pyunlearn.find_copies),
        ("study", run_study),
    ],
)
def test_every_parameter_of_a_function_can_be_set(name, function):
    """Except those that take live objects, which LIVE lists; an edit's own come by --set."""
    own = edits.EDITS["task_vector"].options if name == "edit" else {}
    named = CONFIGS[name].options() if name in CONFIGS else {}
    keyword = [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    missing = []
    for parameter in keyword:
        flag = (
            options.flag_of(parameter, named[parameter]) if parameter in named else f"--{parameter}".replace("_", "-")
        )
        flag = RENAMED.get(parameter, LIVE.get(parameter, flag))
        if parameter not in ("model", "benchmark", "out", *own) and flag not in flags(name):
            missing.append(parameter)
    assert missing == (["config"] if name == "edit" and "config" in keyword else [])


def test_the_lists_of_exceptions_are_needed():
    """Nothing stands in them that has an option after all."""
    assert not {f"--{n.replace('_', '-')}" for n in (*LIVE, "output_dir")} & set().union(*map(flags, GROUP.commands))


def test_options_of_a_study_change_its_preset(call, seen):
    """Lists of numbers and words too; the others stay those of the preset."""
    words = ("--preset", "cpu", "--steps", 60, "--unlearning-rates", "1e-4,3e-4", "--kinds", "id,canary")
    assert call("study", *words, "--processes", 3)[0] == 130
    changes = {"steps": 60, "unlearning_rates": (1e-4, 3e-4), "kinds": ("id", "canary"), "processes": 3}
    assert seen["config"] == dataclasses.replace(PRESETS["cpu"], **changes)
    assert (seen["corpus"], seen["test_corpus"]) == (None, None)


def test_defaults_are_left_to_the_config(call, seen):
    """What is not given is not passed: target_exposure keeps all its digits."""
    assert call("unlearn", "m", "--forget", "f.jsonl")[0] == 130
    assert seen["config"] == UnlearnConfig()


def test_every_choice_of_a_run_can_be_made_on_the_command_line(call, seen):
    """Numbers, words, flags, None and options of the method reach the function as they are."""
    code, _, _ = call(
        "unlearn", "m", "--forget", "f.jsonl", "--method", "dpo", "--set", "beta=0.3", "--set", "divergence=tv",
        "--set", 'winners=["a=b", "c"]', "--order", "hard_first", "--difficulty", "ksd",
        "--token-weights", "importance", "--token-share", 0.5, "--micro-batch-size", 2, "--retain-loss", "none",
        "--truncate", "--retain-weight", 3, "--workspace", 0,
    )  # fmt: skip
    assert code == 130
    assert seen["config"] == UnlearnConfig(
        method="dpo", method_options={"beta": 0.3, "divergence": "tv", "winners": ["a=b", "c"]}, order="hard_first",
        difficulty="ksd", token_weights="importance", token_share=0.5, micro_batch_size=2, retain_loss=None,
        truncate=True, retain_weight=3, workspace=0,
    )  # fmt: skip
    seen.clear()
    code, out, err = call("unlearn", "m", "--forget", "f.jsonl", "--set", "beta")
    assert (code, out, seen) == (2, "", {})
    assert "set as name=value, got 'beta'" in err


def test_options_of_an_audit_and_a_comparison(call, seen):
    """Lists are separated by commas; --fast takes the continuations away; a method's options name the method."""
    assert call("audit", "m", "--forget", "f.jsonl", "--metrics", "continuations,membership", "--fast")[0] == 130
    assert seen["config"] == AuditConfig(metrics=("membership",))
    assert call("compare", "m", "--forget", "f.jsonl", "--methods", "ga, npo", "--set", "npo.beta=0.3")[0] == 130
    assert seen["config"] == CompareConfig(methods=("ga", "npo"), method_options={"npo": {"beta": 0.3}})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-steps", "-1"], "--max-steps must be a whole number, 0 or more or None, got -1"),
        (["--max-steps", "ten"], "--max-steps must be a whole number, 0 or more or None, got 'ten'"),
        (["--order", "easy-first"], '--order must be one of .*: did you mean "easy_first"'),
        (["--mask", "salience"], "--mask must be 'saliency', 'nonzero' or .*, got 'salience'"),
        (["--token-share", "0.5"], "token_share keeps the tokens of the largest weight"),
    ],
)
def test_a_wrong_value_is_one_sentence(call, seen, words, message):
    """It names the option as it is written; nothing runs."""
    code, out, err = call("unlearn", "m", "--forget", "f.jsonl", *words)
    assert (code, out, seen) == (2, "", {})
    assert err.count("\n") == 1
    assert re.search(message, err)


# ---------------------------------------------------------------- settings files


def test_options_come_before_the_settings_file(call, seen, tmp_path):
    """Only those that were given, even where they are given their default; options of the method are merged."""
    (tmp_path / "run.toml").write_text(
        'method = "npo"\nmax_steps = 7\nbatch_size = 4\ntruncate = true\n[method_options]\nbeta = 0.5\n'
    )
    arguments = ("unlearn", "m", "--forget", "f.jsonl", "--config", "run.toml")
    assert call(*arguments, "--batch-size", 8, "--no-truncate")[0] == 130
    assert seen["config"] == UnlearnConfig(method="npo", max_steps=7, batch_size=8, method_options={"beta": 0.5})
    assert call(*arguments, "--set", "beta=0.1")[0] == 130
    assert seen["config"].method_options == {"beta": 0.1}
    assert (seen["config"].truncate, seen["config"].batch_size) == (True, 4)


@pytest.mark.parametrize("name", ["unlearn", "audit", "compare"])
def test_the_settings_of_a_result_are_a_settings_file(call, seen, tmp_path, name):
    """Those that the function has; the versions and names next to them are left out."""
    settings = CONFIGS[name](seed=5).to_dict() | {"torch": "2", "model": "m"}
    (tmp_path / "result.json").write_text(json.dumps({"settings": settings}))
    assert call(name, "m", "--forget", "f.jsonl", "--config", "result.json")[0] == 130
    assert seen["config"] == CONFIGS[name](seed=5)


def test_method_options_of_a_file_are_merged_by_method(call, seen, tmp_path):
    """The others stay."""
    (tmp_path / "c.toml").write_text("[method_options.npo]\nbeta = 0.5\n[method_options.kto]\nbeta = 0.2\n")
    assert call("compare", "m", "--forget", "f", "--config", "c.toml", "--set", "npo.beta=0.1")[0] == 130
    assert seen["config"].method_options == {"npo": {"beta": 0.1}, "kto": {"beta": 0.2}}


def test_a_settings_file_that_cannot_be_used_is_refused(call, seen, tmp_path):
    """In one sentence: missing, or with a name that is no option."""
    (tmp_path / "run.toml").write_text("max_step = 7\n")
    for file, message in (("none.toml", "cannot be read"), ("run.toml", 'did you mean "max_steps"')):
        code, _, err = call("unlearn", "m", "--forget", "f.jsonl", "--config", file)
        assert (code, seen) == (2, {})
        assert message in err


def test_an_interrupted_run_says_whether_there_is_a_checkpoint(call, seen):
    """Before the first step there is none, and nothing to resume."""
    code, _, err = call("unlearn", "m", "--forget", "f.jsonl")
    assert (code, err) == (130, "interrupted; there is no checkpoint: run the same command again to start again\n")
    Path("m-unlearned.checkpoint.pt").touch()
    assert "run the same command with --resume to resume" in call("unlearn", "m", "--forget", "f.jsonl")[2]


# ---------------------------------------------------------------- standard input


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('{"text": "one"}\n{"text": "two"}\n', ["one", "two"]),
        ('["one", "two"]', ["one", "two"]),
        ('[\n{"text": "one"}\n]', ["one"]),
        ('"one"\n"two"\n', ["one", "two"]),
        ('\ufeff{"text": "one"}\n', ["one"]),
        ('\ufeff["one", "two"]', ["one", "two"]),
        ("\ufeffone\n", ["one"]),
        ("one\ntwo\n", ["one", "two"]),
        ("one\nline\n\ntwo\n", ["one\nline", "two"]),
        ('{"text": "one\\n\\ntwo"}\n', ["one\n\ntwo"]),
        ('"Hello," she said.\n', ['"Hello," she said.']),
        ("[INST] who? [/INST]\n", ["[INST] who? [/INST]"]),
        ("[1] A footnote.\n", ["[1] A footnote."]),
    ],
)
def test_texts_come_from_standard_input(call, seen, monkeypatch, content, texts):
    """As JSON lines, JSON or plain text, with a byte order mark or without."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(content))
    assert call("audit", "m", "--forget", "-")[0] == 130
    assert [e.completion for e in seen["positional"][1]] == texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", " is empty"),
        (b'{"text": ', ", line 1, is not JSON"),
        (b'[{"text": "one"},\n{"text": "two"}\n', " is not JSON: Expecting ',' delimiter at line 3"),
        (b'[\n"one",\n', " is not JSON"),
        (b"caf\xe9", " is not UTF-8 text: unexpected end of data; convert it"),
    ],
)
def test_standard_input_that_cannot_be_used_is_refused(call, seen, monkeypatch, content, message):
    """The sentence says where it was read; broken JSON is not taken for plain text."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), "utf-8"))
    code, _, err = call("unlearn", "m", "--forget", "f.jsonl", "--retain", "-")
    assert (code, seen) == (2, {})
    assert f"standard input (read for retain){message}" in err


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("name", GROUP.commands)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_says_what_every_option_does(call, name, flag):
    """Each option has its place there and a sentence, and the command an example."""
    code, out, _ = call(name, flag)
    assert code == 0
    text = " ".join(out.replace("│", " ").split())
    for parameter in GROUP.commands[name].params:
        if parameter.name != "help" and parameter.param_type_name == "option":
            assert parameter.opts[0] in text
            assert parameter.help.split()[0] in text
    assert f"Examples: pyunlearn {name}" in text or ("Examples:" in text and f"pyunlearn {name} " in text)


@pytest.mark.parametrize("name", ["unlearn", "audit", "compare", "bench", "edit", "find", "study"])
def test_options_are_grouped(name):
    """Every option but --help stands in one of five groups, and the groups come in one order."""
    panels = [p.rich_help_panel for p in GROUP.commands[name].params if p.param_type_name == "option"]
    order = [options.PANELS.index(panel) for panel in panels if panel is not None]
    assert len(order) >= len(panels) - 1
    assert order == sorted(order)


def test_help_names_every_command(call):
    """And so does the program when it is called with nothing."""
    for arguments in ((), ("--help",), ("-h",)):
        code, out, err = call(*arguments)
        assert code in (0, 2)
        assert all(name in out + err for name in GROUP.commands)
    code, _, err = call("unlern")
    assert code == 2
    assert "unlern" in err


def test_the_version_is_printed(call):
    """Alone, on standard output."""
    assert call("--version") == (0, f"pyunlearn {pyunlearn.__version__}\n", "")


def test_shell_completion_knows_the_choices(call):
    """The program can install its completion, and an option completes its values."""
    assert "--install-completion" in call("--help")[1]
    (order,) = (p for p in GROUP.commands["unlearn"].params if p.name == "order")
    words = [str(getattr(w, "value", w)) for w in order.shell_complete(None, "e")]
    assert words == ["easy_first"]


HEAVY = ("torch", "numpy", "scipy", "transformers", "accelerate", "matplotlib")
CHILD = f"""
import sys
from pyunlearn.cli.main import program
for command in sys.argv[1:]:
    try:
        program()([*command.split(), "--help"], prog_name="pyunlearn")
    except SystemExit:
        print(command, [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""


def test_help_loads_nothing_heavy():
    """Neither torch nor numpy nor scipy nor transformers: so it takes a moment, not seconds."""
    commands = ["", *GROUP.commands]
    done = subprocess.run([sys.executable, "-c", CHILD, *commands], capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines() == [f"{command} []" for command in commands]
    assert done.stdout.count("Usage: ") == len(commands)


EMPTY = "import typer; app = typer.Typer(); app.command()(lambda x: None); app(['--help'])"


def fastest(*words):
    """Seconds of the fastest of three runs of Python."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run([sys.executable, *words], capture_output=True, timeout=60)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def test_help_is_there_in_half_a_second():
    """On a machine that is busy or slow: in no more than three times that of an empty typer program."""
    seconds = fastest("-m", "pyunlearn", "unlearn", "--help")
    assert seconds < 0.5 or seconds < 3 * fastest("-c", EMPTY)


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("x=1", 1),
        ("x=0.5", 0.5),
        ("x=true", True),
        ("x=none", None),
        ("x=null", None),
        ("x=a=b", "a=b"),
        ("x=[1]", [1]),
    ],
)
def test_values_are_read_as_json_or_as_text(word, value):
    """Numbers, lists, true, false and null as in JSON; - in a name is _."""
    assert options.assignments([word.replace("x", "my-x", 1)]) == {"my_x": value}


@pytest.mark.parametrize("word", ["x", "x=", "=1"])
def test_a_word_that_sets_nothing_is_refused(word):
    """As is a method's option without its method."""
    with pytest.raises(ArgumentError, match="set as name=value"):
        options.assignments([word])
    with pytest.raises(ArgumentError, match=r"set as METHOD\.name=value"):
        options.assignments_by_method(["x=1.5"])


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("another"), KeyError("a third")])
def test_a_failure_that_is_no_mistake_has_an_exit_code_of_its_own(call, monkeypatch, error):
    """1 would say that a text is still exposed. The traceback is shown."""

    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr("pyunlearn.cli.main.program", lambda names: fails)
    code, out, err = call("methods")
    assert (code, out) == (70, "")
    assert "Traceback" in err
    assert str(error) in err
