"""LoRA adapters that a run makes, saves alone, or merges into the weights."""

import json

import numpy as np
import pytest
import tiny
import torch
import transformers as tf
from test_edits import encoded
from unlearning_runs import Interrupted, run, same, timeless, weights

import pyunlearn
from pyunlearn.errors import ArgumentError, ModelError
from pyunlearn.methods import METHODS
from pyunlearn.models import LanguageModel, load
from pyunlearn.models.adapters import merged, with_lora
from pyunlearn.models.scoring import Scorer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def story():
    return tiny.storyteller()


def adapted(make, seed):
    """Return a bfloat16 model with an adapter; the model is the same for every seed."""
    torch.manual_seed(5)
    return with_lora(LanguageModel.of(make(60).bfloat16(), tiny.make_tokenizer()), 4, seed=seed)


@pytest.mark.parametrize("make", [tiny.tiny_llama, tiny.tiny_gpt2, tiny.tiny_t5])
def test_an_adapter_is_on_all_linear_layers_but_the_head_and_changes_nothing(make):
    """Only it is trained, in float32; the seed decides its numbers; merged untrained, the weights are as before."""
    torch.manual_seed(5)
    plain = make(60).bfloat16()
    lm = adapted(make, 0)
    trains = {n: p.dtype for n, p in lm.module.named_parameters() if p.requires_grad}
    assert all("lora_" in n and "lm_head" not in n for n in trains)
    linear = [n for n, m in plain.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and "lm_head" not in n]
    assert len(trains) == 2 * len(linear) > 0
    assert set(trains.values()) == {torch.float32}
    assert same(weights(lm.module), weights(adapted(make, 0).module))
    assert not same(weights(lm.module), weights(adapted(make, 1).module))
    assert same(weights(merged(lm.module)), weights(plain))


@pytest.mark.parametrize("merge", [False, True])
def test_a_run_trains_an_adapter_at_its_default_rate(story, merge, tmp_path):
    """All texts are forgotten; the folder holds the adapter alone, or a model like the first, with the same numbers."""
    story.fresh().save_pretrained(tmp_path / "model")
    story.tokenizer.save_pretrained(tmp_path / "model")
    result = pyunlearn.unlearn(
        str(tmp_path / "model"), story.forget, retain=story.retain, holdout=story.holdout, lora=8, merge=merge,
        output_dir=tmp_path / "new",
    )  # fmt: skip
    assert result.stopped == "forgotten"
    assert result.utility.interval[1] <= 0.05
    assert result.settings["learning_rate"] == 1e-4
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert ("adapter_model.safetensors" in names, "model.safetensors" in names) == (not merge, merge)
    again, _ = load(tmp_path / "new")
    assert hasattr(again, "peft_config") is not merge
    lm = LanguageModel.of(again.eval(), story.tokenizer)
    means = Scorer(lm, batch_size=4).mean_log_likelihood(encoded(story.tokenizer, story.forget))
    np.testing.assert_allclose(means, [e.log_likelihood_after for e in result.examples], rtol=1e-3)
    assert json.loads((tmp_path / "new" / "result.json").read_text())["settings"]["lora"] == 8


def test_an_interrupted_run_with_an_adapter_resumes(story, tmp_path, monkeypatch):
    """To the numbers of a run that was not interrupted; the checkpoint holds the adapter alone."""
    options = {"lora": 4, "learning_rate": None, "max_steps": 6}
    whole = run(story, **options)
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "ga", tiny.with_loss("ga", Interrupted("ga", 4)))
        assert run(story, **options, output_dir=tmp_path / "out").stopped == "interrupted"
    assert (tmp_path / "out.checkpoint.pt").stat().st_size < 2 * sum(p.nbytes for p in story.model.parameters())
    resumed = run(story, **options, output_dir=tmp_path / "out", resume=True)
    assert timeless(resumed.history) == timeless(whole.history)
    assert same(resumed.model, whole.model)


def test_a_merge_that_undoes_the_run_is_reported(story, monkeypatch):
    """Not as forgotten, and with what to do instead."""

    def lost(model):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.zero_()
        return merged(model)

    monkeypatch.setattr("pyunlearn.unlearning.served_file.merged", lost)
    result = run(story, lora=8, merge=True, learning_rate=None)
    assert result.stopped == "undone by the merge"
    assert not result.forgotten
    assert any("leave out merge and save the adapter" in note for note in result.notes)
    assert {e.verdict for e in result.examples} == {"still exposed"}


def test_an_adapter_names_the_revision_of_its_model(story, tmp_path, monkeypatch):
    """It is made on one commit of a name on the hub, and loaded on that one."""
    model, requests = story.fresh(), []
    model.name_or_path, model.config._commit_hash = "us/model", "0a1b"
    lm = with_lora(LanguageModel.of(model, story.tokenizer), 2, seed=0)
    lm.module.save_pretrained(tmp_path)
    story.tokenizer.save_pretrained(tmp_path)

    def loaded(kind):
        def from_pretrained(name, **options):
            requests.append((name, options["revision"]))
            return model.config if kind == "config" else (story.fresh(), {"missing_keys": set()})

        return from_pretrained

    monkeypatch.setattr(tf.AutoConfig, "from_pretrained", loaded("config"))
    monkeypatch.setattr(tf.AutoModelForCausalLM, "from_pretrained", loaded("model"))
    again, _ = load(tmp_path)
    assert requests[:2] == [("us/model", "0a1b")] * 2  # then the tokenizer in the folder
    assert again.peft_config["default"].r == 2


def test_an_adapter_names_its_model_by_the_whole_path_that_was_given(story, tmp_path, monkeypatch):
    """From any folder it is the same; a link is not followed: in the hub's cache the file behind it has no ending."""
    (tmp_path / "blob").write_text("")
    (tmp_path / "model.gguf").symlink_to(tmp_path / "blob")
    monkeypatch.chdir(tmp_path)
    model = story.fresh()
    model.name_or_path = "./model.gguf"
    adapted = with_lora(LanguageModel.of(model, story.tokenizer), 4, seed=0)
    assert adapted.module.peft_config["default"].base_model_name_or_path == str(tmp_path / "model.gguf")


def test_an_adapter_without_a_readable_configuration_is_refused(tmp_path):
    """In one sentence."""
    for content in ("{", "[1]"):
        (tmp_path / "adapter_config.json").write_text(content)
        with pytest.raises(ModelError, match="no language model could be loaded from"):
            load(tmp_path)


def test_what_cannot_be_adapted_is_refused(story):
    """In one sentence each."""
    lm = with_lora(LanguageModel.of(story.fresh(), story.tokenizer), 2, seed=0)
    with pytest.raises(ArgumentError, match="the model has one already"):
        run(story, model=lm.module, lora=2)
    with pytest.raises(ArgumentError, match="merge needs a model with an adapter that can be merged"):
        run(story, merge=True)
    with pytest.raises(ArgumentError, match="lora must be"):
        run(story, lora=0)
