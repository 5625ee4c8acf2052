"""Gradient checkpointing in evaluation mode: the same gradients from fewer stored numbers."""

import pytest
import tiny
import torch
from torch import nn
from unlearning_runs import run, same, weights

import pyunlearn.models.recomputation as recomputation
from pyunlearn.errors import ModelError
from pyunlearn.models.recomputation import recomputed_layers

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def story():
    return tiny.storyteller()


def gradients_of(model, ids):
    """Return the gradients, and the bytes that the backward pass had stored."""
    model.zero_grad()
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t.nbytes) or t, lambda t: t):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}, sum(stored)


@pytest.mark.parametrize("make", [tiny.tiny_llama, tiny.tiny_gpt2, tiny.tiny_t5])
def test_gradients_are_the_same_and_little_is_stored(make):
    """Bit for bit, in evaluation mode, which stays; the layers are as before afterwards."""
    model = make(60).eval()
    ids = torch.arange(5, 45).view(2, 20)
    plain, much = gradients_of(model, ids)
    with recomputed_layers(model):
        frugal, little = gradients_of(model, ids)
        assert not model.training
        assert not any(m.training for m in model.modules())
    assert all(torch.equal(plain[n], frugal[n]) for n in plain)
    assert little < 0.7 * much
    _, as_much = gradients_of(model, ids)
    assert as_much == much
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_forward_that_was_set_on_a_layer_returns():
    """accelerate's hooks set one."""
    model = tiny.tiny_llama(60)
    layer, calls = model.model.layers[0], []
    original = layer.forward
    layer.forward = own = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    with recomputed_layers(model):
        model(input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=False)
    assert calls == [1]
    assert layer.forward is own


def test_a_model_without_such_layers_is_refused():
    """In one sentence."""
    refused = pytest.raises(ModelError, match="needs a model whose layers transformers can recompute")
    with refused, recomputed_layers(nn.Linear(2, 2)):
        pass


@pytest.mark.parametrize("by", ["setting", "model"])
def test_a_run_is_the_same_with_it(story, by, monkeypatch):
    """With the setting, or where the model's own gradient checkpointing is on, which has no effect in evaluation."""
    calls, real = [], recomputation.checkpoint
    monkeypatch.setattr(recomputation, "checkpoint", lambda *a, **k: calls.append(1) or real(*a, **k))
    plain = run(story, max_steps=2)
    assert not calls
    model = story.fresh()
    if by == "model":
        model.gradient_checkpointing_enable()
    frugal = run(story, model=model, max_steps=2, **({"gradient_checkpointing": True} if by == "setting" else {}))
    assert calls
    assert same(weights(plain.model), weights(frugal.model))
    assert [e.exposure_after for e in plain.examples] == [e.exposure_after for e in frugal.examples]
