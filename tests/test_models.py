"""The fast path through any transformers model gives the model's own log-likelihoods; where it cannot, the slow path runs and says so."""

import warnings

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from pyunlearn.data import Tokens, collate
from pyunlearn.errors import ModelError
from pyunlearn.models import LanguageModel, Likelihood, load
from pyunlearn.models.inspection import unwrapped
from pyunlearn.ops import _backend

V = 96
SMALL = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
KV = SMALL | {"num_key_value_heads": 2}
CAUSAL = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**KV)),
    "llama, tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**KV, tie_word_embeddings=True)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**KV)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**KV, head_dim=8)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**KV)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**KV)),
    "phi, head with bias": lambda: tf.PhiForCausalLM(tf.PhiConfig(**SMALL)),
    "gemma2, softcap": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**KV, head_dim=8, final_logit_softcapping=2.0)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "gpt-neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SMALL)),
    "opt, projected": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=V, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=24
        )
    ),
    "granite, scale": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**KV, logits_scaling=4.0)),
    "cohere, scale": lambda: tf.CohereForCausalLM(tf.CohereConfig(**KV, logit_scale=0.25)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**KV, num_local_experts=4)),
    "olmoe": lambda: tf.OlmoeForCausalLM(tf.OlmoeConfig(**KV, num_experts=4, num_experts_per_tok=2)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**KV, head_dim=8, final_logit_softcapping=3.0)),
    "falcon": lambda: tf.FalconForCausalLM(
        tf.FalconConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    ),
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4)),
}
T5 = {
    "vocab_size": V,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BOTH = {
    "t5, tied": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)),
    "t5, its own head": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
}


def made(make):
    """A small random model, with a head that is not nearly zero."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 if p.dim() > 1 else p + 0.1 * torch.randn_like(p))
    return model.eval()


def batch_for(name):
    """Three texts of different lengths, the first two with a prompt."""
    g = torch.Generator().manual_seed(1)
    ids = [tuple(torch.randint(1, V, (n,), generator=g).tolist()) for n in (5, 9, 7)]
    if name in BOTH:
        return collate([Tokens(i, 0, i[::-1]) for i in ids], pad_id=0, decoder_start_id=0)
    return collate([Tokens(i, first) for i, first in zip(ids, (2, 4, 1), strict=True)], pad_id=0)


def own(model, batch):
    """log_softmax of the model's own logits at the scored rows."""
    inputs = {"input_ids": batch.ids, "attention_mask": batch.attention_mask}
    if batch.decoder_ids is not None:
        inputs["decoder_input_ids"] = batch.decoder_ids
    logits = model(**inputs).logits.flatten(0, 1)[batch.rows]
    return torch.log_softmax(logits.float(), -1).gather(1, batch.targets[:, None]).squeeze(1)


@pytest.mark.parametrize("name", [*CAUSAL, *BOTH])
def test_the_fast_path_gives_the_models_own_numbers(name):
    """Values and the gradients of every parameter, for every architecture, without a warning."""
    model, batch = made((CAUSAL | BOTH)[name]), batch_for(name)
    likelihood = Likelihood(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fast = likelihood(batch)
    assert likelihood.fused is True
    slow = own(model, batch)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(-1, 1, len(fast))
    gradients = []
    for values in (fast, slow):
        model.zero_grad()
        (values * weights).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for n, g in gradients[1].items():
        torch.testing.assert_close(gradients[0][n], g, rtol=2e-4, atol=1e-5, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize("name", ["llama, tied", "gemma2, softcap", "phi, head with bias", "t5, tied", "doubled"])
def test_an_objective_is_that_of_the_models_own_numbers(name):
    """Value, parts and every parameter's gradient, on the fast path and on the slow one."""
    model = made({**CAUSAL, **BOTH, "doubled": lambda: Doubled(tf.LlamaConfig(**KV))}[name])
    batch, likelihood = batch_for(name), Likelihood(model)
    reference = -torch.arange(float(len(batch.counts)))

    def function(sums, counts, reference):
        return torch.sigmoid((sums - reference) / counts)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = likelihood.objective(batch, function, reference)
    assert likelihood.fused == (name != "doubled")
    sums = torch.stack([own(model, batch)[batch.example == i].sum() for i in range(len(batch.counts))])
    wanted = function(sums, batch.counts, reference)
    torch.testing.assert_close(found.log_likelihood, sums.detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.losses, wanted.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(found.counts, batch.counts)
    every = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(loss, every, allow_unused=True) for loss in (found.loss, wanted.sum())]
    for mine, theirs in zip(*gradients, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [*CAUSAL, *BOTH])
def test_padding_changes_nothing(name):
    """An example alone and in a batch with longer ones has the same log-likelihoods."""
    model, batch = made((CAUSAL | BOTH)[name]), batch_for(name)
    together = Likelihood(model)(batch)[batch.example == 0]
    one = batch.ids[:1, : int(batch.attention_mask[0].sum())]
    tokens = (
        Tokens(tuple(one[0].tolist()), 0, tuple(batch.targets[batch.example == 0].tolist()))
        if name in BOTH
        else Tokens(tuple(one[0].tolist()), 2)
    )
    alone = Likelihood(model)(collate([tokens], pad_id=0, decoder_start_id=0 if name in BOTH else None))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_adapters_are_seen():
    """A LoRA-wrapped trunk runs on the fast path with its adapters."""
    model = get_peft_model(
        made(CAUSAL["llama"]), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    batch, likelihood = batch_for("llama"), Likelihood(model.eval())
    torch.testing.assert_close(likelihood(batch), own(model, batch), rtol=1e-5, atol=1e-5)
    assert likelihood.fused is True
    assert unwrapped(model).__class__ is tf.LlamaForCausalLM


def test_an_adapter_on_the_head_takes_the_slow_path():
    """The plain weight would leave it out: one warning, and the model's own numbers."""
    model = get_peft_model(
        made(CAUSAL["llama"]), LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    ).eval()
    batch, likelihood = batch_for("llama"), Likelihood(model)
    with pytest.warns(UserWarning, match="not a plain linear layer"):
        found = likelihood(batch)
    assert likelihood.fused is False
    torch.testing.assert_close(found, own(model, batch), rtol=1e-5, atol=1e-5)


class Doubled(tf.LlamaForCausalLM):
    """Does to its logits what no config says."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 2 * out.logits
        return out


def test_an_unknown_change_of_the_logits_is_noticed():
    """The first batch is computed both ways; where they differ, the model's own logits are used and one warning says why."""
    model, batch = made(lambda: Doubled(tf.LlamaConfig(**KV))), batch_for("llama")
    likelihood = Likelihood(model)
    with pytest.warns(UserWarning, match="differ from those of its own logits"):
        found = likelihood(batch)
    torch.testing.assert_close(found, own(model, batch), rtol=1e-5, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        likelihood(batch)


def test_a_backend_that_cannot_be_had_is_said_before_anything_is_scored(monkeypatch):
    """It is no reason to take the slow path, with a warning about the model."""
    why = "PYUNLEARN_BACKEND must be cuda, cpu or reference, got 'gpu'"
    monkeypatch.setattr(_backend, "on_cpu", lambda: (_ for _ in ()).throw(ValueError(why)))
    with pytest.raises(ValueError, match=why):
        Likelihood(made(CAUSAL["llama"]))


def test_a_forward_that_needs_its_head_takes_the_slow_path():
    """BART adds a bias of its own to the logits, which hidden states have no room for; its head is left as it was."""
    config = tf.BartConfig(
        vocab_size=V, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32,
    )  # fmt: skip
    model, batch = made(lambda: tf.BartForConditionalGeneration(config)), batch_for("t5, tied")
    torch.nn.init.normal_(model.final_logits_bias)
    likelihood = Likelihood(model)
    with pytest.warns(UserWarning, match="does not run without its head") as warned:
        found = likelihood(batch)
    assert len(warned) == 1
    assert "forward" not in vars(model.lm_head)
    torch.testing.assert_close(found, own(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_disagreement(dtype):
    """A 16-bit model stays on the fast path, which is nearer to the truth than its own rounded logits are."""
    exact, batch = made(CAUSAL["llama"]), batch_for("llama")
    with torch.no_grad():
        for p in exact.parameters():
            p.copy_(p.to(dtype))
    rounded = made(CAUSAL["llama"]).to(dtype)
    likelihood = Likelihood(rounded)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", UserWarning)
        found = likelihood(batch)
        right = own(exact, batch)
        theirs = own(rounded, batch)
    assert likelihood.fused is True
    assert found.dtype is torch.float32
    assert (found - right).square().mean() <= (theirs - right).square().mean() * 1.1


def test_dropout_does_not_fool_the_comparison():
    """A model in training mode is compared without dropout, and stays in training mode."""
    model = tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.5)
    ).train()
    likelihood = Likelihood(model)
    likelihood(batch_for("gpt2"))
    assert likelihood.fused is True
    assert model.training


def test_autocast_is_no_reason_to_leave_the_fast_path():
    """Under bfloat16 autocast the model's own logits are rounded to it, and the comparison allows for that."""
    model, batch = made(CAUSAL["llama"]), batch_for("llama")
    likelihood = Likelihood(model)
    with torch.autocast("cpu", torch.bfloat16):
        likelihood(batch)
    assert likelihood.fused is True


@pytest.mark.parametrize("name", ["llama", "gemma2, softcap", "phi, head with bias", "t5, tied", "doubled"])
def test_greedy_matches(name):
    """Exactly the rows whose target is the argmax of the model's own logits."""
    doubled = {"doubled": lambda: Doubled(tf.LlamaConfig(**KV))}  # which takes the slow path
    model, batch = made((CAUSAL | BOTH | doubled)[name]), batch_for(name)
    inputs = {"input_ids": batch.ids, "attention_mask": batch.attention_mask}
    if batch.decoder_ids is not None:
        inputs["decoder_input_ids"] = batch.decoder_ids
    with torch.no_grad():
        best = model(**inputs).logits.flatten(0, 1)[batch.rows].argmax(-1)
    half = torch.arange(len(best)) % 2 == 0
    batch = type(batch)(**{**vars(batch), "targets": torch.where(half, best, (best + 1) % V)})
    likelihood = Likelihood(model)
    if name == "doubled":
        with pytest.warns(UserWarning, match="differ from"):
            likelihood(batch)
    assert torch.equal(likelihood.greedy_matches(batch), half)


def test_a_model_without_a_head_is_refused():
    """One sentence, with the mend."""
    with pytest.raises(ModelError, match=r"must have a language-model head, .*AutoModelForCausalLM"):
        Likelihood(tf.LlamaModel(tf.LlamaConfig(**KV)))
    with pytest.raises(ModelError, match="must be a transformers language model"):
        Likelihood(torch.nn.Linear(2, 2))


def test_context_length():
    """Positions where there are any, no limit for T5's relative ones."""

    def context_length(model):
        return LanguageModel.of(model, needs_tokenizer=False).context_length

    assert context_length(made(CAUSAL["gpt2"])) == 64
    assert context_length(made(BOTH["t5, tied"])) is None
    assert context_length(made(CAUSAL["bloom"])) is None
    assert context_length(tf.LlamaForCausalLM(tf.LlamaConfig(**KV, max_position_embeddings=77))) == 77


def test_wrappers_come_off():
    """torch.compile, DDP and PEFT, in any order, are looked through."""
    model = made(CAUSAL["llama"])
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    parallel = type("DistributedDataParallel", (torch.nn.Module,), {})()  # a real one needs a process group
    parallel.module = adapted
    assert unwrapped(model) is unwrapped(torch.compile(parallel)) is model


def save_tokenizer(folder):
    """A tokenizer that knows one word, beside a model."""
    raw = Tokenizer(WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    tf.PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(folder)


@pytest.mark.parametrize("name", ["llama", "t5, its own head"])
@pytest.mark.parametrize("adapted", [False, True])
def test_what_was_saved_is_loaded(name, adapted, tmp_path):
    """A saved model, or an adapter beside its base, comes back with the same log-likelihoods, in the dtype asked for, and trains; an adapter is saved as one."""
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
    torch.testing.assert_close(Likelihood(loaded.eval())(batch), own(model, batch), rtol=1e-5, atol=1e-5)
    assert {p.dtype for p in load(where, dtype=torch.bfloat16)[0].parameters()} == {torch.bfloat16}
    trains = {n for n, p in loaded.named_parameters() if p.requires_grad}
    assert trains == {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "adapter_config.json").exists() == adapted


def test_a_saved_trunk_is_refused(tmp_path):
    """transformers would make up the missing head at random; we say that it is missing."""
    tf.LlamaModel(tf.LlamaConfig(**KV)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="has no language-model head"):
        load(tmp_path)


def test_nothing_to_load(tmp_path):
    """An empty folder and a name that leads nowhere are one sentence each."""
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        load(tmp_path)
    with pytest.raises(ModelError, match="no language model could be loaded from no/such-model"):
        load("no/such-model")


def test_a_folder_without_a_tokenizer(tmp_path):
    """The model loads, so the sentence is about the tokenizer, and a missing head is found before a missing tokenizer."""
    made(CAUSAL["llama"]).save_pretrained(tmp_path / "whole")
    with pytest.raises(ModelError, match=r"no tokenizer could be loaded from .*--tokenizer"):
        load(tmp_path / "whole")
    tf.LlamaModel(tf.LlamaConfig(**KV)).save_pretrained(tmp_path / "trunk")
    with pytest.raises(ModelError, match="no language-model head"):
        load(tmp_path / "trunk")
