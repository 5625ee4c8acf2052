"""The benchmark on TOFU, with a tiny model and made-up pairs in its place."""

import importlib.util
import json
from pathlib import Path

import pytest
import tiny
import torch


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parent.parent / "benchmarks" / "compare_tofu.py"
    spec = importlib.util.spec_from_file_location("compare_tofu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder as TOFU's, and a model that knows none of it."""
    folder = tmp_path_factory.mktemp("tofu")
    for name, rows in (("forget10", tiny.facts(6, 1)), ("retain90", tiny.facts(40, 2))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    tokenizer = tiny.make_tokenizer()
    for part in (tiny.tiny_llama(len(tokenizer)), tokenizer):
        part.save_pretrained(folder / "model")
    return folder


def test_it_learns_compares_and_goes_on(benchmark, data, tmp_path, capsys, monkeypatch):
    """A line of the table for each method, and the original, which knows the forget answers; run again, nothing is trained."""
    threads = torch.get_num_threads()
    arguments = [
        "--data", data, "--out", tmp_path, "--model", data / "model", "--forget", 2, "--retain", 6, "--holdout", 20, "--epochs", 60,
        "--fine-tuning-rate", 1e-2, "--known", 0.3, "--max-steps", 2, "--threads", 1,
    ]  # fmt: skip
    try:
        found = benchmark.main([*map(str, arguments), "--methods", "ga,simnpo"])
        table = (tmp_path / "table.md").read_text()
        assert sorted(line.split(" | ")[0] for line in table.splitlines()[4:]) == ["| `ga`", "| `simnpo`", "| original"]
        assert found.original.verdicts["still exposed"] == 2
        assert "fine-tuning, epoch" in capsys.readouterr().err
        monkeypatch.setattr(benchmark, "_train", None)
        monkeypatch.setattr("pyunlearn.comparing.trial.unlearn", None)
        again = benchmark.main([*map(str, arguments), "--methods", "ga"])
        assert [r.status for r in again.rows] == ["done", "done"]
        assert (tmp_path / "table.md").read_text() == table
    finally:
        torch.set_num_threads(threads)


def test_forget_retain_and_holdout_are_drawn_apart(benchmark, data):
    """No pair stands twice, none is longer than allowed, the same seed draws the same; too few are refused by name."""
    found = benchmark.drawn(data, 3, 10, 20, 200, 0)
    texts = [row["question"] + row["answer"] for rows in found.values() for row in rows]
    assert [len(rows) for rows in found.values()] == [3, 10, 20]
    assert len(set(texts)) == 33
    assert max(map(len, texts)) <= 200
    assert benchmark.drawn(data, 3, 10, 20, 200, 0) == found != benchmark.drawn(data, 3, 10, 20, 200, 1)
    with pytest.raises(SystemExit, match=r"forget10\.jsonl has 0 pairs of at most 10 characters"):
        benchmark.drawn(data, 3, 10, 20, 10, 0)


def test_wrong_answers_are_what_dpo_prefers(benchmark, tmp_path):
    """The first of each question's; without the file, and for a question that it lacks, there is none."""
    rows = tiny.facts(2, 1)
    assert benchmark.with_winners(rows, tmp_path) == rows
    wrong = {"question": rows[1]["question"], "perturbed_answer": ["a lamp.", "the sea."]}
    (tmp_path / "forget10_perturbed.jsonl").write_text(json.dumps(wrong) + "\n")
    assert benchmark.with_winners(rows, tmp_path) == [rows[0], rows[1] | {"winner": "a lamp."}]
