"""The hidden states of one layer of any model: computed without the layers above, and the parameters below."""

from dataclasses import replace

import peft
import pytest
import torch
import transformers as hf

from pyunlearn.data import Tokens, collate
from pyunlearn.errors import ArgumentError
from pyunlearn.models import inputs_of
from pyunlearn.models.hidden_states import Layer, blocks, trainable

_SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2}
_GPT2 = {
    "vocab_size": 50,
    "n_positions": 64,
    "n_embd": 16,
    "n_layer": 4,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_T5 = {
    "vocab_size": 50,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 40,
    "num_layers": 2,
    "num_decoder_layers": 4,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
KINDS = {
    "llama": (hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**_GROUPED), "model.layers.{}.mlp.down_proj.weight"),
    "qwen2": (hf.Qwen2ForCausalLM, lambda: hf.Qwen2Config(**_GROUPED), "model.layers.{}.mlp.down_proj.weight"),
    "gemma2": (
        hf.Gemma2ForCausalLM,
        lambda: hf.Gemma2Config(**_GROUPED, head_dim=4),
        "model.layers.{}.mlp.down_proj.weight",
    ),
    "phi3": (hf.Phi3ForCausalLM, lambda: hf.Phi3Config(**_GROUPED), "model.layers.{}.mlp.down_proj.weight"),
    "mixtral": (
        hf.MixtralForCausalLM,
        lambda: hf.MixtralConfig(**_GROUPED, num_local_experts=4),
        "model.layers.{}.mlp.experts.down_proj",
    ),
    "gpt2": (hf.GPT2LMHeadModel, lambda: hf.GPT2Config(**_GPT2), "transformer.h.{}.mlp.c_proj.weight"),
    "neox": (hf.GPTNeoXForCausalLM, lambda: hf.GPTNeoXConfig(**_SMALL), "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight"),
    "opt": (
        hf.OPTForCausalLM,
        lambda: hf.OPTConfig(**{**_SMALL, "ffn_dim": 40, "word_embed_proj_dim": 16}),
        "model.decoder.layers.{}.fc2.weight",
    ),
    "t5": (
        hf.T5ForConditionalGeneration,
        lambda: hf.T5Config(**_T5),
        "decoder.block.{}.layer.2.DenseReluDense.wo.weight",
    ),
}


def made(kind):
    """Return a model of that kind with random weights, without dropout."""
    torch.manual_seed(0)
    make, config, _ = KINDS[kind]
    return make(config()).eval()


def batch_for(model):
    """Return a batch of three examples of different lengths, the first with a prompt of four tokens."""
    both = model.config.is_encoder_decoder
    rows = [(range(5, 14), 4), (range(20, 24), 1), (range(30, 43), 1)]
    tokens = [Tokens((9, 8, 7), f, tuple(ids)) if both else Tokens(tuple(ids), f) for ids, f in rows]
    return collate(tokens, pad_id=0, decoder_start_id=0 if both else None)


@pytest.fixture(params=KINDS)
def model(request):
    """Return a model of each architecture, four layers deep."""
    return made(request.param)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_it_is_the_hidden_state_that_transformers_gives(model, index):
    """It equals output_hidden_states where scored tokens are predicted, in the decoder if there is one."""
    batch = batch_for(model)
    with torch.no_grad():
        out = model(**inputs_of(batch), output_hidden_states=True)
        states_of_layer = Layer(model, index)(batch)
    states = out.decoder_hidden_states if model.config.is_encoder_decoder else out.hidden_states
    wanted = torch.stack([states[index + 1].flatten(0, 1)[row] for row in batch.rows])
    assert states_of_layer.shape == (int(batch.counts.sum()), 16)
    torch.testing.assert_close(states_of_layer, wanted, rtol=0, atol=0)


def test_nothing_above_the_layer_is_computed(model):
    """No later layer and no head runs, the hook is removed, and the model works as before."""
    batch, ran = batch_for(model), []
    every = [*blocks(model), model.get_output_embeddings()]
    with torch.no_grad():
        before = model(**inputs_of(batch)).logits
    handles = [m.register_forward_pre_hook(lambda *_, i=i: ran.append(i)) for i, m in enumerate(every)]
    Layer(model, 1)(batch)
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]
    assert not any(m._forward_hooks for m in blocks(model))
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs_of(batch)).logits, before, rtol=0, atol=0)


def test_only_trainable_parameters_get_a_gradient(model):
    """The down projections up to the layer get a gradient, and no parameter above does."""
    Layer(model, 2)(batch_for(model)).square().sum().backward()
    for name, p in trainable(model, 2).items():
        assert p.grad.abs().max() > 0, name
    assert all(p.grad is None for p in blocks(model)[3].parameters())


@pytest.mark.usefixtures("one_thread")  # with more, the rows of an expert decide how a product is split
def test_padding_does_not_count(model):
    """An example has the same states in a padded batch as alone, with any padding token."""
    batch = batch_for(model)
    with torch.no_grad():
        together = Layer(model, 2)(batch)
        other = Layer(model, 2)(replace(batch, ids=torch.where(batch.attention_mask == 0, 33, batch.ids)))
        both = model.config.is_encoder_decoder
        alone = Layer(model, 2)(
            collate(
                [Tokens((9, 8, 7), 1, tuple(range(20, 24))) if both else Tokens(tuple(range(20, 24)), 1)],
                pad_id=0,
                decoder_start_id=0 if both else None,
            )
        )
    torch.testing.assert_close(together, other, rtol=0, atol=0)
    torch.testing.assert_close(together[batch.example == 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "neox"])
def test_padding_on_the_left_does_not_count_either(kind):
    """With relative positions, rows that are shifted with the text give the same states."""
    model, left = made(kind), torch.tensor([[0, 0, 0, 11, 12, 13], [21, 22, 23, 24, 25, 26]])
    batch = collate([Tokens((11, 12, 13), 1), Tokens((21, 22, 23, 24, 25, 26), 3)], pad_id=0)
    mask = (left != 0).long()
    moved = replace(batch, ids=left, attention_mask=mask, rows=batch.rows + torch.tensor([3, 3, 0, 0, 0]))
    with torch.no_grad():
        torch.testing.assert_close(Layer(model, 2)(moved), Layer(model, 2)(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_down_projections_of_three_layers_are_trained(kind):
    """They are those of the layer and the two below, of all experts; no bias, no attention, no encoder."""
    names = [KINDS[kind][2]]
    if kind == "mixtral" and int(hf.__version__.split(".")[0]) < 5:  # then each expert has a matrix of its own
        names = [f"model.layers.{{}}.block_sparse_moe.experts.{e}.w2.weight" for e in range(4)]

    def of(*layers):
        return [name.format(i) for i in layers for name in names]

    assert list(trainable(made(kind), 3)) == of(1, 2, 3)
    assert list(trainable(made(kind), 0)) == of(0)
    assert list(trainable(made(kind), 3, layers=[0, 3])) == of(0, 3)


def test_parameters_can_be_named():
    """A name or a pattern selects them; embeddings are allowed, for the hidden states depend on them."""
    model = made("llama")
    trains = trainable(model, 1, patterns=["*.1.self_attn.o_proj.weight", "model.embed_tokens.*"])
    assert list(trains) == ["model.embed_tokens.weight", "model.layers.1.self_attn.o_proj.weight"]
    assert list(trainable(model, 2, patterns="*.0.mlp.*")) == [
        f"model.layers.0.mlp.{n}_proj.weight" for n in ("gate", "up", "down")
    ]


def test_with_adapters_theirs_are_trained():
    """Adapters on down projections come before other adapters; a frozen base weight is never trained."""
    for modules, block, wanted in ((["down_proj", "q_proj"], "mlp", "down_proj"), (["q_proj"], "self_attn", "q_proj")):
        model = peft.get_peft_model(made("llama"), peft.LoraConfig(r=2, target_modules=modules, task_type="CAUSAL_LM"))
        trains = trainable(model, 2, layers=[1, 2])
        assert list(trains) == [
            f"base_model.model.model.layers.{i}.{block}.{wanted}.lora_{ab}.default.weight"
            for i in (1, 2)
            for ab in "AB"
        ]
        Layer(model, 2)(batch_for(model.get_base_model())).sum().backward()
        assert all(p.grad is not None for p in trains.values())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: Layer(m, 4), "layer must be a whole number from 0 to 3 with this model, got 4"),
        (lambda m: Layer(m, -1), "from 0 to 3 with this model, got -1"),
        (lambda m: Layer(m, True), "got True"),
        (
            lambda m: trainable(m, 1, layers=[0, 2]),
            r"from 0 to 1, those whose down projections are trained, got \[0, 2\]",
        ),
        (lambda m: trainable(m, 1, layers=1), "layers must be a list"),  # type: ignore[arg-type]
        (lambda m: trainable(m, 1, patterns="*.w2.*"), r"trainable='\*.w2.\*' matches no parameter"),
        (lambda m: trainable(m, 1, patterns="*.mlp.*"), "model.layers.2.mlp.gate_proj.weight lies above layer 1"),
        (lambda m: trainable(m, 3, patterns="lm_head.weight"), "lm_head.weight lies above layer 3"),
        (
            lambda m: trainable(m.requires_grad_(False), 1),
            "none of the parameters that require a gradient is a down projection of layers 0, 1",
        ),
    ],
)
def test_wrong_layers_and_patterns_are_refused(call, message):
    """One sentence names it, and what would do."""
    with pytest.raises(ArgumentError, match=message):
        call(made("llama"))
