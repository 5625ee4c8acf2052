"""The programs in examples/ run as their first lines say."""

import ast
import functools
import json
import re
import runpy
import sys
from collections import Counter
from pathlib import Path

import pytest
from test_cli import folder, trained  # noqa: F401

import pyunlearn

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_a_secret_is_forgotten_and_the_audit_agrees(folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    """The first example writes the model that the second one audits; untouched, the model fails the audit."""
    monkeypatch.chdir(tmp_path)
    # a tiny model needs larger steps and a larger budget than the defaults
    unlearn = functools.partial(pyunlearn.unlearn, learning_rate=3e-4)
    monkeypatch.setattr(
        pyunlearn, "unlearn", lambda *args, **options: unlearn(*args, **options | {"utility_budget": 0.05})
    )
    model = tmp_path / "model"
    model.symlink_to(folder / "model-1.5")
    holdout = folder / "holdout.jsonl"
    run("forget_a_secret", model, folder / "forget.jsonl", folder / "retain.jsonl", holdout, monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    assert "forgotten" in out
    assert f"saved to {model}-unlearned" in out
    texts = (folder / "forget.jsonl", holdout)
    with pytest.raises(SystemExit, match="still exposed"):
        run("audit_a_model", model, model, *texts, monkeypatch=monkeypatch)
    assert json.loads((tmp_path / "audit" / "audit.json").read_text())["passed"] is False
    assert "AUC" in capsys.readouterr().out


@pytest.mark.full
@pytest.mark.usefixtures("own_accelerate")
@pytest.mark.parametrize("trl", [False, True], ids=["transformers", "trl"])
def test_a_trainer_forgets_what_unlearn_forgets(folder, tmp_path, monkeypatch, capsys, trl):  # noqa: F811
    """In a Trainer of transformers or TRL the verdicts are those of a run of unlearn, and it stops by itself."""
    if trl:
        pytest.importorskip("trl")
    texts = [str(folder / f"{role}.jsonl") for role in ("forget", "retain", "holdout")]
    main = runpy.run_path(str(EXAMPLES / "unlearn_in_a_trainer.py"))["main"]
    main(str(folder / "model-1.5"), *texts, str(tmp_path / "out"), learning_rate=3e-4, trl=trl, use_cpu=True)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("after")]
    steps, verdicts = re.fullmatch(r"after (\d+) steps: (.*)", line).groups()
    assert int(steps) < 5 * 15
    forget, retain, holdout = texts
    options = {"learning_rate": 3e-4, "progress": False}
    result = pyunlearn.unlearn(str(folder / "model-1.5"), forget, retain=retain, holdout=holdout, **options)
    assert ast.literal_eval(verdicts) == dict(Counter(e.verdict for e in result.examples)) == {"forgotten": 2}


def run(name, *arguments, monkeypatch):
    """Run one of the examples as a program."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_every_example_is_run():
    """A new one needs its test."""
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "audit_a_model",
        "forget_a_secret",
        "train_a_small_model",  # in test_tutorial
        "unlearn_in_a_trainer",
    }
