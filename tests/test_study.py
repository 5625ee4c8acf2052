"""A very small study from end to end."""

import csv
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import typer.testing
from study_settings import TINY

from pyunlearn.cli import main as cli
from pyunlearn.errors import OutputError
from pyunlearn.output import read_arrays
from pyunlearn.study import PRESETS, run_study, study, training
from pyunlearn.study import runs as study_runs
from pyunlearn.study.claims import CLAIMS
from pyunlearn.study.config import StudyConfig

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pytest.importorskip("sacrebleu")
MADE = (
    "claims.csv",
    "claims.json",
    "examples.csv",
    "models.csv",
    "steps.csv",
    "example_steps.csv",
    "steps_to_forget.csv",
    "index.html",
)

pytestmark = pytest.mark.full


def digests(folder: Path) -> dict[str, str]:
    """Hash every file that a study makes for people."""
    files = [folder / name for name in MADE] + sorted((folder / "figures").iterdir())
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run_study(tmp_path_factory.mktemp("study") / "out", **TINY)


def test_a_study_ends_with_a_verdict_on_every_claim(finished):
    """Tables, figures in both forms and a page that loads nothing from elsewhere are written."""
    assert [c.name for c in finished.claims] == list(CLAIMS)
    for claim in finished.claims:
        assert claim.verdict in ("supported", "not supported", "undecided")
        assert claim.findings
        for f in claim.findings:
            assert not math.isfinite(f.low) or f.low - 1e-9 <= f.effect <= f.high + 1e-9
            assert 0 <= f.pvalue <= f.pvalue_holm <= 1
            assert f.n >= 20 or f.verdict == "undecided"
    for name in MADE:
        assert (finished.folder / name).stat().st_size > 0
    for suffix in ("svg", "png"):
        assert len(list((finished.folder / "figures").glob(f"*.{suffix}"))) == 5
    page = (finished.folder / "index.html").read_text()
    assert all(text in page for text in CLAIMS.values())
    assert "<script" not in page
    assert not [x for x in page.split('src="')[1:] if x.startswith("http")]


def test_each_step_s_numbers_are_those_of_the_trajectory(finished):
    """The tables agree with the arrays of the runs; the first row of a run is the model before unlearning."""
    with open(finished.folder / "steps.csv") as file:
        rows = [r for r in csv.DictReader(file) if (r["kind"], r["repetitions"]) == ("id", "10")]
    run = read_arrays(finished.folder / "runs" / "id-r10-draw0-lr0.01.safetensors")
    assert [int(r["step"]) for r in rows] == run["steps"].tolist() == [0, 2, 4]
    np.testing.assert_allclose([float(r["nll"]) for r in rows], run["nll"].mean(1), rtol=1e-6)
    assert float(rows[0]["non_member_drift"]) == 0 == float(rows[0]["moved"])
    assert run["nll"][-1].mean() > run["nll"][0].mean()
    trained = read_arrays(finished.folder / "scores" / "main-0.safetensors")
    assert float(rows[0]["test_nll"]) == pytest.approx(float(trained["test_nll"]), rel=1e-6)


def test_an_interrupted_study_resumes_to_the_same_files(finished, tmp_path, monkeypatch):
    """Stopped within a training (after a checkpoint), and again between two runs: the same files, byte for byte."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    for where, name, after in ((training, "_step", 9), (study_runs, "unlearn_set", 2)):
        real, calls = getattr(where, name), []

        def stop(*values, real=real, calls=calls, after=after, **options):
            calls.append(1)
            if len(calls) > after:
                raise KeyboardInterrupt
            return real(*values, **options)

        monkeypatch.setattr(where, name, stop)
        with pytest.raises(KeyboardInterrupt):
            run_study(tmp_path, **TINY)
        monkeypatch.setattr(where, name, real)
        assert bool(list((tmp_path / "models").glob("*.checkpoint"))) == (where is training)
        assert len(list((tmp_path / "runs").glob("*.safetensors"))) == (0 if where is training else 2)
        assert not (tmp_path / "index.html").exists()
    again = run_study(tmp_path, **TINY)
    assert digests(again.folder) == digests(finished.folder)
    assert not list(again.folder.rglob("*.checkpoint"))
    assert not list(again.folder.rglob(".*.partial"))


@pytest.mark.parametrize("setup", ["text", "qa"])
def test_the_other_setups_come_to_verdicts(tmp_path, monkeypatch, setup):
    """A causal model from scratch on text, and a checkpoint fine-tuned on questions and answers; neither has BLEU."""
    monkeypatch.setattr(study, "draw_all", lambda *_: None)
    monkeypatch.setattr(study, "write_page", lambda *_: None)
    arguments = {
        **TINY,
        "setup": setup,
        "repetitions": (4,),
        "kinds": ("id", "mismatched", "canary", "random"),
        "corpus_size": 300,
    }
    if setup == "qa":
        tokenizer = tiny.make_tokenizer()
        tiny.tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        (tmp_path / "qa.jsonl").write_text("\n".join(json.dumps(f) for f in tiny.facts(200, 0)))
        arguments |= {
            "checkpoint": str(tmp_path / "model"),
            "corpus": tmp_path / "qa.jsonl",
            "kinds": ("id", "mismatched", "random"),
        }
    made = run_study(tmp_path / "out", **arguments)
    assert [c.name for c in made.claims] == list(CLAIMS)
    run = read_arrays(tmp_path / "out" / "runs" / "id-r4-draw0-lr0.01.safetensors")
    assert np.isnan(run["bleu"]).all()
    assert run["nll"][-1].mean() > run["nll"][0].mean()
    trained, retrained = (
        read_arrays(tmp_path / "out" / "scores" / f"{name}.safetensors")["nll"] for name in ("main-0", "retrained")
    )
    assert trained[-4:].mean() < retrained[-4:].mean()


def test_a_finished_study_is_not_done_again(finished, monkeypatch):
    """The same call trains nothing; a call with other settings is refused before anything is written."""

    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr(study_runs, "unlearn_set", never)
    monkeypatch.setattr(training, "new_model", never)
    before = digests(finished.folder)
    run_study(finished.folder, **TINY)
    assert digests(finished.folder) == before
    with pytest.raises(OutputError, match="another steps"):
        run_study(finished.folder, **{**TINY, "steps": 6})
    assert digests(finished.folder) == before


def test_the_command_resumes_a_study(finished):
    """The same settings find the study finished and print the verdicts; others are refused."""
    changes = [
        x for k, v in TINY.items() for x in (f"--{k.replace('_', '-')}", v if isinstance(v, str) else json.dumps(v))
    ]

    def run(*more):
        return typer.testing.CliRunner().invoke(
            cli.program(), ["study", "--out", str(finished.folder), *changes, *more]
        )

    again = run("--json")
    assert again.exit_code == 0
    assert [c["claim"] for c in json.loads(again.stdout)] == list(CLAIMS)
    refused = run("--seed", "5")
    assert isinstance(refused.exception, OutputError)


def test_config_json_starts_the_same_study(finished):
    """The settings of a study can be read back and start it again."""
    config = StudyConfig.read(finished.folder / "config.json")
    assert config == finished.config
    assert run_study(finished.folder, config=config).config == config
    assert config.preset == "smoke"
    assert config != PRESETS["smoke"]
