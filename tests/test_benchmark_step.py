"""The benchmark of the whole step, with a tiny model: both sides compute the same, and the numbers are saved."""

import multiprocessing
import sys
import threading
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def step():
    """The benchmark's module: the folder comes last, so that the package is the installed one."""
    sys.path.append(str(Path(__file__).parent.parent))
    from benchmarks import step

    return step


class Thread(threading.Thread):
    """In place of a process, which takes seconds to start; both of its connections are closed at the end."""

    def __init__(self, step, task):
        super().__init__(daemon=True)
        self.step, self.task = step, task
        self.own, self.theirs = multiprocessing.Pipe()

    def run(self):
        try:
            self.step.child(self.theirs, self.task)
        finally:
            self.theirs.close()

    def kill(self):
        self.own.close()


@pytest.fixture
def in_threads(step, monkeypatch):
    """The sides run in threads of this process."""

    def started(task):
        thread = Thread(step, task)
        thread.start()
        thread.own.poll(60)  # has loaded its model, which two threads cannot at once
        return thread.own, thread

    monkeypatch.setattr(step, "started", started)


def arguments(folder, *more):
    """The arguments of a short run."""
    words = ["--tiny", "--out", folder, "--dtype", "float32", "--steps", 2, "--run-steps", 2, "--batch-size", 4]
    return [*map(str, [*words, "--forget", 8, "--retain", 8, "--holdout", 20, *more])]


@pytest.mark.full
def test_both_sides_compute_the_same_and_the_table_is_saved(
    step, in_threads, own_accelerate, one_thread, tmp_path, capsys, monkeypatch
):
    """Losses, gradient norms and weights of all recipes agree; the second call reads the rows of the first."""
    rows = step.main(arguments(tmp_path))
    assert [row["method"] for row in rows] == ["ga", "grad_diff", "npo", "npo_kl", "lora"]
    for row in rows:
        assert max(row["agreement"]["loss"], row["agreement"]["gradient_norm"]) < 1e-4, row["method"]
        assert row["agreement"]["change"] < 1e-2, row["method"]
        assert len(set(row["agreement"]["losses"]["plain"])) == 3
        assert row["run"]["pyunlearn"]["steps"] == 2
        assert 0 < row["run"]["pyunlearn"]["outside"] < row["run"]["pyunlearn"]["seconds"]
        reference = [row["phases"][side]["reference forward"] > 0 for side in ("pyunlearn", "plain")]
        assert reference == [False, row["method"] not in ("ga", "grad_diff")]
    table = (tmp_path / "step.md").read_text()
    assert table.count("| npo_kl | float32 |") == 3
    assert table in capsys.readouterr().out
    monkeypatch.setattr(step, "stepwise", None)
    assert step.main(arguments(tmp_path)) == rows


@pytest.mark.full
@pytest.mark.slow
def test_each_side_has_a_process_of_its_own(step, one_thread, tmp_path):
    """Whose memory is measured."""
    (row,) = step.main(arguments(tmp_path, "--methods", "grad_diff"))
    assert all(row["peak"][side] > 0 for side in ("pyunlearn", "plain"))
    assert all(row["run"][side]["peak"] > 0 for side in ("pyunlearn", "plain"))


def test_sides_that_differ_are_not_timed(step):
    """One sentence with the numbers ends the benchmark."""
    weights = {side: {"w": torch.tensor([0.0, 1.0])} for side in ("start", "pyunlearn", "plain")}
    weights["plain"]["w"] = torch.tensor([1.0, 1.0])
    weights["pyunlearn"]["w"] = torch.tensor([1.0, 1.005])
    first = {side: [{"loss": 2.0, "gradient_norm": 1.0}] for side in ("pyunlearn", "plain")}
    agreement = step.agreement_of(first, weights)
    assert (agreement["loss"], agreement["gradient_norm"]) == (0.0, 0.0)
    assert agreement["change"] == pytest.approx(0.005)
    step.require_agreement(agreement)
    weights["pyunlearn"]["w"] = torch.tensor([1.0, 1.1])
    with pytest.raises(SystemExit, match="the two sides do not compute the same, so that their times cannot be"):
        step.require_agreement(step.agreement_of(first, weights))
    first["plain"] = [{"loss": 2.001, "gradient_norm": 1.0}]
    with pytest.raises(SystemExit, match="'loss': "):
        step.require_agreement(step.agreement_of(first, weights | {"pyunlearn": weights["plain"]}))


def test_words_of_the_texts_have_the_lengths_of_tofu(step):
    """Random words, the same for a seed, none of a record twice by role."""
    from benchmarks import step_cases
    from benchmarks.cases import TOFU

    options = step._parser().parse_args(["--out", "x", "--forget", "3", "--retain", "2", "--holdout", "1"])
    rows = step_cases.rows_of(options, lambda r: f"w{r.random()}")
    assert {role: len(each) for role, each in rows.items()} == {"forget": 3, "retain": 2, "holdout": 1}
    lengths = [(len(r["question"].split()), len(r["answer"].split())) for each in rows.values() for r in each]
    assert lengths == TOFU[:6]
    assert rows == step_cases.rows_of(options, lambda r: f"w{r.random()}")
