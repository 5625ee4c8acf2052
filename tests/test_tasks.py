"""Tasks of lm-evaluation-harness without lm-eval: intervals, the table, and what a missing package says."""

import importlib.util
import json
import re

import numpy as np
import pytest

import pyunlearn
from pyunlearn.auditing import AuditConfig
from pyunlearn.comparing import CompareConfig
from pyunlearn.errors import ArgumentError, DependencyError
from pyunlearn.metrics import Interval
from pyunlearn.models import harness
from pyunlearn.models.harness import TaskNumbers, TaskRun
from pyunlearn.probes.tasks import TaskScore, shown, task_notes, task_scores
from pyunlearn.report import task_table
from pyunlearn.report.tasks import task_captions, task_cells, task_columns, task_title


def numbers(items, *, value=None, statistic=None, keys=None, **changes):
    """Numbers of a task with an accuracy, or what `changes` say."""
    size = 0 if items is None else len(items)
    row = {
        "task": "rooms",
        "metric": "acc",
        "value": float(np.mean(items)) if value is None else value,
        "items": items,
        "statistic": statistic,
        "documents": size,
        "available": size,
        "higher_is_better": True,
        "part_of": None,
        "keys": tuple(map(str, range(size))) if keys is None else keys,
    }
    return TaskNumbers(**(row | changes))


def scored(now, before=None, seed=0):
    """The score of one number."""
    runs = [None if x is None else TaskRun([x], 10, 0) for x in (now, before)]
    return task_scores(*runs, seed=seed)[0]


# ---------------------------------------------------------------- without lm-eval


@pytest.fixture
def without(monkeypatch):
    """As if lm-eval were not installed."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else real(name, *a))


@pytest.mark.parametrize("command", ["audit", "compare"])
def test_a_missing_package_is_told_before_anything_is_read(without, call, tmp_path, story, command):
    """One sentence, exit code 2, no folder: the texts, which are not there either, are not looked for."""
    story.model.save_pretrained(tmp_path / "model")
    words = (command, "model", "--forget", "none.jsonl", "--tasks", "wmdp", "--out", "out")
    code, out, err = call(*words, *(("--methods", "ga") if command == "compare" else ()))
    assert (code, out) == (2, "")
    assert err.startswith("pyunlearn: tasks needs lm-eval, not installed here: run `pip install lm-eval`, or leave")
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_old_package_is_told(monkeypatch):
    """With the version that is wanted."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: real("json") if name == "lm_eval" else real(name))
    monkeypatch.setattr(harness, "lm_eval_version", lambda: "0.4.11")
    with pytest.raises(DependencyError, match=r"^tasks needs lm-eval 0\.4\.12 or later, and 0\.4\.11 is installed"):
        harness.require_lm_eval()
    monkeypatch.setattr(harness, "lm_eval_version", lambda: "0.5.0.dev1")
    harness.require_lm_eval()


@pytest.mark.parametrize("config", [AuditConfig, CompareConfig])
def test_a_limit_needs_tasks(config):
    """It says what it is."""
    assert config(tasks=["wmdp"], task_limit=3).tasks == ("wmdp",)
    with pytest.raises(ArgumentError, match=r"^task_limit is the number of documents of each task, and there are no"):
        config(task_limit=3)


def test_a_difference_is_paired():
    """Two models that are right on the same documents differ by less than the sum of their intervals says."""
    before = [1.0] * 30 + [0.0] * 30
    now = [1.0] * 27 + [0.0] * 33
    score = scored(numbers(now), numbers(before))
    assert (score.now.estimate, score.before.estimate) == (0.45, 0.5)
    np.testing.assert_allclose(score.change.estimate, -0.05)
    assert score.change.low < -0.05 < score.change.high
    width = score.change.high - score.change.low
    apart = np.hypot(score.now.high - score.now.low, score.before.high - score.before.low)
    assert width < 0.8 * apart
    assert scored(numbers(before), numbers(before)).change.high > 0  # 60 equal documents leave something open


@pytest.mark.full
def test_the_paired_interval_covers():
    """Of models whose answers agree on most documents: the true difference lies within in 95 % of draws or more."""
    rng, inside, draws = np.random.default_rng(0), 0, 150
    for _ in range(draws):
        before = rng.random(40) < 0.6
        flips = rng.random(40)
        now = np.where(flips < 0.1, ~before, before)  # right to wrong and back alike: 0.6 -> 0.58
        score = scored(numbers(now.astype(float).tolist()), numbers(before.astype(float).tolist()))
        inside += score.change.low <= -0.02 <= score.change.high
    assert inside >= 0.95 * draws


def test_each_kind_of_number_has_the_interval_that_fits():
    """A share between 0 and 1; another mean by Student's t; a perplexity by bootstrap; of texts none."""
    share = scored(numbers([0.2, 0.9, 0.4, 1.0] * 5, metric="rouge"))
    assert 0 < share.now.low < share.now.high < 1
    free = scored(numbers([0.2, 0.9, 0.4, 1.0] * 5, metric="brier"))
    assert free.now.low < share.now.high

    def perplexity(items):
        return float(np.exp(-sum(a for a, _ in items) / sum(b for _, b in items)))

    rng = np.random.default_rng(0)
    pairs = [(float(-x), 10) for x in rng.normal(20, 3, 40)]
    worse = [(a - 2, b) for a, b in pairs]
    kind = {"metric": "word_perplexity", "statistic": perplexity}
    score = scored(numbers(worse, value=perplexity(worse), **kind), numbers(pairs, value=perplexity(pairs), **kind))
    assert score.now.low < score.now.estimate == perplexity(worse) < score.now.high
    assert 0 < score.change.low < score.change.estimate < score.change.high
    assert score.change.high - score.change.low < score.now.high - score.now.low  # paired
    texts = scored(numbers(None, value=12.5, metric="bleu"), numbers(None, value=13.0, metric="bleu"))
    assert texts.change.estimate == -0.5
    assert np.isnan([texts.now.low, texts.change.low]).all()


def test_other_documents_are_not_paired():
    """A task that reads other documents each time has a difference without an interval."""
    score = scored(numbers([1.0, 0.0] * 10), numbers([1.0] * 20, keys=("other",) * 20))
    assert score.change.estimate == -0.5
    assert np.isnan(score.change.low)
    assert not np.isnan(score.now.low)


def test_a_statistic_that_fails_or_infinite_numbers_leave_no_interval():
    """The number itself stays."""
    failing = scored(numbers([(1.0, 2)] * 8, value=3.0, statistic=lambda items: 1 / 0))
    infinite = scored(numbers([np.inf, 1.0] * 4, value=np.inf))
    for score, value in ((failing, 3.0), (infinite, np.inf)):
        assert score.now.estimate == value
        assert np.isnan(score.now.low)


def test_the_table_says_what_it_shows():
    """Title, columns and captions of one model and of two, with a limit and without."""
    now = numbers([1.0, 0.0] * 10, available=40)
    within = now._replace(task="kitchen", part_of="rooms")
    scores = task_scores(TaskRun([now, within], 1, 0))
    assert task_title({"task_limit": None, "lm_eval": "0.4.13"}) == "tasks of lm-evaluation-harness 0.4.13"
    limited = {"task_limit": 20, "lm_eval": "0.4.13"}
    assert task_title(limited) == "lm-evaluation-harness 0.4.13: the first documents of each task, 20 at most"
    assert task_columns(scores) == ["documents", "now"]
    assert [score.task for score in shown(scores)] == ["rooms"]
    cells = task_cells(scores[0])
    assert cells[0] == "20 of 40"
    assert re.fullmatch(r"0\.500 \[0\.\d{3}, 0\.\d{3}\]", cells[1])
    assert task_captions(scores, "audit.json")[-1] == "the 1 tasks within groups are in audit.json"
    both = [scored(now._replace(higher_is_better=False), now)]
    assert task_columns(both) == ["documents", "original", "now", "difference"]
    assert task_cells(both[0])[3].startswith("+0.000 [-0.")
    assert "paired: the same documents under both models" in task_captions(both, "audit.json")[0]
    assert "lower is better: acc" in task_captions(both, "audit.json")
    assert task_table(both, limited).row_count == 1
    assert task_notes(TaskRun([], 10, 0)) == []
    assert "cut the beginning of 3 of the 10 texts" in task_notes(TaskRun([], 10, 3))[0]


def test_a_score_survives_json():
    """NaN, which JSON does not know, too."""
    score = scored(numbers([1.0, 0.0] * 10), numbers([1.0] * 20, keys=("other",) * 20))
    made = TaskScore.of(json.loads(json.dumps(pyunlearn.output.plain_json(score))))
    assert made.now == score.now
    assert np.isnan(made.change.low)
    assert isinstance(made.change, Interval)
