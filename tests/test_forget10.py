"""The benchmark on TOFU's forget10, with a tiny model and made-up pairs in its place."""

import json
import sys
from pathlib import Path

import pytest
import tiny
import torch

pytestmark = pytest.mark.full

PERTURBED = ("forget10_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")


@pytest.fixture
def data(tmp_path, one_thread, own_accelerate):
    """A folder like TOFU's, and a model that knows none of it."""
    sys.path.append(str(Path(__file__).parent.parent))
    for seed, name in enumerate((*PERTURBED, "retain90")):
        rows = tiny.facts(40 if name == "retain90" else 4, seed)
        wrong = [row["answer"] for row in tiny.facts(3, 99)]
        lines = [json.dumps(row | {"perturbed_answer": wrong, "paraphrased_answer": wrong[0]}) for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "forget10.jsonl").write_bytes((tmp_path / "forget10_perturbed.jsonl").read_bytes())
    torch.manual_seed(0)
    tokenizer = tiny.make_tokenizer()
    for part in (tiny.tiny_llama(len(tokenizer)), tokenizer):
        part.save_pretrained(tmp_path / "model")
    return tmp_path


def test_the_defaults_and_the_recipes_start_from_one_model(data, tmp_path, monkeypatch):
    """Each row has TOFU's columns; the recipes lower the forget answers' probability; a rerun measures nothing."""
    from benchmarks import forget10

    arguments = ["--data", data, "--out", tmp_path / "out", "--model", data / "model", "--threads", 1]
    arguments += ["--records", 4, "--holdout", 20, "--epochs", 60, "--fine-tuning-rate", 1e-2, "--recipe-epochs", 8]
    results = forget10.main([str(x) for x in arguments])
    assert list(results) == ["start", "retrained", "pyunlearn, defaults", "GradDiff, recipe", "NPO, recipe"]
    known = results["start"]["forget_probability"]
    assert known > 0.8 > results["retrained"]["forget_probability"]
    assert sum(results["pyunlearn, defaults"]["verdicts"].values()) == 4
    for name in ("GradDiff, recipe", "NPO, recipe"):
        assert results[name]["steps"] == 8
        assert results[name]["forget_probability"] < known
    assert results["retrained"]["model_utility"] >= 0
    assert forget10.forget_quality(results["retrained"], results["retrained"]) == (0, 0)
    monkeypatch.setattr(forget10, "_measures", None)
    assert forget10.main([str(x) for x in arguments]) == results
