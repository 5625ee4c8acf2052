"""A very small study from end to end."""

import csv
import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
import typer.testing
from coverings import slow
from study_settings import TINY

from pyunlearn.cli import main as cli
from pyunlearn.errors import OutputError
from pyunlearn.output import read_arrays
from pyunlearn.study import PRESETS, run_study, seeds, study, training
from pyunlearn.study.claims import CLAIMS
from pyunlearn.study.config import StudyConfig
from pyunlearn.study.decisions import OUTCOMES
from pyunlearn.study.figures import FIGURES

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
TABLES = ("claims.csv", "contrasts.csv", "sensitivity.csv", "examples.csv", "runs.csv", "steps.csv")
MADE = (*TABLES, "study.yaml", "claims.json", "index.html")

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("one_thread")]


def digests(folder: Path) -> dict[str, str]:
    """Hash every file that a study makes for people, but for the page, which shows the number of processes."""
    files = [folder / name for name in MADE] + sorted((folder / "figures").iterdir())
    files += sorted((folder / "runs").iterdir()) + sorted((folder / "scores").iterdir())
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run_study(tmp_path_factory.mktemp("study") / "out", **TINY)


def rows(folder, name):
    with open(folder / name) as file:
        return list(csv.DictReader(file))


def test_a_study_ends_with_a_decision_on_every_claim(finished):
    """Tables, figures in both forms and a page that loads nothing from elsewhere; three seeds decide nothing."""
    assert [c.name for c in finished.claims] == list(CLAIMS)
    for claim in finished.claims:
        d = claim.decision
        assert d.outcome == "undecided"
        assert len(claim.contrasts) == d.seeds == 3
        assert d.mean == pytest.approx(np.mean(claim.contrasts), nan_ok=True)
        assert not math.isfinite(d.low) or d.low <= d.mean <= d.high
    for name in MADE:
        assert (finished.folder / name).stat().st_size > 0
    environments = [json.loads(path.read_text()) for path in (finished.folder / "environment").iterdir()]
    assert environments == [[json.loads((finished.folder / "environment.json").read_text())]] * 3
    for suffix in ("svg", "png"):
        assert len(list((finished.folder / "figures").glob(f"*.{suffix}"))) == len(FIGURES)
    page = (finished.folder / "index.html").read_text()
    assert not re.search(r"\bnan\b", page, re.I)
    assert "NaN" not in (finished.folder / "claims.json").read_text()
    assert all(estimand.claim in page for estimand in CLAIMS.values())
    assert "A study of 3 seeds decides nothing" in page
    assert "<script" not in page
    assert not [x for x in page.split('src="')[1:] if x.startswith("http")]


def test_the_plan_is_written_first_and_its_hash_is_on_the_page(finished, tmp_path, monkeypatch):
    """study.yaml is there before anything is trained; a changed one is refused."""
    plan = (finished.folder / "study.yaml").read_bytes()
    assert finished.plan == hashlib.sha256(plan).hexdigest()[:16]
    assert finished.plan in (finished.folder / "index.html").read_text()
    assert all(f'"{e.contrast}"' in plan.decode() for e in CLAIMS.values())

    def stop(inputs, _):
        assert (inputs.folder.path / "study.yaml").read_bytes() == plan
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "run_seeds", stop)
    with pytest.raises(KeyboardInterrupt):
        run_study(tmp_path, **TINY)
    (tmp_path / "study.yaml").write_bytes(plan.replace(b"margin: 0.32", b"margin: 0.01"))
    with pytest.raises(OutputError, match="is not what this study would write"):
        run_study(tmp_path, **TINY)


def test_the_tables_agree_with_the_trajectories_and_scores(finished):
    """The first measurement of a run is the model before unlearning, which the scores of its seed know."""
    table = [r for r in rows(finished.folder, "steps.csv") if (r["kind"], r["dose"], r["seed"]) == ("id", "8", "1")]
    run = read_arrays(finished.folder / "runs" / "id-dose8-seed1-lr0.01.safetensors")
    assert [int(r["step"]) for r in table] == run["steps"].tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose([float(r["nll"]) for r in table], run["nll"].mean(1), rtol=1e-6)
    assert run["nll"][-1].mean() > run["nll"][0].mean()
    examples = [
        r for r in rows(finished.folder, "examples.csv") if (r["kind"], r["dose"], r["seed"]) == ("id", "8", "1")
    ]
    np.testing.assert_allclose([float(r["nll_trained"]) for r in examples], run["nll"][0], rtol=1e-6)
    scores = [read_arrays(finished.folder / "scores" / f"seed-{s}.safetensors") for s in range(3)]
    position = [int(r["example"]) for r in rows(finished.folder, "examples.csv")].index(int(examples[0]["example"]))
    calibration, measured = float(examples[0]["nll_retrained"]), float(examples[0]["difficulty"])
    assert (calibration, measured) == pytest.approx((scores[0]["nll"][position], scores[2]["nll"][position]))


def test_every_seed_has_its_own_weights_and_order(finished):
    """No two models are alike, and canaries seen eight times are remembered by the model that saw them alone."""
    scores = [read_arrays(finished.folder / "scores" / f"seed-{s}.safetensors")["nll"] for s in range(3)]
    assert len({s.tobytes() for s in scores}) == 3
    table = [r for r in rows(finished.folder, "examples.csv") if (r["kind"], r["dose"]) == ("canary", "8")]
    assert np.mean([float(r["memorization"]) for r in table]) > 0


def test_an_interrupted_study_resumes_to_the_same_files(finished, tmp_path, monkeypatch):
    """Stopped within a training (after a checkpoint), and again between two runs: the same files, byte for byte."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    for where, name, after in ((training, "_step", 3), (seeds, "unlearn_set", 2)):
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


@pytest.mark.parametrize("setup", ["qa", *slow("text")])
def test_the_other_setups_come_to_decisions(tmp_path, monkeypatch, setup):
    """A causal model from scratch on text, and a checkpoint fine-tuned on questions and answers."""
    monkeypatch.setattr(study, "draw_all", lambda *_: None)
    monkeypatch.setattr(study, "write_page", lambda *_: None)
    arguments = {**TINY, "setup": setup, "kinds": ("id", "mismatched", "canary", "random")}
    if setup == "qa":
        tokenizer = tiny.make_tokenizer()
        tiny.tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        (tmp_path / "qa.jsonl").write_text("\n".join(json.dumps(f) for f in tiny.facts(150, 0)))
        arguments |= {"checkpoint": str(tmp_path / "model"), "corpus": tmp_path / "qa.jsonl"}
    made = run_study(tmp_path / "out", **arguments)
    assert [c.name for c in made.claims] == list(CLAIMS)
    assert {c.kind for c in made.secondary} == {"mismatched", "random"}
    assert all(c.decision.outcome in OUTCOMES for c in made.secondary)
    run = read_arrays(tmp_path / "out" / "runs" / "id-dose8-seed0-lr0.01.safetensors")
    assert run["nll"][-1].mean() > run["nll"][0].mean()


def test_a_finished_study_is_not_done_again(finished, monkeypatch):
    """The same call trains nothing; a call with other settings is refused before anything is written."""

    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr(seeds, "unlearn_set", never)
    monkeypatch.setattr(training, "new_model", never)
    before = digests(finished.folder)
    run_study(finished.folder, **TINY)
    assert digests(finished.folder) == before
    with pytest.raises(OutputError, match="another steps"):
        run_study(finished.folder, **{**TINY, "steps": 6})
    assert digests(finished.folder) == before


def test_the_command_resumes_a_study(finished):
    """The same settings find the study finished and print the decisions; others are refused."""
    changes = [
        x for k, v in TINY.items() for x in (f"--{k.replace('_', '-')}", v if isinstance(v, str) else json.dumps(v))
    ]

    def run(*more):
        return typer.testing.CliRunner().invoke(
            cli.program(), ["study", "--out", str(finished.folder), *changes, *more]
        )

    again = run("--json")
    assert again.exit_code == 0
    made = json.loads(again.stdout)
    assert [c["claim"] for c in made["claims"]] == list(CLAIMS)
    assert made["plan"] == finished.plan
    printed = run("--quiet")
    assert printed.exit_code == 0
    assert printed.stdout.count("undecided") == len(CLAIMS)
    assert "A study of 3 seeds decides nothing" in printed.stdout
    refused = run("--seed", "5")
    assert isinstance(refused.exception, OutputError)


def test_config_json_starts_the_same_study(finished):
    """The settings of a study can be read back and start it again."""
    config = StudyConfig.read(finished.folder / "config.json")
    assert config == finished.config
    assert run_study(finished.folder, config=config).config == config
    assert config.preset == "smoke"
    assert config != PRESETS["smoke"]
