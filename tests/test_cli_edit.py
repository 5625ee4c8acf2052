"""pyunlearn edit and edits: what they print and write, and what they refuse in one sentence."""

import inspect
import json
import re
import tempfile
from pathlib import Path

import pytest
import torch
from test_cli import folder, refused, trained  # noqa: F401

from pyunlearn import edits, models
from pyunlearn.edits import EDITS


@pytest.fixture
def edit(call, folder):  # noqa: F811
    """call("edit", the saved model, ...), with the forget and the retain set."""

    def run(*arguments, forget=folder / "forget.jsonl", retain=folder / "retain.jsonl"):
        retain_words = () if retain is None else ("--retain", retain)
        return call("edit", folder / "model-1.5", "--forget", forget, *retain_words, *arguments)

    return run


def test_an_edit_of_a_file_writes_the_model_and_its_numbers(edit, folder, trained, tmp_path):  # noqa: F811
    """Exit code 0; a table; model, tokenizer and edit.json in --out, which loads again as what the function makes."""
    code, out, err = edit("--edit", "ekfac-step", "--set", "rate=0.03", "--set", "samples=2", "--out", "new")
    assert (code, err) == (0, "")
    assert "forget" in out
    assert "retain" in out
    assert "edit.json are in new" in out
    size, inside = (sum(p.numel() for n, p in trained.model.named_parameters() if part in n) for part in ("", "_proj."))
    assert f"{inside} of {size} weights changed, in 14 parameters; step norm" in out
    written = json.loads((tmp_path / "new" / "edit.json").read_text())
    model = trained.fresh()
    wanted = edits.ekfac_step(
        model, trained.forget, retain=trained.retain, rate=0.03, samples=2, tokenizer=trained.tokenizer
    )
    assert written["edit"] == "ekfac_step"
    assert written["nll_after"] == pytest.approx(wanted.nll_after, rel=1e-3)
    assert written["nll_after"]["forget"] > written["nll_before"]["forget"]
    assert written["settings"]["options"] == ["rate=0.03", "samples=2"]
    loaded, _ = models.load(tmp_path / "new")
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=1e-3, atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_folder_that_cannot_be_replaced_is_refused_before_the_edit(edit, tmp_path, monkeypatch):
    """The result replaces an empty folder, in the one around it, in which nothing can be written here.

    The current folder is filled, for which that one is not needed.
    """
    (tmp_path / "around" / "new").mkdir(parents=True)
    made = tempfile.TemporaryDirectory

    def directory(*arguments, **named):
        if Path(named["dir"]) == tmp_path / "around":
            raise PermissionError(13, "Permission denied")
        return made(*arguments, **named)

    monkeypatch.setattr(tempfile, "TemporaryDirectory", directory)
    code, _, err = edit("--edit", "ekfac-step", "--out", "around/new")
    assert (code, err.count("choose another folder")) == (2, 1)
    monkeypatch.chdir(tmp_path / "around" / "new")
    code, _, err = edit("--edit", "prune", "--quiet", "--out", ".")
    assert (code, err) == (0, "")
    assert Path("edit.json").exists()


def test_the_numbers_come_as_json_and_the_folder_has_a_name(edit, tmp_path):
    """--json prints what edit.json holds, and nothing else."""
    code, out, err = edit("--edit", "prune", "--set", "pattern=2:4", "--json", "--quiet", retain=None)
    assert (code, err) == (0, "")
    printed = json.loads(out)
    assert printed == json.loads((tmp_path / "model-1.5-edited" / "edit.json").read_text())
    assert printed["diagnostics"]["sparsity"] == 0.5
    assert set(printed["nll_before"]) == {"forget"}


def test_notes_are_printed_and_written(edit, tmp_path):
    """A step that 16 bits round away is one: after the numbers, and in edit.json."""
    words = ("--edit", "first_order_influence", "--set", "rate=1e-6", "--dtype", "bfloat16", "--out", "new")
    code, out, err = edit(*words)
    assert (code, err) == (0, "")
    (note,) = json.loads((tmp_path / "new" / "edit.json").read_text())["notes"]
    assert note.startswith("Rounding the weights to bfloat16 left 0 % of the step")
    assert note in " ".join(out.split())


@pytest.mark.full
def test_a_pruned_folder_is_unlearned_with_its_zeros(call, edit, folder, tmp_path):  # noqa: F811
    """The two commands of the help, one after the other."""
    assert edit("--edit", "prune", "--set", "score=wanda", "--set", "sparsity=0.3", "--out", "pruned")[0] == 0
    code, _, err = call(
        "unlearn", "pruned", "--forget", folder / "forget.jsonl", "--holdout", folder / "holdout.jsonl",
        "--mask", "nonzero", "--learning-rate", 3e-4,
        "--retain", folder / "retain.jsonl", "--out", "new",
    )  # fmt: skip
    assert code == 0
    assert err.startswith("2 texts to forget with 24 scored tokens: 2 memorized")
    assert err.count("\n") == 1
    before, after = (models.load(tmp_path / name)[0].state_dict() for name in ("pruned", "new"))
    weight = "model.layers.0.mlp.up_proj.weight"
    assert float((before[weight] == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert torch.equal(before[weight] == 0, after[weight] == 0)
    assert not torch.equal(before[weight], after[weight])


def test_corrected_texts_and_a_fine_tuned_model_are_options(edit, folder, trained, tmp_path):  # noqa: F811
    """Both are given by where they are."""
    corrected = f"corrected={folder / 'unseen.jsonl'}"
    assert edit("--edit", "first_order_influence", "--set", corrected, "--set", "rate=0.01", "--out", "new")[0] == 0
    other = trained.fresh()
    with torch.no_grad():
        other.lm_head.weight.mul_(1.01)
    other.save_pretrained(tmp_path / "other")
    trained.tokenizer.save_pretrained(tmp_path / "other")
    assert edit("--edit", "task_vector", "--set", "fine_tuned=other", "--out", "away")[0] == 0
    away, _ = models.load(tmp_path / "away")
    torch.testing.assert_close(away.lm_head.weight, trained.model.lm_head.weight * 0.99, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--edit", "ekfac"), 'unknown edit .ekfac.: did you mean "ekfac_step"'),
        (("--edit", "ekfac_step", "--set", "rates=1"), 'ekfac_step has no option .rates.: did you mean "rate"'),
        (("--edit", "ekfac_step", "--set", "rate"), "an option is set as name=value, got 'rate'"),
        (("--edit", "ekfac_step", "--set", "rate=fast"), "ekfac_step's rate must be a number, got 'fast'"),
        (("--edit", "ekfac_step", "--set", "samples=1.5"), "samples must be a whole number, got '1.5'"),
        (("--edit", "ekfac_step", "--set", "rate=-1"), "rate must be a number, above 0, got -1.0"),
        (("--edit", "zero_shot_smoothing", "--set", "two_sided=2"), "two_sided must be true or false, got '2'"),
        (("--edit", "task_vector"), "task_vector needs fine_tuned: set fine_tuned="),
        (("--edit", "task_vector", "--set", "fine_tuned=nowhere"), "no language model could be loaded from nowhere"),
    ],
)
def test_what_cannot_be_edited_is_refused_in_one_sentence(edit, tmp_path, arguments, message):
    """Exit code 2, and nothing is written."""
    assert re.search(message, refused(edit(*arguments, "--out", "new"), tmp_path))


def test_edits_that_need_text_to_keep_say_so_and_a_full_folder_is_left_alone(edit, tmp_path):
    """Nothing is written then either."""
    assert "pass retain= (--retain)" in refused(edit("--edit", "ekfac_step", "--out", "new", retain=None), tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert "is not empty" in refused(edit("--edit", "prune", "--out", "full"), tmp_path, present=["full"])
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_edits_are_listed(call):
    """Every function of pyunlearn.edits that makes an EditResult, with its needs and defaults, as list and as JSON."""
    code, out, err = call("edits")
    assert (code, err) == (0, "")
    assert all(name in out for name in EDITS)
    listed = {e["name"]: e for e in json.loads(call("edits", "--json")[1])["edits"]}
    assert set(listed) == set(EDITS)
    functions = {n for n in edits.__all__ if inspect.isfunction(getattr(edits, n))}
    returning = {
        n for n in functions if inspect.signature(getattr(edits, n)).return_annotation in ("EditResult", "Pruned")
    }
    assert set(EDITS) == returning
    assert listed["ekfac_step"]["options"]["rate"] == 0.01
    assert listed["task_vector"]["needs"] == ["fine_tuned"]
    assert all("model" not in e["options"] and "retain" not in e["options"] for e in listed.values())
