"""Models in 4 bits: loaded so from the command line, with exact gradients, unlearned through an adapter."""

import copy
import json

import pytest
import torch
from test_cli import folder, refused, trained  # noqa: F401
from torch import nn

from pyunlearn.errors import DependencyError, ModelError
from pyunlearn.models import LanguageModel, four_bits
from pyunlearn.models.adapters import with_lora
from pyunlearn.models.config import LoadOptions
from pyunlearn.models.loading import load, load_options

needs_bitsandbytes = pytest.mark.skipif(
    not four_bits.importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes is not installed"
)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Failed to load CPU gemm"),
    pytest.mark.filterwarnings("ignore:_check_is_size"),
]


def gradients(model, ids):
    """Return the gradients of the trained parameters."""
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def in_16_bits(model):
    """Return a copy in which plain linear layers hold what the 4-bit layers stand for."""
    import bitsandbytes as bnb

    plain = copy.deepcopy(model)
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(torch.bfloat16)
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=torch.bfloat16)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            parent, _, child = name.rpartition(".")
            setattr(plain.get_submodule(parent), child, linear)
    return plain


@needs_bitsandbytes
@pytest.mark.parametrize("seen", [False, True])
def test_gradients_pass_through_4_bit_layers(folder, seen):  # noqa: F811
    """In evaluation mode, and after the model was scored, they are those of the dequantized weights."""
    with load_options(LoadOptions(dtype="bfloat16", load_in_4bit=True)):
        model, tokenizer = load(folder / "model-1.5")
    lm = with_lora(LanguageModel.of(model.eval(), tokenizer), 4, seed=0)
    torch.manual_seed(0)
    for name, p in lm.module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.02)
    ids = torch.randint(5, 60, (2, 20))
    if seen:
        with torch.no_grad():
            lm.module(input_ids=ids)
    own, exact = gradients(lm.module, ids), gradients(in_16_bits(lm.module), ids)
    assert own.keys() == exact.keys()
    assert len(own) == 28
    for name in own:
        torch.testing.assert_close(own[name], exact[name], rtol=2e-2, atol=1e-4)


@needs_bitsandbytes
def test_a_model_in_4_bits_is_unlearned_through_an_adapter(call, folder, tmp_path):  # noqa: F811
    """The folder holds the adapter alone; without one the run is refused."""
    texts = [f"--{role}={folder / role}.jsonl" for role in ("forget", "retain", "holdout")]
    options = [folder / "model-1.5", *texts, "--load-in-4bit", "--quiet"]
    assert call("unlearn", *options, "--lora", 8, "--out", "new")[0] == 0
    written = json.loads((tmp_path / "new" / "result.json").read_text())
    assert {e["verdict"] for e in written["examples"]} == {"forgotten"}
    assert (tmp_path / "new" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "new" / "model.safetensors").exists()


def test_without_bitsandbytes_one_sentence_says_what_to_install(folder, monkeypatch):  # noqa: F811
    """Before any weight is read."""
    monkeypatch.setattr(four_bits.importlib.util, "find_spec", lambda _: None)
    options = LoadOptions(load_in_4bit=True)
    with load_options(options), pytest.raises(DependencyError, match="run `pip install bitsandbytes`"):
        load(folder / "model-1.5")


def test_weights_packed_for_inference_are_refused():
    """They have no backward pass, and bitsandbytes would train on without one."""
    layer = nn.Linear(2, 2)
    four_bits.keep_differentiable(layer)  # a plain layer is not touched
    assert not hasattr(layer, "support_avx512bf16_for_cpu")
    layer.support_avx512bf16_for_cpu = True
    four_bits.keep_differentiable(layer)
    assert layer.support_avx512bf16_for_cpu is False
    layer.weight.quant_state = type("State", (), {"packing_format_for_cpu": True})()
    with pytest.raises(ModelError, match="packed for inference"):
        four_bits.keep_differentiable(layer)
