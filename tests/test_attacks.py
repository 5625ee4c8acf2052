"""`pyunlearn.attack` end to end: what it finds, what it says, and that the model stays as it is."""

import json
import re
from pathlib import Path

import pytest
import torch

import pyunlearn
from pyunlearn.errors import ModelError

DOCUMENT = Path(__file__).parent.parent / "docs" / "attacks.md"
QUICK = {"relearning_steps": 4, "retain_steps": 4, "relearning_rate": 1e-3, "samples": 2, "progress": False}


def weights(model):
    """Every parameter and whether it requires a gradient."""
    return {name: (p.detach().clone(), p.requires_grad, p.grad is None) for name, p in model.named_parameters()}


def unchanged(before, model):
    """Whether nothing of a model has changed, bit for bit."""
    after = weights(model)
    return all(torch.equal(a[0], after[n][0]) and a[1:] == after[n][1:] for n, a in before.items())


def test_memorized_texts_are_exposed_without_an_attack(story):
    """And the model has its weights afterwards, bit for bit, whatever was tried."""
    model = story.fresh()
    before = weights(model)
    result = pyunlearn.attack(
        model,
        story.forget,
        retain=story.retain,
        holdout=story.holdout,
        original=story.model,
        tokenizer=story.tokenizer,
        attacks=["all"],
        **QUICK,
    )
    assert result.verdicts == {"still exposed": 2}
    assert not result.passed
    assert result.headline.startswith("All 2 texts are still exposed without any attack")
    assert unchanged(before, model)
    assert result.trials[0].returned == 2


def test_unseen_texts_stay_forgotten(story):
    """Texts that no model saw come back under no attack."""
    result = pyunlearn.attack(
        story.model,
        story.unseen,
        retain=story.retain,
        holdout=story.holdout,
        tokenizer=story.tokenizer,
        **QUICK,
    )
    assert result.passed
    assert {e.verdict for e in result.examples} == {"stays forgotten"}
    assert "stay forgotten under" in result.headline


def test_a_control_that_is_the_model_itself_is_refused(story):
    """It would cancel everything."""
    with pytest.raises(ModelError, match="as if it were the same model"):
        pyunlearn.attack(
            story.model,
            story.forget,
            holdout=story.holdout,
            control=story.fresh(),
            tokenizer=story.tokenizer,
            attacks=["prefix"],
            progress=False,
        )


def test_the_python_of_the_document_runs(story, tmp_path, monkeypatch, capsys):
    """The block of docs/attacks.md, on a tiny model's files."""
    monkeypatch.chdir(tmp_path)
    for part in (story.model, story.tokenizer):
        part.save_pretrained("my-model-unlearned")
    for name, rows in {"secrets": story.forget, "keep": story.retain, "unseen": story.holdout}.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    (block,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.S)
    exec(compile(block, str(DOCUMENT), "exec"), {})
    assert "still exposed" in capsys.readouterr().out
