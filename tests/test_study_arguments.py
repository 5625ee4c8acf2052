"""Settings and arguments of a study: presets, files, and one sentence for every wrong value."""

import json
import subprocess
import sys

import pytest
from study_settings import TINY

from pyunlearn.errors import ArgumentError, DataError, OutputError
from pyunlearn.study import PRESETS, StudyConfig, run_study

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

WRONG = [
    ({"step": 3}, ArgumentError, "run_study has no option 'step': did you mean \"steps\""),
    ({"preset": "huge"}, ArgumentError, "preset must be one of smoke, cpu, gpu, paper"),
    ({"preset": 5}, ArgumentError, "preset must be one of"),
    ({"preset": "cpu", "config": StudyConfig()}, ArgumentError, "give one of them"),
    ({"config": 5}, ArgumentError, "config must be a StudyConfig or a path, got int"),
    ({"config": "missing.toml"}, DataError, "the settings file missing.toml cannot be read"),
    ({"examples": 1}, ArgumentError, "examples must be a whole number, 2 or more, got 1"),
    ({"non_members": 18}, ArgumentError, "non_members must be a whole number, 19 or more"),
    ({"seeds": 2}, ArgumentError, "seeds must be a whole number, 3 or more, got 2"),
    ({"processes": 0}, ArgumentError, "processes must be a whole number, 1 or more"),
    ({"steps": 3}, ArgumentError, "steps must be a whole number, 4 or more"),
    ({"steps": True}, ArgumentError, "steps must be a whole number"),
    ({"learning_rate": float("nan")}, ArgumentError, "learning_rate must be a number"),
    ({"dropout": 1}, ArgumentError, "dropout must be a number"),
    ({"kinds": ("id", "random")}, ArgumentError, 'kinds must hold "id" and "canary"'),
    ({"kinds": ("id", "canaries")}, ArgumentError, "kinds must be a list of different values, each one of id"),
    ({"kinds": "id"}, ArgumentError, "kinds must be a list"),
    ({"doses": (1, 1)}, ArgumentError, "doses must be a list of different values"),
    ({"doses": (0, 1)}, ArgumentError, "doses must be a list"),
    ({"doses": (4,)}, ArgumentError, "doses must hold at least two"),
    ({"unlearning_rates": (2.0,)}, ArgumentError, "unlearning_rates must be a list .* above 0 and below 1"),
    ({"unlearning_rates": ()}, ArgumentError, "unlearning_rates must be a list"),
    ({"method": "dpo"}, ArgumentError, "reads the forget text alone"),
    ({"method": 5}, ArgumentError, "method must be the name of a method"),
    ({"setup": "qa"}, ArgumentError, "fine-tunes a checkpoint"),
    ({"checkpoint": "./model"}, ArgumentError, "fine-tunes a checkpoint"),
    ({"setup": "twins"}, ArgumentError, "setup twins, and only it, has a twin: got setup 'twins' and twin None"),
    ({"twin": "./model"}, ArgumentError, "setup twins, and only it, has a twin"),
    ({"setup": "twins", "twin": "b"}, ArgumentError, "setup twins need one, and only they: .* checkpoint None"),
    (
        {"setup": "twins", "twin": "b", "checkpoint": "a"},
        ArgumentError,
        "setup twins needs a corpus: a file with texts",
    ),
    ({"setup": "twins", "twin": "b", "checkpoint": "a", "kinds": ("canary",)}, ArgumentError, 'in setup twins "id"'),
    ({"setup": "twins", "twin": "a/", "checkpoint": "a"}, ArgumentError, "must be two models, .* got 'a' for both"),
    ({"size": "huge"}, ArgumentError, "size must be one of"),
    ({"out": 5}, ArgumentError, "out must be the path"),
    ({"out": None}, ArgumentError, "out must be the path"),
    ({"corpus": 5}, ArgumentError, "corpus must be the path"),
    ({"corpus": [None]}, ArgumentError, "corpus must be the path"),
    ({"corpus": []}, ArgumentError, "corpus must be one file"),
    ({"corpus": "missing.tsv"}, DataError, "missing.tsv was not found"),
    ({"test_corpus": {}}, ArgumentError, "test_corpus must be the path"),
    ({"device": "tpu"}, ArgumentError, "device must be one of cpu, cuda"),
    ({"device": 0}, ArgumentError, 'device must be "cpu" or "cuda"'),
    ({"progress": "x"}, ArgumentError, "progress must be True or False"),
    ({"out": __file__}, OutputError, "is a file"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG)
def test_every_wrong_argument_is_one_sentence(tmp_path, monkeypatch, changes, error, message):
    """The sentence names the argument, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message) as caught:
        run_study(**{"out": "out", **changes})
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_else_is_refused(tmp_path):
    """Its files stay."""
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(OutputError, match="is not empty"):
        run_study(tmp_path, **TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_every_preset_is_valid():
    """Each is found under its own name, also after a change."""
    assert list(PRESETS) == ["smoke", "cpu", "gpu", "paper"]
    for name, preset in PRESETS.items():
        assert preset.preset == name
        assert StudyConfig.of(None, {"preset": name}, "run_study") == preset
        assert StudyConfig.of(None, {"preset": name, "seed": 3}, "run_study").seed == 3
        assert StudyConfig.of(preset, {}, "run_study") == preset


def test_every_setting_has_help():
    """A sentence each, in a group of the command line's help."""
    for name, option in StudyConfig.options().items():
        assert option.help.endswith("."), name
        assert option.group in ("Data", "Method", "Loop", "Model", "Output"), name


def test_a_file_changes_its_preset(tmp_path):
    """Settings that a file lacks are those of the preset that it names; keywords come after."""
    toml = tmp_path / "study.toml"
    toml.write_text('preset = "cpu"\nsteps = 7\nunlearning_rates = [1e-3]\n')
    config = StudyConfig.read(toml)
    assert (config.preset, config.seeds, config.steps, config.unlearning_rates) == ("cpu", 12, 7, (1e-3,))
    assert StudyConfig.of(toml, {"steps": 8}, "run_study").steps == 8
    saved = tmp_path / "config.json"
    saved.write_text(json.dumps(config.to_dict() | {"corpus": "0123"}))
    assert StudyConfig.read(saved) == config


def test_the_signature_lists_every_setting():
    """Editors and help() show them all."""
    import inspect

    parameters = inspect.signature(run_study).parameters
    assert set(StudyConfig.options()) < set(parameters)
    assert all(f"{name}: " in run_study.__doc__ for name in parameters)


def test_settings_are_read_without_torch():
    """The command line's help shows them, and has to be quick."""
    code = "import sys, pyunlearn.study.config; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
