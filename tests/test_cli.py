"""The command line: what it prints, what it writes, and what it returns."""

import json
import logging
import os
import re
import subprocess
import sys

import pytest
import tiny
import torch
from transformers import LlamaModel, ViTConfig

import pyunlearn
from pyunlearn import models
from pyunlearn.cli import demo
from pyunlearn.methods import METHODS
from pyunlearn.ops import _backend


@pytest.fixture(scope="module")
def trained(one_thread):
    return tiny.trained(tiny.tiny_llama, tiny.sentences, count=800, repeats=12, epochs=8, pad=False)


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    """A saved model, and the texts as files next to it."""
    folder = tmp_path_factory.mktemp("saved")
    trained.model.save_pretrained(folder / "model-1.5")
    trained.tokenizer.save_pretrained(folder / "model-1.5")
    for role in ("forget", "unseen", "retain", "holdout"):
        lines = [json.dumps({"text": text}) + "\n" for text in getattr(trained, role)]
        (folder / f"{role}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def unlearn(call, folder):
    """call("unlearn", the saved model, ...), with the forget set and the holdout by default; without the forecast."""

    def run(*arguments, forget=folder / "forget.jsonl", model=folder / "model-1.5"):
        code, out, err = call(
            "unlearn",
            model,
            "--forget",
            forget,
            "--holdout",
            folder / "holdout.jsonl",
            "--learning-rate",
            3e-4,
            *arguments,
        )
        return code, out, re.sub(r"[\d,]+ texts? to forget with .*\n", "", err)

    return run


def test_unlearn_says_on_standard_error_what_it_will_take(call, folder, tmp_path):
    """Not with --quiet."""
    options = ("unlearn", folder / "model-1.5", "--forget", folder / "forget.jsonl", "--max-steps", 0)
    err = call(*options, "--holdout", folder / "holdout.jsonl", "--out", "new")[2]
    assert err == "2 texts to forget with 24 scored tokens: 2 memorized, no step to take\n"
    assert call(*options, "--holdout", folder / "holdout.jsonl", "--out", "other", "--quiet")[2] == ""


def refused(result, tmp_path, present=()):
    """The sentence, having checked the exit code, that it is one line on standard error, nothing written."""
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.startswith("pyunlearn: ")
    assert err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == set(present)
    return err


# ---------------------------------------------------------------- the run


def test_unlearn_forgets_a_file_and_writes_the_model(unlearn, folder, trained, tmp_path):
    """Exit code 0; a table on standard output; model, tokenizer and result.json in --out, which loads again."""
    code, out, err = unlearn("--retain", folder / "retain.jsonl", "--out", "new")
    assert (code, err) == (0, "")
    assert out.count("forgotten") >= 3
    assert "utility (retain texts set apart, 12 texts)" in " ".join(out.split())
    assert "result.json are in new" in out
    written = json.loads((tmp_path / "new" / "result.json").read_text())
    assert written["forgotten"]
    assert [len(e["text"].split()) for e in written["examples"]] == [len(text.split()) for text in trained.forget]
    assert {word for e in written["examples"] for word in e["text"].split()} == {"•••"}
    assert written["settings"]["forget"] == "forget.jsonl"
    model, tokenizer = models.load(tmp_path / "new")
    assert tokenizer.pad_token is None
    assert not torch.equal(model.lm_head.weight, trained.model.lm_head.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_unlearn_prints_json_and_names_its_folder_after_the_model(unlearn, folder, tmp_path):
    """--json is the whole of standard output, and what result.json holds."""
    code, out, _ = unlearn("--json", "--quiet", forget=folder / "unseen.jsonl")
    assert code == 0
    printed = json.loads(out)
    assert printed["stopped"] == "nothing memorized"
    assert printed == json.loads((tmp_path / "model-1.5-unlearned" / "result.json").read_text())


def test_unlearn_checks_its_texts(unlearn, folder, trained, tmp_path):
    """A copy in the holdout is refused; what is left out of retain is printed with the result, and in result.json."""
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(json.dumps(text.upper()) + "\n" for text in [*trained.holdout[:30], *trained.forget]))
    err = refused(unlearn("--holdout", mixed), tmp_path, present=["mixed.jsonl"])
    assert "holdout example 31" in err
    assert "take it out" in err
    code, out, err = unlearn("--retain", mixed, "--max-steps", 0, "--out", "new", forget=folder / "forget.jsonl")
    assert (code, err) == (1, "")
    note = "2 of 32 retain texts are copies of forget texts and are left out: retain examples 31, 32."
    assert note in " ".join(out.split())
    assert json.loads((tmp_path / "new" / "result.json").read_text())["notes"] == [note]


def test_unlearn_returns_1_when_something_is_still_exposed(unlearn, tmp_path):
    """The best state is saved all the same."""
    code, out, _ = unlearn("--max-steps", 1, "--learning-rate", 1e-6, "--out", "new")
    assert code == 1
    assert "still exposed" in out
    assert "stopped: max_steps" in out
    assert not json.loads((tmp_path / "new" / "result.json").read_text())["forgotten"]


def test_unlearn_sets_options_of_the_method(unlearn, folder, tmp_path):
    """--set name=value, numbers and lists as in JSON, reach the run; a wrong one is refused in one sentence."""
    options = ("--method", "rmu", "--retain", folder / "retain.jsonl", "--max-steps", 1, "--out", "new")
    assert (
        unlearn(*options, "--set", "layer=0", "--set", "alpha=2.5", "--set", 'trainable=["*.0.mlp.down_proj.*"]')[0]
        == 1
    )
    wanted = {"layer": 0, "alpha": 2.5, "trainable": ["*.0.mlp.down_proj.*"]}
    assert json.loads((tmp_path / "new" / "result.json").read_text())["settings"]["method_options"] == wanted
    for word, message in (
        ("layer", "set as name=value, got 'layer'"),
        ("layer=9", "from 0 to 1"),
        ("beta=1", "'rmu' has no option 'beta'"),
    ):
        code, _, err = unlearn(*options[:-1], "other", "--set", word)
        assert code == 2
        assert message in err
        assert not (tmp_path / "other").exists()


def test_unlearn_that_is_interrupted_returns_130_and_goes_on_with_resume(unlearn, tmp_path, monkeypatch):
    """What is left is a checkpoint, and what comes of it is what an uninterrupted run gives."""
    calls = []

    def loss(forget, lengths, **_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forget / lengths

    options = ("--method", "ga")
    assert unlearn("--out", "whole", *options)[0] == 0
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "ga", tiny.with_loss("ga", loss))
        code, out, err = unlearn("--out", "new", *options)
    assert (code, out) == (130, "")
    assert "--resume" in err
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "new.checkpoint.pt"}
    code, _, err = unlearn("--out", "new", "--resume", *options)
    assert (code, err) == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "new"}
    weights = [models.load(tmp_path / name)[0].state_dict() for name in ("whole", "new")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# ---------------------------------------------------------------- what cannot be used


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the forget file .* is empty"),
        (None, "the forget file .* was not found"),
        ('{"sentence": "a b c"}\n', 'no usable column: wanted "text", .* found "sentence"'),
        ('{"prompt": "who?"}\n', 'a "prompt" without "completion"'),
        ('{"text": ', "is not JSON"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(unlearn, tmp_path, content, message):
    """Empty, missing, without a usable column, an answer or JSON: one sentence, no output."""
    path = tmp_path / "texts.jsonl"
    if content is not None:
        path.write_text(content)
    err = refused(unlearn(forget=path), tmp_path, () if content is None else ("texts.jsonl",))
    assert re.search(message, err), err


def test_a_text_of_which_nothing_would_be_scored_is_refused(unlearn, folder, trained, tmp_path):
    """One token, and a tokenizer that puts nothing before it."""
    bare = tiny.make_tokenizer(form="$A")
    bare.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "texts.txt").write_text("a\n")
    result = unlearn("--tokenizer", tmp_path / "tokenizer", forget=tmp_path / "texts.txt")
    assert "has no token to score" in refused(result, tmp_path, ("tokenizer", "texts.txt"))


def test_a_mask_lets_half_of_the_weights_change(unlearn, trained, tmp_path):
    """--mask saliency; a word that is no mask is refused."""
    code, _, err = unlearn("--mask", "saliency", "--retain-loss", "none", "--out", "new")
    assert (code, err) == (0, "")
    model, _ = models.load(tmp_path / "new")
    pairs = [(p, q) for p, q in zip(model.parameters(), trained.model.parameters(), strict=True)]
    changed, size = sum(int((p != q).sum()) for p, q in pairs), sum(p.numel() for p, _ in pairs)
    assert size / 4 < changed <= size / 2 + 1
    assert "got 'salience'" in refused(unlearn("--mask", "salience", "--out", "other"), tmp_path, present=["new"])


def test_a_long_text_is_read_in_windows_or_truncated(unlearn, tmp_path):
    """The table has a row for each window; the line below it says how much was not looked at."""
    (tmp_path / "long.txt").write_text("the cat sees a tree. " * 40)
    code, out, err = unlearn("--max-steps", 0, "--out", "new", forget=tmp_path / "long.txt")
    assert code in (0, 1)
    assert err == ""
    assert all(text in out for text in ("1 (1/", "1 (2/", "Text 1 as a whole: "))
    code, out, err = unlearn("--truncate", "--max-steps", 0, "--out", "cut", forget=tmp_path / "long.txt")
    assert code in (0, 1)
    assert err == ""
    assert re.search(r"Not looked at, since truncate .*: \d+ of \d+\s+tokens", out)


@pytest.mark.parametrize(("typo", "nearest"), [("npoo", "npo"), ("grad-diff", "graddiff")])
def test_a_typo_in_the_method_gets_the_nearest_name(unlearn, tmp_path, typo, nearest):
    """Before the model is even loaded."""
    assert f'did you mean "{nearest}"?' in refused(unlearn("--method", typo), tmp_path)


def test_a_folder_that_is_not_empty_is_refused(unlearn, tmp_path):
    """What lies there stays."""
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine.txt").write_text("precious")
    assert "the output folder new is not empty" in refused(unlearn("--out", "new"), tmp_path, ("new",))
    assert (tmp_path / "new" / "mine.txt").read_text() == "precious"


def test_what_is_no_language_model_is_refused(unlearn, trained, tmp_path):
    """A name that nobody has, an empty folder, a model without a head, and one that sees instead of reads."""
    (tmp_path / "empty").mkdir()
    headless = LlamaModel(trained.model.config)
    headless.save_pretrained(tmp_path / "headless")
    trained.tokenizer.save_pretrained(tmp_path / "headless")
    ViTConfig().save_pretrained(tmp_path / "vit")
    present = {"empty", "headless", "vit"}
    for model, message in (
        ("nowhere/at-all", "no language model could be loaded from nowhere/at-all"),
        (tmp_path / "empty", "holds no config.json"),
        (tmp_path / "headless", "has no language-model head"),
        (tmp_path / "vit", "no language model could be loaded from"),
    ):
        assert message in refused(unlearn(model=model), tmp_path, present)


def test_a_tokenizer_that_is_not_there_is_refused(unlearn, trained, tmp_path):
    """Neither at --tokenizer nor next to the model."""
    trained.model.save_pretrained(tmp_path / "bare")
    refused(unlearn("--tokenizer", "nowhere/at-all"), tmp_path, {"bare"})
    refused(unlearn(model=tmp_path / "bare"), tmp_path, {"bare"})


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--max-steps", -1, "--max-steps must be a whole number, 0"),
        ("--batch-size", 0, "--batch-size must be a whole number, 1"),
        ("--learning-rate", 2, "--learning-rate must be a number, above 0 and below 1"),
        ("--utility-budget", -0.1, "--utility-budget must be a number, 0"),
        ("--method", "graddiff", "needs text to keep"), ("--order", "hard-first", 'did you mean "hard_first"'),
        ("--target-exposure", 5, "--target-exposure must be a number, 0 or more and below 4.32, got"),
    ],
)  # fmt: skip
def test_an_option_out_of_range_is_refused(unlearn, tmp_path, option, value, message):
    """One sentence that names it."""
    assert message in refused(unlearn(option, value), tmp_path)


def test_a_backend_that_does_not_exist_is_refused(call, tmp_path, monkeypatch):
    """PYUNLEARN_BACKEND is a user's mistake like any other."""
    monkeypatch.setenv("PYUNLEARN_BACKEND", "gpu")
    _backend.on_cpu.cache_clear()
    try:
        assert "must be cuda, cpu or reference, got 'gpu'" in refused(call("info"), tmp_path)
    finally:
        monkeypatch.undo()
        _backend.on_cpu.cache_clear()


def test_hopper_is_switched_on_by_1(call, tmp_path, monkeypatch):
    """And `pyunlearn info` says what is wanted of PYUNLEARN_HOPPER when it is anything else."""
    monkeypatch.setenv("PYUNLEARN_HOPPER", "on")
    assert "PYUNLEARN_HOPPER must be 1 or 0, got 'on'" in refused(call("info"), tmp_path)


def test_an_error_of_ours_is_not_hidden(call, folder, monkeypatch):
    """Only a user's mistakes become a sentence; a bug keeps its traceback, and has an exit code of its own."""

    def broken(*_, **__):
        raise ValueError("a bug")

    monkeypatch.setattr(pyunlearn, "unlearn", broken)
    code, out, err = call("unlearn", "m", "--forget", "f.jsonl")
    assert (code, out) == (70, "")
    assert err.endswith("ValueError: a bug\n")


# ---------------------------------------------------------------- info and help


def test_info_shows_the_backend_and_why(call):
    """As a table and as JSON; both hold the same names."""
    code, out, err = call("info", "--json")
    assert (code, err) == (0, "")
    printed = json.loads(out)
    assert printed["pyunlearn"] == pyunlearn.__version__
    assert printed["torch"] == torch.__version__
    assert printed["backend on the CPU"].split()[0] == _backend.on_cpu().kernels
    assert printed["why"]
    assert {"compiled CUDA architectures", "CUDA driver", "CUDA devices"} <= printed.keys()
    code, out, _ = call("info")
    assert code == 0
    assert all(name in out for name in printed)


@pytest.mark.parametrize(("forgotten", "code"), [(True, 0), (False, 1)])
def test_the_demo_returns_1_when_a_text_is_still_exposed(call, monkeypatch, forgotten, code):
    """Its options reach the run; the run itself is tested with the real model."""
    runs = []

    def run(out, *, model, save_model, seed):
        runs.append((str(out), model, save_model, seed))
        return forgotten

    monkeypatch.setattr(demo, "run", run)
    assert call("demo", "--out", "d", "--seed", 5) == (code, "", "")
    assert call("demo", "--model", "some/model") == (code, "", "")
    assert runs == [("d", None, False, 5), ("pyunlearn-demo", "some/model", False, 0)]


@pytest.mark.full
def test_the_demo_takes_any_model(call, tmp_path):
    """One that has read none of the texts has memorized none of them: exit code 0, nothing changed."""
    torch.manual_seed(0)
    tokenizer = tiny.make_tokenizer()
    model = tiny.tiny_llama(len(tokenizer), max_position_embeddings=1024)
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path / "any-model")
    code, out, err = call("demo", "--model", tmp_path / "any-model", "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    assert out.replace("\n", "").startswith(f"{tmp_path / 'any-model'} forgets those of 3 famous texts")
    written = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [e["verdict"] for e in written["examples"]] == ["not memorized"] * 3


def test_the_demo_refuses_a_model_that_is_not_there_before_anything_else(call, tmp_path):
    """One sentence that says what can be given, and nothing printed or written."""
    code, out, error = call("demo", "--model", "nowhere/at-all", "--out", str(tmp_path / "demo"))
    assert code == 2
    assert out == ""
    assert "could be loaded from nowhere/at-all" in error
    assert "a .gguf file or a name on the hub" in error
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("policy", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}])
def test_it_runs_as_a_program(policy):
    """In a process of its own, whose threads do not wait busily, unless the environment says how they wait."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | policy
    environment |= {"PYUNLEARN_BACKEND": "reference", "OMP_DISPLAY_ENV": "true"}
    command = [sys.executable, "-m", "pyunlearn", "info", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=True)
    assert json.loads(done.stdout)["backend on the CPU"] == "reference"
    assert re.search(f"OMP_WAIT_POLICY *= *'{policy.get('OMP_WAIT_POLICY', 'PASSIVE')}'", done.stderr)


def test_what_a_library_logs_does_not_reach_the_terminal(monkeypatch, capsys):
    """Also where it configures the root logger; pyunlearn's own lines are printed once."""
    from pyunlearn.cli.quiet import quiet_libraries, show_lines
    from pyunlearn.progress import logger

    monkeypatch.setattr(logging.root, "handlers", [])
    quiet_libraries()
    show_lines(quiet=False)
    logging.basicConfig(level=logging.INFO)
    logging.getLogger("a_library").warning("chatter")
    logger.info("a line")
    assert capsys.readouterr() == ("", "a line\n")
