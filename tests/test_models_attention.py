"""Attention of short texts on a CPU: float32 where a model computes in 16 bits, and only where it is faster."""

from contextlib import nullcontext

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyunlearn.data import Tokens, collate
from pyunlearn.models import Likelihood
from pyunlearn.models.attention import LONGEST
from pyunlearn.models.hidden_states import Layer
from pyunlearn.models.recomputation import recomputed_layers

pytestmark = pytest.mark.usefixtures("one_thread")
_VOCABULARY = 60


class Watched(TorchDispatchMode):
    """Lists the dtypes in which attention is computed, forward and backward."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(func):
            self.dtypes.add(next(x.dtype for x in args if isinstance(x, torch.Tensor)))
        return func(*args, **(kwargs or {}))


def made(dtype=torch.float32):
    torch.manual_seed(0)
    return tiny.tiny_llama(_VOCABULARY, max_position_embeddings=2 * LONGEST).to(dtype).eval()


def batch(positions=20):
    """Two texts, one of them shorter."""
    r = torch.Generator().manual_seed(positions)
    ids = [torch.randint(5, _VOCABULARY, (n,), generator=r).tolist() for n in (positions, positions // 2)]
    return collate([Tokens(each, 1) for each in ids], pad_id=0)


def dtypes(model, texts, *, autocast=None, backward=True):
    """Return the dtypes of attention in a step on these texts."""
    likelihood = Likelihood(model)
    likelihood.fused = True
    mixed = nullcontext() if autocast is None else torch.autocast("cpu", autocast)
    with Watched() as watched:
        with mixed:
            values = likelihood(texts)
        if backward:
            values.sum().backward()
    return watched.dtypes


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by", ["weights", "autocast"])
def test_short_texts_with_a_gradient_are_attended_to_in_float32(narrow, by):
    """With 16-bit weights and under autocast; up to LONGEST positions."""
    model, autocast = (made(narrow), None) if by == "weights" else (made(), narrow)
    for positions in (20, LONGEST):
        assert dtypes(model, batch(positions), autocast=autocast) == {torch.float32}
    assert dtypes(model, batch(LONGEST + 1), autocast=autocast) == {narrow}
    with torch.no_grad():
        assert dtypes(model, batch(), autocast=autocast, backward=False) == {narrow}


def test_hidden_states_of_a_layer_are_computed_so_too():
    """These are what the methods on representations train on."""
    with Watched() as watched:
        Layer(made(torch.bfloat16), 1)(batch())
    assert watched.dtypes == {torch.float32}


def gradients(model, texts, context=None):
    model.zero_grad()
    with context or nullcontext():
        Likelihood(model)(texts).sum().backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


def test_gradients_are_no_farther_from_those_of_float32(monkeypatch):
    """Of the same weights, which are rounded to bfloat16."""
    model, texts = made(torch.bfloat16), batch(60)
    right = gradients(made(torch.bfloat16).float(), texts)
    ours = gradients(model, texts)
    monkeypatch.setattr("pyunlearn.models.attention.LONGEST", 0)
    plain = gradients(model, texts)
    assert not torch.equal(ours, plain)
    assert (ours - right).norm() <= 1.05 * (plain - right).norm()


def test_recomputed_layers_attend_as_the_forward_pass_did():
    """Bit for bit the same gradients, where the backward pass computes the layers again."""
    model, texts = made(torch.bfloat16), batch()
    plain = gradients(model, texts)
    assert torch.equal(gradients(model, texts, recomputed_layers(model)), plain)


def test_layers_that_transformers_recomputes_in_training_attend_in_the_models_dtype():
    """The context has ended when it computes them again, and would store other tensors."""
    model = made(torch.bfloat16).train()
    model.gradient_checkpointing_enable()
    assert dtypes(model, batch()) == {torch.bfloat16}


def test_float32_and_a_compiled_model_are_left_as_they_are():
    """Their passes run without the context."""
    assert dtypes(made(), batch()) == {torch.float32}
    compiled = torch.compile(made(torch.bfloat16), backend="eager")
    likelihood = Likelihood(compiled)
    likelihood.fused = True
    assert torch.isfinite(likelihood(batch())).all()
