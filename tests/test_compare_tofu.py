"""The benchmark on TOFU, with a tiny model and made-up pairs in its place."""

import json
import sys
from pathlib import Path

import pytest
import tiny
import torch


@pytest.fixture(scope="module")
def benchmark():
    """The benchmark's module: the folder comes last, so that the package is the installed one."""
    sys.path.append(str(Path(__file__).parent.parent))
    from benchmarks import compare_tofu

    return compare_tofu


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder like TOFU's, and a model that knows none of it."""
    folder = tmp_path_factory.mktemp("tofu")
    for name, rows in (("forget10", tiny.facts(6, 1)), ("retain90", tiny.facts(60, 2))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    tokenizer = tiny.make_tokenizer()
    for part in (tiny.tiny_llama(len(tokenizer)), tokenizer):
        part.save_pretrained(folder / "model")
    return folder


def test_it_learns_compares_and_resumes(benchmark, data, tmp_path, capsys, monkeypatch):
    """The table has a line for each method and the original, which knows the forget answers; a rerun trains nothing."""
    threads = torch.get_num_threads()
    arguments = ["--data", data, "--out", tmp_path, "--model", data / "model", "--threads", 1]
    arguments += ["--forget", 2, "--retain", 6, "--holdout", 20, "--max-steps", 2]
    arguments += ["--epochs", 60, "--fine-tuning-rate", 1e-2, "--known", 0.3]
    try:
        comparison = benchmark.main([*map(str, arguments), "--methods", "ga,simnpo"])
        table = (tmp_path / "table.md").read_text()
        assert sorted(line.split(" | ")[0] for line in table.splitlines()[4:]) == ["| `ga`", "| `simnpo`", "| original"]
        assert comparison.original.verdicts["still exposed"] == 2
        assert "fine-tuning, epoch" in capsys.readouterr().err
        monkeypatch.setattr("benchmarks.tofu.train", None)
        monkeypatch.setattr("pyunlearn.comparing.trial.run_unlearn", None)
        again = benchmark.main([*map(str, arguments), "--methods", "ga"])
        assert [r.status for r in again.rows] == ["done", "done"]
        assert (tmp_path / "table.md").read_text() == table
    finally:
        torch.set_num_threads(threads)


def test_forget_retain_and_holdout_are_drawn_apart(benchmark, data):
    """No pair occurs twice, none is too long, the same seed draws the same; a file with too few is named."""
    rows_by_role = benchmark.drawn(data, 3, 10, 20, 200, 0)
    texts = [row["question"] + row["answer"] for rows in rows_by_role.values() for row in rows]
    assert [len(rows) for rows in rows_by_role.values()] == [3, 10, 20]
    assert len(set(texts)) == 33
    assert max(map(len, texts)) <= 200
    assert benchmark.drawn(data, 3, 10, 20, 200, 0) == rows_by_role != benchmark.drawn(data, 3, 10, 20, 200, 1)
    with pytest.raises(SystemExit, match=r"forget10\.jsonl has 0 pairs of at most 10 characters"):
        benchmark.drawn(data, 3, 10, 20, 10, 0)


@pytest.mark.full
def test_unlearned_is_measured_beside_retrained(benchmark, data, tmp_path, capsys):
    """The retrained model does not know the forget answers; a rerun reads the saved numbers."""
    from benchmarks import retrained

    threads = torch.get_num_threads()
    arguments = ["--data", data, "--out", tmp_path, "--model", data / "model", "--threads", 1, "--methods", "ga"]
    arguments += ["--forget", 2, "--retain", 6, "--holdout", 19, "--max-steps", 2, "--evidence", "holdout"]
    arguments += ["--epochs", 60, "--fine-tuning-rate", 1e-2, "--known", 0.3, "--samples", 2]
    try:
        results = retrained.main([*map(str, arguments)])
        assert [*results] == ["start", "retrained", "ga, holdout"]
        assert results["start"]["forget_nll"] + 1 < results["retrained"]["forget_nll"]
        assert results["start"]["half"] > results["retrained"]["half"]
        assert retrained.main([*map(str, arguments)]) == results
        assert capsys.readouterr().out.count("| ga, holdout |") == 2
    finally:
        torch.set_num_threads(threads)


def test_wrong_answers_are_what_dpo_prefers(benchmark, tmp_path):
    """Each question's first one is taken; without the file, or without the question in it, there is none."""
    rows = tiny.facts(2, 1)
    assert benchmark.with_winners(rows, tmp_path) == rows
    wrong = {"question": rows[1]["question"], "perturbed_answer": ["a lamp.", "the sea."]}
    (tmp_path / "forget10_perturbed.jsonl").write_text(json.dumps(wrong) + "\n")
    assert benchmark.with_winners(rows, tmp_path) == [rows[0], rows[1] | {"winner": "a lamp."}]
