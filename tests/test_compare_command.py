"""The command `pyunlearn compare`."""

import json

import pytest
import tiny

from pyunlearn.comparing import trial


@pytest.fixture(scope="module")
def trained(one_thread):
    return tiny.trained(tiny.tiny_llama, tiny.sentences, count=200, repeats=8, epochs=6)


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    """A saved model, and the texts as files next to it."""
    folder = tmp_path_factory.mktemp("saved")
    for part in (trained.model, trained.tokenizer):
        part.save_pretrained(folder / "model-1.5")
    for role in ("forget", "retain", "holdout"):
        (folder / f"{role}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in getattr(trained, role)))
    return folder


def test_the_command_compares_prints_and_writes(call, folder, tmp_path):
    """Exit code 0, table and files; run again it resumes; 1 where a method is refused; 2 for other settings."""
    arguments = ["compare", folder / "model-1.5", "--learning-rate", 1e-3, "--max-steps", 4]
    arguments += ["--set", "GA.temperature=1.5"]
    for role in ("forget", "retain", "holdout"):
        arguments += [f"--{role}", folder / f"{role}.jsonl"]
    code, out, err = call(*arguments, "--methods", "ga, simnpo")
    assert (code, err) == (0, "")
    assert "simnpo" in out
    assert "comparison.svg and comparison.png are in model-1.5-compare" in out
    assert json.loads((tmp_path / "model-1.5-compare" / "result.json").read_text())["complete"]
    code, out, _ = call(*arguments, "--methods", "ga,idk", "--json", "--quiet")
    assert code == 1
    assert [r["method"] for r in json.loads(out)["rows"]] == ["ga", "idk", "simnpo"]
    assert json.loads(out)["settings"]["method_options"] == {"ga": {"temperature": 1.5}}
    code, out, _ = call(*arguments, "--methods", "ga, simnpo", "--no-plot")
    assert code == 1  # the row of idk stays
    assert "result.json and table.csv are in model-1.5-compare" in out
    assert "comparison.svg" not in out  # an older one is there
    for wrong, message in (("temperature=1.5", "is set as METHOD.name=value"), ("ga.beta=1", "has no option 'beta'")):
        code, out, err = call(*arguments, "--methods", "ga", "--set", wrong)
        assert (code, out) == (2, "")
        assert message in err
    code, out, err = call(*arguments, "--methods", "ga", "--tau", 0.9)
    assert (code, out) == (2, "")
    assert err.startswith("pyunlearn: the comparison in ")
    assert err.count("\n") == 1


def test_the_command_checks_its_texts(call, folder, tmp_path):
    """A copy in the holdout is refused; what is left out of retain is printed below the table."""
    texts = {role: (folder / f"{role}.jsonl").read_text() for role in ("forget", "holdout")}
    (tmp_path / "mixed.jsonl").write_text(texts["holdout"] + texts["forget"])
    arguments = ["compare", folder / "model-1.5", "--forget", folder / "forget.jsonl", "--methods", "ga"]
    arguments += ["--max-steps", 0, "--no-plot", "-q"]
    code, out, err = call(*arguments, "--holdout", "mixed.jsonl")
    assert (code, out) == (2, "")
    assert "take it out, for the holdout is text that was never trained on" in err
    code, out, err = call(*arguments, "--holdout", folder / "holdout.jsonl", "--retain", "mixed.jsonl")
    assert (code, err) == (0, "")
    note = "2 of 62 retain texts are copies of forget texts and are left out: retain examples 61, 62."
    assert note in " ".join(out.split())
    assert json.loads((tmp_path / "model-1.5-compare" / "result.json").read_text())["notes"] == [note]


def test_an_interrupted_command_says_how_to_resume(call, folder, tmp_path, monkeypatch):
    """Exit code 130."""

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(trial, "run_unlearn", interrupt)
    texts = ["--forget", folder / "forget.jsonl", "--holdout", folder / "holdout.jsonl"]
    code, out, err = call("compare", folder / "model-1.5", *texts, "--out", "c")
    assert (code, out) == (130, "")
    assert "run the same command again" in err
    assert not list(tmp_path.iterdir())
