"""The evaluation of the metrics: retrained models pass, an untouched model and ruined ones fail."""

import csv
import json
import shutil

import numpy as np
import pytest
import typer.testing
from study_settings import TINY

from pyunlearn.cli import main as cli
from pyunlearn.errors import ArgumentError, OutputError
from pyunlearn.study import evaluate_metrics, evaluation, run_study
from pyunlearn.study.calls import CLEAN, DAMAGED, KNOWN, LEVEL, WHOLE, WHOLE_RETRAINED, t_pvalue
from pyunlearn.study.trust import table
from pyunlearn.study.unlearners import COLLAPSE, NOTHING, REFUSE, RETRAINED, UNLEARNERS

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
SETTINGS = {**TINY, "seeds": 6, "examples": 4, "corpus_size": 300, "epochs": 4, "doses": (1, 8)}
AUDITED = 3  # seeds: 12 sets, 36 retrained models


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return run_study(tmp_path_factory.mktemp("metrics") / "study", **SETTINGS)


@pytest.fixture(scope="module")
def evaluated(study):
    return evaluate_metrics(study.folder, seeds=AUDITED)


@pytest.fixture
def states(evaluated):
    return [json.loads(path.read_text()) for path in sorted((evaluated.folder / "calls").iterdir())]


def share(states, metric, unlearner, call, kind=None, dose=None):
    """The share of the models after an unlearner of which a metric says this."""
    own = [s for s in states if s["unlearner"] == unlearner and kind in (None, s["kind"]) and dose in (None, s["dose"])]
    assert own
    return float(np.mean([s["metrics"][metric]["call"] == call for s in own]))


@pytest.mark.full
def test_the_oracle_passes_and_untouched_and_ruined_models_fail(states):
    """The four sanity lines: 36 retrained models, 6 untouched ones, 12 after each way to ruin a model."""
    assert share(states, "verdicts (model alone)", RETRAINED, CLEAN) >= 0.95
    assert share(states, "top test (model alone)", RETRAINED, CLEAN) >= 0.85  # 5 % are expected
    assert share(states, "verdicts (original)", RETRAINED, CLEAN) >= 0.9  # 5 %, and what is recited
    for view in ("model alone", "original"):
        assert share(states, f"verdicts ({view})", NOTHING, KNOWN, "canary", 8) == 1
    for whole in (WHOLE, WHOLE_RETRAINED):
        assert share(states, whole, NOTHING, KNOWN, "canary", 8) == 1
        assert share(states, whole, COLLAPSE, CLEAN) == 0
        assert share(states, whole, REFUSE, CLEAN) == 0
    assert share(states, "retain utility, budget", REFUSE, DAMAGED) == 1


@pytest.mark.full
def test_the_table_has_a_row_for_each_metric_and_kind(evaluated, states):
    """In metrics.csv and metrics.json, with shares from 0 to 1; every unlearner was tried on every set."""
    with open(evaluated.folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    made = json.loads((evaluated.folder / "metrics.json").read_text())
    assert len(rows) == len(evaluated.rows) == len(made["metrics"]) == 2 * len(states[0]["metrics"])
    for row in evaluated.rows:
        numbers = {k: v for k, v in row.items() if k not in ("kind", "metric", "trusted_for") and v is not None}
        assert all(0 <= v <= 1 for v in numbers.values()), row
        assert row["type_1_low"] <= row["type_1_error"] <= row["type_1_high"]
        assert row["trusted_for"]
    sets = len({(s["kind"], s["dose"], s["seed"]) for s in states})
    assert sets == 2 * 2 * AUDITED
    assert {u: sum(s["unlearner"] == u for s in states) for u in UNLEARNERS} == {
        u: sets * (3 if u == RETRAINED else 1) for u in UNLEARNERS
    }


@pytest.mark.full
def test_non_members_were_seen_by_no_model_of_an_audit(evaluated, study, monkeypatch):
    """Nor is an example of the reference model's, and a retrained model is no copy of the set's own."""
    for s in (json.loads(p.read_text()) for p in (evaluated.folder / "calls").iterdir()):
        assert (s["model"] == s["seed"]) == (s["unlearner"] != RETRAINED)
    seen = []
    real = evaluation._Evaluation._non_members

    def watch(self, which, away):
        others = real(self, which, away)
        owners = self.sets.owners()
        seen.append((away, {owners[i].seed for i in others}, {owners[i].kind for i in others}, which))
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation._Evaluation, "_non_members", watch)
    with pytest.raises(KeyboardInterrupt):
        evaluate_metrics(study.folder, seeds=1, out=study.folder.parent / "other")
    ((away, seeds, kinds, which),) = seen
    assert len(away) == 2  # do nothing: the set's model and the reference
    assert seeds
    assert not seeds & away
    assert kinds == {which.kind}


@pytest.mark.full
def test_an_interrupted_evaluation_resumes_to_the_same_table(evaluated, study, tmp_path):
    """Files that are there are not made again; those that are missing come out the same."""
    folder = tmp_path / "metrics"
    shutil.copytree(evaluated.folder, folder)
    files = sorted((folder / "calls").iterdir())
    gone = [next(p for p in files if p.name.startswith(name)) for name in ("retrained", "refuse", "noise", "collapse")]
    before = [path.read_bytes() for path in gone]
    for path in gone:
        path.unlink()
    again = evaluate_metrics(study.folder, seeds=AUDITED, out=folder)
    assert [path.read_bytes() for path in gone] == before
    assert again.rows == evaluated.rows


@pytest.mark.full
def test_the_command_prints_the_table(evaluated, study):
    """Of a finished evaluation, as a table and as JSON."""
    words = ["study-metrics", str(study.folder), "--seeds", str(AUDITED), "--quiet"]
    printed = typer.testing.CliRunner().invoke(cli.program(), words)
    assert printed.exit_code == 0
    assert printed.stdout.count("can be trusted for") == 2
    assert max(map(len, printed.stdout.split("verdicts (model alone), kind")[0].splitlines())) <= 140
    assert WHOLE in printed.stdout
    made = typer.testing.CliRunner().invoke(cli.program(), [*words, "--json"])
    assert json.loads(made.stdout)["rule"] == evaluated.rule


@pytest.mark.full
def test_another_corpus_and_a_missing_model_are_refused(study, tmp_path):
    """In one sentence, and nothing is written."""
    (tmp_path / "a.tsv").write_text("\n".join(f"word{i} red\ttext{i} blue" for i in range(300)))
    with pytest.raises(ArgumentError, match="corpus is not that of the study"):
        evaluate_metrics(study.folder, corpus=tmp_path / "a.tsv", out=tmp_path / "new")
    copy = tmp_path / "copy"
    shutil.copytree(study.folder, copy)
    shutil.rmtree(copy / "models" / "seed-2")
    with pytest.raises(OutputError, match="the model of seed 2 is missing"):
        evaluate_metrics(copy, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_without_a_study_is_refused(tmp_path):
    """And so is a wrong argument."""
    with pytest.raises(OutputError, match="holds no study"):
        evaluate_metrics(tmp_path)
    with pytest.raises(ArgumentError, match="study must be the path"):
        evaluate_metrics(5)
    with pytest.raises(ArgumentError, match="seeds must be a whole number, 1 or more"):
        evaluate_metrics(tmp_path, seeds=0)


def test_t_scores_of_one_more_draw_are_uniform():
    """The standard calls 5 % of texts known that no model saw, with few models too."""
    rng = np.random.default_rng(0)
    for models in (4, 10):
        draws = rng.normal(size=(20000, models + 1))
        assert (t_pvalue(draws[:, 0], draws[:, 1:]) < LEVEL).mean() == pytest.approx(0.05, abs=0.005)


def state(unlearner, call, *, ruined=False, dose=1, seed=0):
    """What is written of a model, for one metric."""
    metrics = {"m": {"call": call, "value": None, "covers": call == CLEAN, "examples": None}}
    names = {"unlearner": unlearner, "kind": "id", "dose": dose, "seed": seed, "ruined": ruined}
    return {**names, "gold": [0.5], "gold_call": CLEAN, "metrics": metrics}


def test_a_metric_is_trusted_for_what_it_sees():
    """Power from a dose on, ruined models, and nothing where it calls retrained models wrong."""
    seeds = range(20)
    every = [state(RETRAINED, CLEAN, dose=d, seed=s) for s in seeds for d in (1, 4)]
    every += [state(NOTHING, KNOWN if d == 4 else CLEAN, dose=d, seed=s) for s in seeds for d in (1, 4)]
    every += [state(COLLAPSE, DAMAGED, ruined=True, seed=s) for s in seeds]
    every += [state(REFUSE, CLEAN, ruined=True, seed=s) for s in seeds]
    (row,) = table(every)
    assert (row["type_1_error"], row["coverage"], row["power_dose_1"], row["power_dose_4"]) == (0, 1, 0, 1)
    assert (row[f"clean: {COLLAPSE}"], row[f"clean: {REFUSE}"], row["clean: noise"]) == (0, 1, None)
    assert row["trusted_for"] == "text from dose 4 on; ruin by collapse"
    (row,) = table([s if s["unlearner"] != RETRAINED else state(RETRAINED, KNOWN, seed=s["seed"]) for s in every])
    assert row["trusted_for"] == "nothing: calls retrained models wrong"
    (row,) = table([s for s in every if s["seed"] < 5])
    assert row["trusted_for"] == "too few seeds: 5 of 6"


@pytest.mark.full
@pytest.mark.slow
def test_a_causal_model_is_evaluated_too(tmp_path):
    """Setup text: the same metrics, of the sets of one seed."""
    made = run_study(tmp_path / "study", **{**SETTINGS, "setup": "text", "epochs": 2})
    evaluated = evaluate_metrics(made.folder, seeds=1)
    assert {row["kind"] for row in evaluated.rows} == {"id", "canary"}
    collapse = [s for s in evaluated.states if s["unlearner"] == COLLAPSE]
    assert min(s["distance"] for s in collapse) > 1
