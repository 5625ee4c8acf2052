"""Loading models and tokenizers from folders, their context length, and the wrappers around them."""

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from architectures import BOTH, CAUSAL, KV, V, batch_for, made, own_log_likelihoods
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from pyunlearn.errors import ArgumentError, ModelError
from pyunlearn.models import LanguageModel, Likelihood, load
from pyunlearn.models.config import LoadOptions
from pyunlearn.models.inspection import unwrapped
from pyunlearn.models.loading import load_options, load_tokenizer, load_weights, require_loadable


def test_context_length():
    """It is the number of positions, or None where positions are relative as in T5."""

    def context_length(model):
        return LanguageModel.of(model, needs_tokenizer=False).context_length

    assert context_length(made(CAUSAL["gpt2"])) == 64
    assert context_length(made(BOTH["t5, tied"])) is None
    assert context_length(made(CAUSAL["bloom"])) is None
    assert context_length(tf.LlamaForCausalLM(tf.LlamaConfig(**KV, max_position_embeddings=77))) == 77


def test_wrappers_are_removed():
    """These are torch.compile, DDP and PEFT, in any order."""
    model = made(CAUSAL["llama"])
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    parallel = type("DistributedDataParallel", (torch.nn.Module,), {})()  # a real one needs a process group
    parallel.module = adapted
    assert unwrapped(model) is unwrapped(torch.compile(parallel)) is model


def save_tokenizer(folder):
    """Save a tokenizer that has one word."""
    raw = Tokenizer(WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    tf.PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(folder)


@pytest.mark.parametrize("name", ["llama", "t5, its own head"])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_saved_model_is_loaded(name, adapted, tmp_path):
    """A model, or an adapter with its base, has the same log-likelihoods, the dtype passed, and trains as before."""
    model, batch = made((CAUSAL | BOTH)[name]), batch_for(name)
    model.save_pretrained(tmp_path / "base")
    where = tmp_path / "base"
    if adapted:
        target = ["q_proj"] if name == "llama" else ["q"]
        model = get_peft_model(
            type(model).from_pretrained(where), LoraConfig(target_modules=target, init_lora_weights=False)
        ).eval()
        where = tmp_path / "adapter"
        model.save_pretrained(where)
    save_tokenizer(where)
    loaded, tokenizer = load(where)
    assert tokenizer("a")["input_ids"] == [1]
    torch.testing.assert_close(
        Likelihood(loaded.eval())(batch), own_log_likelihoods(model, batch), rtol=1e-5, atol=1e-5
    )
    assert {p.dtype for p in load(where, dtype=torch.bfloat16)[0].parameters()} == {torch.bfloat16}
    trains = {n for n, p in loaded.named_parameters() if p.requires_grad}
    assert trains == {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "adapter_config.json").exists() == adapted


def test_the_device_auto_spreads_layers(tmp_path, monkeypatch):
    """Where there are several accelerators, transformers gets a device_map; several processes are refused."""
    made(CAUSAL["gpt2"]).save_pretrained(tmp_path)
    maps = []

    def from_pretrained(*_, **options):
        maps.append(options.get("device_map"))
        raise ValueError("enough")

    monkeypatch.setattr(tf.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    for count in (1, 2):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda count=count: count)
        with load_options(LoadOptions(device="auto")), pytest.raises(ModelError, match="enough"):
            load(tmp_path)
    assert maps == [None, "auto"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(ArgumentError, match="the launcher started 2: start one process"),
        load_options(LoadOptions(device="auto")),
    ):
        pass


def test_a_saved_trunk_is_refused(tmp_path):
    """transformers would initialize the missing head at random; one sentence says that it is missing."""
    tf.LlamaModel(tf.LlamaConfig(**KV)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="has no language-model head"):
        load(tmp_path)


def test_a_model_that_was_not_saved_whole_is_refused(tmp_path):
    """A file without one of its weights, and a trunk whose head has more than one matrix that is the embedding's."""
    made(CAUSAL["llama"]).save_pretrained(tmp_path / "part")
    file = tmp_path / "part" / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, file, {"format": "pt"})
    config = tf.BertConfig(vocab_size=V, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    tf.BertModel(config).save_pretrained(tmp_path / "trunk")
    for name, first in (("part", r"1 of its \d+ tensors \(model.layers.0.mlp.up_proj.weight\)"), ("trunk", "cls.pred")):
        with pytest.raises(ModelError, match=rf"lacks .*{first}.*would be random: give one that was saved whole"):
            load(tmp_path / name)


@pytest.mark.parametrize("name", [*CAUSAL, *BOTH])
def test_a_model_that_was_saved_whole_is_loaded(name, tmp_path):
    """Shared tensors are saved once, and some buffers not at all."""
    model = made((CAUSAL | BOTH)[name])
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    loaded, _ = load(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), loaded.parameters(), strict=True))


def test_an_empty_folder_and_an_unknown_name_are_refused(tmp_path):
    """One sentence each."""
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        load(tmp_path)
    with pytest.raises(ModelError, match="no language model could be loaded from no/such-model"):
        load("no/such-model")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    """The sentence is about the tokenizer; a missing head is reported before a missing tokenizer."""
    made(CAUSAL["llama"]).save_pretrained(tmp_path / "whole")
    with pytest.raises(ModelError, match=r"no tokenizer could be loaded from .*--tokenizer"):
        load(tmp_path / "whole")
    tf.LlamaModel(tf.LlamaConfig(**KV)).save_pretrained(tmp_path / "trunk")
    with pytest.raises(ModelError, match="no language-model head"):
        load(tmp_path / "trunk")


@pytest.mark.parametrize(
    "name", ["./no-model", "../no-model", "/no/model", "~/no-model", "no/such/model", "tests/no-model", "no model", "."]
)
def test_what_looks_like_a_path_is_not_looked_up_on_the_hub(name, monkeypatch):
    """A typo gets its sentence at once, without a request and its retries."""
    monkeypatch.setattr(tf.AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("a request"))
    monkeypatch.chdir(Path(__file__).parent.parent)
    with pytest.raises(ModelError, match=r"no language model could be loaded from|holds no config"):
        load(name)
    with pytest.raises(ModelError, match=r"the reference_model|holds no config"):
        require_loadable("reference_model", name)
    with pytest.raises(ModelError, match="no tokenizer could be loaded"):
        load_tokenizer(name) if name != "." else load_tokenizer("./no-tokenizer")


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    """~ is replaced, as a shell does it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    made(CAUSAL["llama"]).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    require_loadable("model", "~/model")
    assert load("~/model")[1]("a")["input_ids"] == [1]


def test_code_in_a_model_folder_does_not_run(tmp_path):
    """A folder can name a Python file of its own: it is read only with `trust_remote_code`."""
    made(CAUSAL["llama"]).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise ImportError('own')\n")
    for attempt in (lambda: load(tmp_path / "model"), lambda: load_weights(tmp_path / "model")):
        with pytest.raises(ValueError, match=r"trust.remote.code"):
            attempt()
    assert not (tmp_path / "ran").exists()
    with load_options(LoadOptions(trust_remote_code=True)), pytest.raises(ModelError, match="own"):
        load(tmp_path / "model")
    assert (tmp_path / "ran").exists()
