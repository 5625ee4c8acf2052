"""`pyunlearn.attack` end to end: what it finds, what it says, and that the model stays as it is."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from architectures import CAUSAL, made

import pyunlearn
from pyunlearn.attacks.config import AttackConfig
from pyunlearn.attacks.merging import merging
from pyunlearn.attacks.quantization import quantization, rounded
from pyunlearn.attacks.target import Unsuited
from pyunlearn.data import read_examples
from pyunlearn.errors import ModelError
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.probes.decoding import sampled_continuations
from pyunlearn.progress import Progress
from pyunlearn.report import audit_lines, audit_page

DOCUMENT = Path(__file__).parent.parent / "docs" / "attacks.md"
QUICK = {"relearning_steps": 4, "retain_steps": 4, "relearning_rate": 1e-3, "samples": 2, "progress": False}


def weights(model):
    """Every parameter and whether it requires a gradient."""
    return {name: (p.detach().clone(), p.requires_grad, p.grad is None) for name, p in model.named_parameters()}


def unchanged(before, model):
    """Whether nothing of a model has changed, bit for bit."""
    after = weights(model)
    return all(torch.equal(a[0], after[n][0]) and a[1:] == after[n][1:] for n, a in before.items())


def attacked(world, model=None, forget=None, **options):
    """The result of attacks on a world's model or another one, and on its forget texts or others."""
    texts = {"retain": world.retain, "holdout": world.holdout, "tokenizer": world.tokenizer}
    return pyunlearn.attack(
        world.model if model is None else model,
        world.forget if forget is None else forget,
        **texts,
        **{**QUICK, **options},
    )


def test_memorized_texts_are_exposed_without_an_attack(story):
    """And the model has its weights afterwards, bit for bit, after every attack."""
    model = story.fresh()
    before = weights(model)
    result = attacked(story, model, original=story.model, attacks=["all"])
    assert result.verdicts == {"still exposed": 2}
    assert not result.passed
    assert result.headline.startswith("All 2 texts are still exposed without any attack")
    assert unchanged(before, model)
    assert result.trials[0].returned == 2


def test_unseen_texts_stay_forgotten(story):
    """Texts that no model saw come back under no attack."""
    result = attacked(story, forget=story.unseen)
    assert result.passed
    assert {e.verdict for e in result.examples} == {"stays forgotten"}
    assert "stay forgotten under" in result.headline


def test_a_control_that_is_the_model_itself_is_refused(story):
    """It would cancel everything."""
    with pytest.raises(ModelError, match="as if it were the same model"):
        attacked(story, control=story.fresh(), attacks=["prefix"])


def test_a_control_that_does_not_know_the_kind_exposes_unseen_texts(story):
    """Where there is no holdout, and a note says so; with one they stay forgotten."""
    torch.manual_seed(0)
    control = tiny.tiny_llama(len(story.tokenizer)).eval()
    options = {"tokenizer": story.tokenizer, "attacks": ["prefix"], "control": control, "progress": False}
    for holdout, verdict in ((None, "still exposed"), (story.holdout[10:], "stays forgotten")):
        result = pyunlearn.attack(story.model, story.holdout[:10], holdout=holdout, **options)
        assert set(result.verdicts) == {verdict}
        assert any("a control without it exposes unseen text too" in n for n in result.notes) == (holdout is None)


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


def test_all_attacks_restore_the_weights_after_an_interruption(story, monkeypatch):
    """Ctrl-C in the middle of relearning leaves the model as it was."""
    model = story.fresh()
    before = weights(model)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.optim.AdamW.zero_grad", stop)  # after the first step
    with pytest.raises(KeyboardInterrupt):
        pyunlearn.attack(
            model, story.unseen, holdout=story.holdout, tokenizer=story.tokenizer, attacks=["relearning"], **QUICK
        )
    assert unchanged(before, model)


@pytest.mark.parametrize(("change", "reason"), [("to int8", "quantized"), ("to meta", "offloaded")])
@pytest.mark.parametrize("which", ["model", "original"])
def test_weights_that_cannot_be_mixed_are_not_merged(story, which, change, reason):
    """Neither all but the quantized ones, nor with a traceback."""
    models = {name: LanguageModel.of(story.fresh(), story.tokenizer) for name in ("model", "original")}
    layer = models[which].module.model.layers[0].mlp.down_proj
    weight = layer.weight.to(torch.int8) if change == "to int8" else layer.weight.to("meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(Unsuited, match=reason):
        next(merging(SimpleNamespace(lm=models["model"], original=models["original"])))


@pytest.mark.full
@pytest.mark.parametrize("kind", ["answers", "t5"])
def test_every_kind_of_model_can_be_attacked(kind, request):
    """A GPT-2 and a T5; what one does not allow is left out with a reason."""
    world = request.getfixturevalue(kind)
    model = world.fresh()
    before = weights(model)
    result = attacked(
        world, model, attacks=["all"], relearning_steps=2, retain_steps=2, relearning_rate=1e-3, samples=2
    )
    assert result.verdicts == {"still exposed": 2}
    assert unchanged(before, model)
    assert any("merging was left out: it needs the original model" in note for note in result.notes)
    if kind == "t5":
        assert any("an encoder-decoder model reads no instruction" in note for note in result.notes)


@pytest.mark.full
def test_chats_are_attacked_in_their_template(one_thread):
    """The instruction stands in the user's turn."""
    world = tiny.chatter()
    model = world.fresh()
    model.config.max_position_embeddings = 512  # the instruction is longer than its texts
    result = attacked(world, model, attacks=["instruction"], turns="last")
    assert result.trials[1].name == "instruction, word for word"
    assert result.trials[1].tested == 2


def test_relearning_in_a_temporary_adapter_leaves_nothing_behind(story):
    """No adapter, no gradient, no other weight."""
    pytest.importorskip("peft")
    model = story.fresh()
    names, before = [name for name, _ in model.named_modules()], weights(model)
    for _ in range(2):
        result = attacked(story, model, forget=story.unseen, attacks=["relearning"], relearning_lora=4)
    assert result.trials[1].log_likelihood != pytest.approx(result.trials[0].log_likelihood, abs=1e-6)
    assert [name for name, _ in model.named_modules()] == names
    assert unchanged(before, model)


def test_rounding_is_to_nearest_in_groups():
    """Against a plain loop; the largest of each group stays, and zeros do."""
    torch.manual_seed(0)
    weight = torch.randn(3, 10)
    weight[1] = 0
    expected = weight.clone()
    for row in expected:
        for part in row.split(4):
            scale = part.abs().max() / 7
            if scale > 0:
                part.copy_((part / scale).round() * scale)
    torch.testing.assert_close(rounded(weight, bits=4, group=4), expected, atol=1e-6, rtol=0)


def test_a_mixture_of_experts_is_rounded_whole_or_not_at_all():
    """transformers 5 stacks the experts in one parameter, which is no linear layer."""
    model = made(CAUSAL["mixtral"])
    target = SimpleNamespace(lm=SimpleNamespace(inner=model, module=model))
    target.config, target.bar = AttackConfig(), Progress(False, "")
    target.trial = lambda name, **_: (name, [p.detach().clone() for n, p in model.named_parameters() if "experts" in n])
    before = [p.detach().clone() for n, p in model.named_parameters() if "experts" in n]
    if int(transformers.__version__.split(".")[0]) >= 5:
        with pytest.raises(Unsuited, match="stacks the matrices of several experts"):
            next(quantization(target))
    else:
        _, rounded_experts = next(quantization(target))
        assert not any(torch.equal(p, q) for p, q in zip(before, rounded_experts, strict=True))


def test_sampled_continuations_are_as_many_as_wanted(story):
    """Each starts after the tokens before the scored ones, and none is longer than these."""
    lm = LanguageModel.of(story.model, story.tokenizer)
    tokens = lm.encode({"forget": read_examples(story.forget, role="forget")})["forget"]
    written = sampled_continuations(lm, tokens, count=3, longest=5, batch_size=2)
    assert [len(own) for own in written] == [3, 3]
    assert all(1 <= len(ids) <= 5 for own in written for ids in own)


# ---------------------------------------------------------------- as part of a run and of an audit


def test_a_run_tries_the_attacks_that_it_is_to_withstand(story, tmp_path):
    """They are in result.json, with masked texts, and decide whether the run has passed."""
    result = pyunlearn.unlearn(
        story.fresh(),
        story.forget,
        retain=story.retain,
        holdout=story.holdout,
        tokenizer=story.tokenizer,
        max_steps=1,
        attacks=["default", "prefix"],
        output_dir=tmp_path / "out",
        progress=False,
    )
    assert result.attack is not None
    assert not result.attack.passed
    written = json.loads((tmp_path / "out" / "result.json").read_text())["attack"]
    assert written["verdicts"] == result.attack.verdicts
    assert story.forget[0] not in json.dumps(written)
    for e in result.examples:
        object.__setattr__(e, "verdict", "forgotten")
    assert not result.passed


def test_a_run_whose_attacks_fail_is_saved_by_resuming_without_them(story, tmp_path, monkeypatch):
    """The checkpoint stays, and a warning says so."""
    texts = {"retain": story.retain, "holdout": story.holdout, "tokenizer": story.tokenizer, "progress": False}

    def fails(*args):
        raise ModelError("no attack is possible")

    monkeypatch.setattr("pyunlearn.unlearning.attacked.attacked", fails)
    out = tmp_path / "out"
    with pytest.raises(ModelError, match="no attack is possible"):
        pyunlearn.unlearn(
            story.fresh(), story.forget, max_steps=2, attacks=["prefix"], output_dir=out, checkpoint_every=1e-9, **texts
        )
    result = pyunlearn.unlearn(
        story.fresh(), story.forget, max_steps=2, output_dir=out, checkpoint_every=1e-9, resume=True, **texts
    )
    assert result.attack is None
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_audit_tries_attacks_too(story):
    """And the page says what they brought back."""
    result = pyunlearn.audit(
        story.model,
        story.forget,
        holdout=story.holdout,
        tokenizer=story.tokenizer,
        metrics=[],
        attacks=["prefix"],
        progress=False,
    )
    assert [t.name for t in result.attack.trials] == ["without an attack"] + [
        f"prefix, {x} given" for x in ("1/8", "1/4", "1/2")
    ]
    page = audit_page(result)
    assert "Does it come back?" in page
    assert "prefix, 1/2 given" in page
    assert f"Under attack: {result.attack.headline}" in audit_lines(result)


# ---------------------------------------------------------------- the command


@pytest.fixture
def files(story, tmp_path, monkeypatch):
    """A folder with a model and the texts of each role."""
    monkeypatch.chdir(tmp_path)
    for part in (story.model, story.tokenizer):
        part.save_pretrained("model")
    for name, rows in {"forget": story.forget, "few": story.holdout[:30], "holdout": story.holdout}.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return tmp_path


def test_the_command_writes_a_masked_file(call, files, story):
    """Exit code 1 where something is exposed; --show-text shows the texts."""
    words = [
        "attack",
        str(files / "model"),
        "--forget",
        "forget.jsonl",
        "--holdout",
        "holdout.jsonl",
        "--attacks",
        "prefix",
    ]
    code, out, _ = call(*words)
    assert code == 1
    assert "still exposed" in out
    content = (files / "model-attack" / "attack.json").read_text()
    assert story.forget[0] not in content + out
    code, _, err = call(*words)
    assert (code, err.startswith("pyunlearn: the output folder model-attack is not empty")) == (2, True)
    code, _, _ = call(*words, "--show-text", "--out", "shown", "--json")
    assert story.forget[0] in (files / "shown" / "attack.json").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--holdout", "few.jsonl"], "attacks compare with 39 texts or more that were never trained on"),
        (["--holdout", "holdout.jsonl", "--attacks", "magic"], "--attacks must be a list of different values"),
        (["--holdout", "holdout.jsonl", "--folds", "1"], "--folds must be a whole number, 2 or more"),
        (["--holdout", "holdout.jsonl", "--control", "model"], "control gives each forget text the log-likelihood"),
    ],
)
def test_wrong_input_is_one_sentence(call, files, words, message):
    """Nothing is written."""
    before = sorted(files.iterdir())
    code, _, err = call("attack", "model", "--forget", "forget.jsonl", "--quiet", *words)
    assert code == 2
    assert f"pyunlearn: {message}" in err.replace("\n", " ")
    assert sorted(files.iterdir()) == before
