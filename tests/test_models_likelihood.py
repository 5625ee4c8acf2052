"""The fast path gives a model's own log-likelihoods; where it cannot, its logits are used with a warning."""

import warnings

import pytest
import torch
import transformers as tf
from architectures import BOTH, CAUSAL, KV, V, batch_for, made, own_log_likelihoods
from peft import LoraConfig, get_peft_model

from pyunlearn.data import Tokens, collate
from pyunlearn.errors import ArgumentError, ModelError
from pyunlearn.models import Likelihood
from pyunlearn.models.inspection import unwrapped
from pyunlearn.ops import _backend


@pytest.mark.parametrize("name", [*CAUSAL, *BOTH])
def test_the_fast_path_gives_the_models_own_numbers(name):
    """Values and the gradients of every parameter agree, for every architecture, without a warning."""
    model, batch = made((CAUSAL | BOTH)[name]), batch_for(name)
    likelihood = Likelihood(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fast = likelihood(batch)
    assert likelihood.fused is True
    slow = own_log_likelihoods(model, batch)
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
    """Value, parts and every parameter's gradient agree, on the fast path and on the slow one."""
    model = made({**CAUSAL, **BOTH, "doubled": lambda: Doubled(tf.LlamaConfig(**KV))}[name])
    batch, likelihood = batch_for(name), Likelihood(model)
    reference = -torch.arange(float(len(batch.counts)))

    def function(sums, counts, reference):
        return torch.sigmoid((sums - reference) / counts)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        objective = likelihood.objective(batch, function, reference)
    assert likelihood.fused == (name != "doubled")
    sums = torch.stack([own_log_likelihoods(model, batch)[batch.example == i].sum() for i in range(len(batch.counts))])
    wanted = function(sums, batch.counts, reference)
    torch.testing.assert_close(objective.log_likelihood, sums.detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(objective.losses, wanted.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(objective.counts, batch.counts)
    every = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(loss, every, allow_unused=True) for loss in (objective.loss, wanted.sum())]
    for mine, theirs in zip(*gradients, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [*CAUSAL, *BOTH])
def test_padding_changes_nothing(name):
    """An example has the same log-likelihoods alone and in a batch with longer ones."""
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


def test_adapters_on_the_trunk_are_applied():
    """A LoRA-wrapped trunk runs on the fast path with its adapters."""
    model = get_peft_model(
        made(CAUSAL["llama"]), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    batch, likelihood = batch_for("llama"), Likelihood(model.eval())
    torch.testing.assert_close(likelihood(batch), own_log_likelihoods(model, batch), rtol=1e-5, atol=1e-5)
    assert likelihood.fused is True
    assert unwrapped(model).__class__ is tf.LlamaForCausalLM


def test_an_adapter_on_the_head_takes_the_slow_path():
    """The plain weight would leave it out: there is one warning, and the model's own numbers."""
    model = get_peft_model(
        made(CAUSAL["llama"]), LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    ).eval()
    batch, likelihood = batch_for("llama"), Likelihood(model)
    with pytest.warns(UserWarning, match="not a plain linear layer"):
        values = likelihood(batch)
    assert likelihood.fused is False
    torch.testing.assert_close(values, own_log_likelihoods(model, batch), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- the self-check


class Doubled(tf.LlamaForCausalLM):
    """A model that doubles its logits, which its config does not say."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 2 * out.logits
        return out


def test_an_unknown_change_of_the_logits_is_noticed():
    """The first batch is computed both ways; where they differ, the model's own logits are used with one warning."""
    model, batch = made(lambda: Doubled(tf.LlamaConfig(**KV))), batch_for("llama")
    likelihood = Likelihood(model)
    with pytest.warns(UserWarning, match="differ from those of its own logits"):
        values = likelihood(batch)
    torch.testing.assert_close(values, own_log_likelihoods(model, batch), rtol=1e-5, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        likelihood(batch)


class Raised(tf.LlamaForCausalLM):
    """A model that adds to the logit of one token, which its config does not say."""

    token, amount = 0, 0.0

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits[..., self.token] += self.amount
        return out


@pytest.mark.parametrize("amount", [0.05, 0.002])
def test_a_head_that_is_wrong_by_a_fraction_of_a_nat_is_noticed(amount):
    """The tolerance covers rounding alone: the model's own logits are used, and the warning names the difference."""
    model, batch = made(lambda: Raised(tf.LlamaConfig(**KV))), batch_for("llama")
    model.token, model.amount = int(batch.targets[0]), amount
    likelihood = Likelihood(model)
    with pytest.warns(UserWarning, match=r"differ from those of its own logits by up to 0\.0\d* nats"):
        values = likelihood(batch)
    assert likelihood.fused is False
    torch.testing.assert_close(values, own_log_likelihoods(model, batch), rtol=1e-5, atol=1e-5)


def test_a_lack_of_memory_is_raised_and_not_taken_for_a_fault_of_the_head(monkeypatch):
    """The other way would need more; with memory again the fast path is used, without a warning."""
    model, batch = made(CAUSAL["llama"]).train(), batch_for("llama")
    likelihood = Likelihood(model)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for owner, name in ((model, "forward"), (likelihood, "_from_hidden")):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, full)
                with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
                    likelihood(batch)
            assert likelihood.fused is None
            assert model.training
        likelihood(batch)
    assert likelihood.fused is True


def test_a_workspace_that_cannot_be_is_refused_at_once():
    """It is no reason to take the slow path, with a warning about the model."""
    for workspace in (-1, 1.5, True, "1 GB"):
        with pytest.raises(ArgumentError, match="workspace must be "):
            Likelihood(made(CAUSAL["llama"]), workspace=workspace)


def test_a_backend_that_is_not_available_is_reported_at_once(monkeypatch):
    """It is no reason to take the slow path, with a warning about the model."""
    why = "PYUNLEARN_BACKEND must be cuda, cpu or reference, got 'gpu'"
    monkeypatch.setattr(_backend, "on_cpu", lambda: (_ for _ in ()).throw(ValueError(why)))
    with pytest.raises(ValueError, match=why):
        Likelihood(made(CAUSAL["llama"]))


def test_a_forward_that_needs_its_head_takes_the_slow_path():
    """BART adds a bias of its own to the logits, which hidden states have no room for; its head is restored."""
    config = tf.BartConfig(
        vocab_size=V,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=32,
    )
    model, batch = made(lambda: tf.BartForConditionalGeneration(config)), batch_for("t5, tied")
    torch.nn.init.normal_(model.final_logits_bias)
    likelihood = Likelihood(model)
    with pytest.warns(UserWarning, match="does not run without its head") as warned:
        values = likelihood(batch)
    assert len(warned) == 1
    assert "forward" not in vars(model.lm_head)
    torch.testing.assert_close(values, own_log_likelihoods(model, batch), rtol=1e-5, atol=1e-5)


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
        values = likelihood(batch)
        right = own_log_likelihoods(exact, batch)
        theirs = own_log_likelihoods(rounded, batch)
    assert likelihood.fused is True
    assert values.dtype is torch.float32
    assert (values - right).square().mean() <= (theirs - right).square().mean() * 1.1


def test_dropout_is_off_in_the_self_check():
    """A model in training mode is compared without dropout; afterwards each of its modules is in its own mode again."""
    model = tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.5)
    ).train()
    model.transformer.h[0].eval()  # a frozen layer
    modes = [module.training for module in model.modules()]
    likelihood = Likelihood(model)
    likelihood(batch_for("gpt2"))
    assert likelihood.fused is True
    assert [module.training for module in model.modules()] == modes


def test_autocast_does_not_leave_the_fast_path():
    """Under bfloat16 autocast the model's own logits are rounded to it, and the comparison allows for that."""
    model, batch = made(CAUSAL["llama"]), batch_for("llama")
    likelihood = Likelihood(model)
    with torch.autocast("cpu", torch.bfloat16):
        likelihood(batch)
    assert likelihood.fused is True


@pytest.mark.parametrize("name", ["llama", "gemma2, softcap", "phi, head with bias", "t5, tied", "doubled"])
def test_greedy_matches(name):
    """They are exactly the rows whose target is the argmax of the model's own logits."""
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
    """One sentence names the class that came and the one to load instead."""
    with pytest.raises(ModelError, match=r"must have a language-model head, .*AutoModelForCausalLM"):
        Likelihood(tf.LlamaModel(tf.LlamaConfig(**KV)))
    with pytest.raises(ModelError, match="must be a transformers language model"):
        Likelihood(torch.nn.Linear(2, 2))
