"""Conditions of a model that cannot be read or changed: one sentence each, in every function that takes a model."""

import copy
import json
import types

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from test_documents import blocks, short_runs  # noqa: F401  a fixture
from test_public import ROOT
from unlearning_runs import run, same

import pyunlearn
from pyunlearn import edits
from pyunlearn.errors import ModelError, TrainingError
from pyunlearn.models.condition import require_on_one_device, require_trainable, to_device

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def untrained():
    """An untrained Llama and its tokenizer."""
    tokenizer = tiny.make_tokenizer()
    torch.manual_seed(0)
    return tiny.tiny_llama(len(tokenizer)).eval(), tokenizer


def lora(model, **options):
    """Return the model with a LoRA adapter."""
    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=4), **options)


FORGET, RETAIN, UNSEEN = tiny.sentences(2, 1), tiny.sentences(6, 2), tiny.sentences(30, 3)


def calls(model, tokenizer):
    """Name -> call of each function that changes the weights."""
    common = {"tokenizer": tokenizer, "retain": RETAIN, "progress": False}
    return {
        "unlearn": lambda: pyunlearn.unlearn(model, FORGET, holdout=UNSEEN, max_steps=1, **common),
        "compare": lambda: pyunlearn.compare(
            model, FORGET, holdout=UNSEEN, methods=["ga"], max_steps=1, plot=False, **common
        ),
        "edit": lambda: edits.prune(model, FORGET, **common),
    }


def on_meta(model):
    """Put one layer on the meta device."""
    model.model.layers[1].to("meta")
    return model


def frozen(model):
    """Freeze all parameters."""
    return model.requires_grad_(False)


def of_inference(model):
    """Copy the parameters in inference mode."""
    with torch.inference_mode():
        return copy.deepcopy(model)


def offloaded(model):
    """Offload the layers as accelerate does."""
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device=torch.device("cpu"))


def mapped(model):
    """Return the model with the device map of a large model."""
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "disk", "lm_head": "cpu"}
    return model


def quantized(model):
    """Return the model as bitsandbytes leaves it, by its attributes."""
    model.is_quantized, model.quantization_method = True, types.SimpleNamespace(value="bitsandbytes")
    for p in model.model.layers.parameters():
        p.requires_grad_(False)
    return model


def dynamic(model):
    """Quantize the linear layers dynamically to int8."""
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


CONDITIONS = {
    "meta": (on_meta, r"not all loaded: model\.layers\.1\.\S+ is on the meta device"),
    "frozen": (frozen, "no parameter of model requires a gradient"),
    "inference mode": (of_inference, "made in torch.inference_mode"),
    "offloaded": (offloaded, "parts of model are offloaded .*accelerate.*one device"),
    "mapped": (mapped, r"parts of model are offloaded \(hf_device_map has cpu, disk\)"),
    "quantized": (quantized, r"model is quantized \(bitsandbytes\).* add an adapter"),
    "int8 dynamic": (dynamic, r"model is quantized \(\w+\).* add an adapter"),
}


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("name", ["unlearn", "compare", "edit"])
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_cannot_be_changed_is_refused_in_one_sentence(untrained, condition, name):
    """It says what is wrong and how to mend it."""
    change, sentence = CONDITIONS[condition]
    model = change(copy.deepcopy(untrained[0]))
    with pytest.raises(ModelError, match=sentence) as error:
        calls(model, untrained[1])[name]()
    assert "\n" not in str(error.value)


def test_an_audit_refuses_a_model_that_is_not_loaded(untrained):
    """It says which weight has no values."""
    model, tokenizer = untrained
    with pytest.raises(ModelError, match=r"not all loaded: model\.layers\.1"):
        pyunlearn.audit(on_meta(copy.deepcopy(model)), FORGET, holdout=UNSEEN, tokenizer=tokenizer)


@pytest.mark.filterwarnings("ignore:LlamaForCausalLM")
@pytest.mark.filterwarnings("ignore:You are calling .generate")  # of transformers 4, which looks at the weights' device
def test_an_offloaded_model_is_audited(untrained, tmp_path):
    """An audit changes nothing; only a cache, which is named by the weights, needs them in memory."""
    model, tokenizer = untrained
    options = {"holdout": UNSEEN, "tokenizer": tokenizer, "progress": False}
    away = offloaded(copy.deepcopy(model))
    here, there = (pyunlearn.audit(each, FORGET, **options).examples for each in (model, away))
    assert [e.exposure for e in here] == pytest.approx([e.exposure for e in there], abs=1e-3)
    with pytest.raises(ModelError, match="is offloaded: leave out cache"):
        pyunlearn.audit(away, FORGET, cache=tmp_path / "cache", **options)


def test_an_adapter_on_a_quantized_model_trains(untrained):
    """So do an adapter on a model of another dtype, and a model of which a part is frozen."""
    require_trainable(lora(quantized(copy.deepcopy(untrained[0]))))
    require_trainable(lora(copy.deepcopy(untrained[0]).to(torch.bfloat16)))


def test_adapters_of_another_dtype_are_trained(story):
    """Adapters in float32 on a base in bfloat16, as peft makes them; the base stays as it is."""
    model = lora(story.fresh().to(torch.bfloat16))
    assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {torch.float32}
    result = run(story, model=model, max_steps=2)
    assert result.history[0]["gradient_norm"] > 0
    assert same(model.unload(), story.fresh().to(torch.bfloat16))


def test_dtypes_that_do_not_fit_together_are_refused_in_one_sentence(untrained):
    """By every function, before anything is changed."""
    model, tokenizer = copy.deepcopy(untrained[0]), untrained[1]
    model.model.layers[1].to(torch.bfloat16)
    for call in calls(model, tokenizer).values():
        with pytest.raises(ModelError, match=r"several dtypes \(bfloat16, float32\) .* convert them to one"):
            call()


def test_a_tokenizer_larger_than_the_embedding_is_refused_in_one_sentence(untrained):
    """By every function; a padding token outside the embedding will do, for padding is not read."""
    model, tokenizer = copy.deepcopy(untrained[0]), untrained[1]
    model.resize_token_embeddings(200)
    for call in [*calls(model, tokenizer).values(), lambda: pyunlearn.audit(model, FORGET, tokenizer=tokenizer)]:
        with pytest.raises(ModelError, match=r"more tokens than the model: .* the embedding has 200 rows"):
            call()
    larger = copy.deepcopy(tokenizer)
    larger.add_special_tokens({"pad_token": "<new>"})
    assert larger.pad_token_id == untrained[0].get_input_embeddings().weight.shape[0]
    result = pyunlearn.unlearn(
        copy.deepcopy(untrained[0]), FORGET, holdout=UNSEEN, tokenizer=larger, max_steps=1, progress=False
    )
    assert result.stopped == "nothing memorized"


def spread(model):
    """Return a model with accelerate's hook and weights on two devices, of which one is none that computes."""
    model._hf_hook = object()
    return on_meta(model)


def test_a_model_on_several_devices_is_not_moved(untrained):
    """And several processes cannot share it; tests/test_second_device.py runs such models."""
    model, one = spread(copy.deepcopy(untrained[0])), copy.deepcopy(untrained[0])
    places = [p.device.type for p in model.parameters()]
    assert to_device(model, torch.device("cpu")) is model
    assert [p.device.type for p in model.parameters()] == places
    assert {p.device.type for p in to_device(one, torch.device("meta")).parameters()} == {"meta"}
    require_on_one_device(model, 1)
    require_on_one_device(one, 2)
    with pytest.raises(ModelError, match=r"several devices \(device_map\), and this launch has 2 processes.*start one"):
        require_on_one_device(model, 2)


@pytest.mark.full
def test_the_python_of_large_models_md_runs(story, tmp_path, monkeypatch, short_runs):  # noqa: F811
    """Without a GPU, where "auto" is the CPU."""
    monkeypatch.chdir(tmp_path)
    for each in (story.model, story.tokenizer):
        each.save_pretrained(tmp_path / "my-model")
    for name, texts in (("secrets", story.forget), ("keep", story.retain)):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    names = {"pyunlearn": pyunlearn}
    for code in blocks(ROOT / "docs" / "large-models.md", ("python",)):
        exec(code, names)
    assert len(names["result"].history) == 2
    assert (tmp_path / "my-model-unlearned" / "model.safetensors").exists()


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_gradients_that_the_caller_has_switched_off(story, off):
    """A run switches them on for itself: the result is the same."""
    whole, model = run(story, max_steps=2), story.fresh()
    with off():
        result = run(story, model=model, max_steps=2)
    assert same(result.model, whole.model)


@pytest.mark.parametrize("without", ["adapter", "mask"])
def test_a_run_without_gradient_says_so(story, tmp_path, without):
    """In place of a run of max_steps in which nothing changes; nothing is left to resume.

    The mask lets the embedding of padding change, which is in no text.
    """
    model, options = story.fresh(), {}
    if without == "adapter":
        model = lora(model)
        model.base_model.disable_adapter_layers()
        for name, p in model.named_parameters():
            p.requires_grad_("lora" in name)
    else:
        options["mask"] = {n: torch.zeros(p.shape, dtype=torch.bool) for n, p in model.named_parameters()}
        options["mask"]["model.embed_tokens.weight"][story.tokenizer.pad_token_id] = True
    with pytest.raises(
        TrainingError, match=r"no gradient in the first steps.*an adapter that is not active.* the mask"
    ):
        run(story, model=model, batch_size=1, max_steps=20, output_dir=tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []
