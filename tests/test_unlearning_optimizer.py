"""The trained weights: float32 copies, accepted and rolled-back states, masks, and the l1 penalty's step."""

import copy

import pytest
import tiny
import torch
from torch import nn
from unlearning_runs import same, weights

from pyunlearn.unlearning.adam import Adam, assign, exact
from pyunlearn.unlearning.optimizer import TrainedWeights

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16]


def layer(dtype=torch.float32):
    """Return a linear layer of six weights and two biases."""
    torch.manual_seed(0)
    return nn.Linear(3, 2).to(dtype)


def step(model, state, gradient=1.0):
    """Take an optimizer step with the same gradient for every weight."""
    for p in model.parameters():
        p.grad = torch.full_like(p, gradient)
    state.optimizer.step()


def precise(state):
    """Return copies of the weights with the bits that rounding cuts off."""
    return [exact(p, state.optimizer.rests.get(p)).clone() for p in state.parameters.values()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rollback_returns_to_the_last_accepted_weights(dtype):
    """Not to the first ones; bit for bit, in the model and in the float32 copies, and the moments are cleared."""
    model = layer(dtype)
    state, first = TrainedWeights(model, 1e-2), weights(model)
    step(model, state)
    state.accept()
    accepted, wide = weights(model), precise(state)
    assert not same(accepted, first)
    for _ in range(3):
        step(model, state)
    assert not same(model, accepted)
    state.rollback()
    assert same(model, accepted)
    assert all(torch.equal(a, b) for a, b in zip(precise(state), wide, strict=True))
    assert state.state_dict()["moments"] == {}


@pytest.mark.parametrize("dtype", DTYPES)
def test_rewind_returns_to_the_accepted_weights_and_moments(dtype):
    """The next step is that taken before; after a rollback it is that of a fresh optimizer."""
    model = layer(dtype)
    state = TrainedWeights(model, 1e-2, resumable=True)
    step(model, state, 0.5)
    state.accept()
    step(model, state, 2.0)
    once = weights(model)
    state.rewind()
    step(model, state, 2.0)
    assert same(model, once)
    state.rollback()
    step(model, state, 2.0)
    assert not same(model, once)
    state.rewind()
    assert state.state_dict()["moments"] == {}  # a rollback clears the accepted moments too


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_weights_have_no_gradient_and_do_not_move(dtype):
    """The others move; a parameter without a mask is trained in whole."""
    model = layer(dtype)
    mask = {"weight": torch.tensor([[True, False, False], [False, True, False]])}
    state, before = TrainedWeights(model, 1e-2, mask=mask), weights(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    state.mask_gradients()
    assert torch.equal(model.weight.grad != 0, mask["weight"])
    assert (model.bias.grad == 1).all()
    state.optimizer.step()
    with torch.no_grad():
        for p in model.parameters():
            assign(p, state.optimizer.rests.get(p), exact(p, state.optimizer.rests.get(p)) + 0.25)  # as momentum would
    state.restore_masked()
    assert torch.equal(model.weight == before["weight"], ~mask["weight"])
    assert (model.bias != before["bias"]).all()
    model.weight.grad = None
    state.mask_gradients()  # a parameter without a gradient is passed over


def test_masked_weights_return_to_the_accepted_ones():
    """Their float32 copies do as well; without a mask nothing is restored."""
    model = layer()
    state = TrainedWeights(model, 1e-2)
    step(model, state)
    moved = weights(model)
    state.restore_masked()
    assert same(model, moved)


def test_the_learning_rate_is_that_of_the_next_step():
    """It halves Adam's first step, also through float32 copies."""
    for dtype in DTYPES:
        moves = []
        for rate in (0.5, 0.25):
            model = layer(dtype)
            state, before = TrainedWeights(model, 1e-2), weights(model)
            state.set_learning_rate(rate)
            step(model, state)
            moves.append((before["bias"].float() - model.bias.detach().float()).mean().item())
        assert moves == pytest.approx([0.5, 0.25], rel=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_state_dict_continues_with_the_same_steps(dtype):
    """Weights, float32 copies, moments and mask; the loaded weights are the accepted ones."""
    mask = {"bias": torch.tensor([True, False])}
    model, other = layer(dtype), layer(dtype)
    state = TrainedWeights(model, 1e-2, mask=mask)
    step(model, state, 0.5)
    loaded = TrainedWeights(other, 1e-2)
    with torch.no_grad():
        other.weight.zero_()
    loaded.load_state_dict(copy.deepcopy(state.state_dict()))
    assert same(model, other)
    assert torch.equal(loaded.mask["bias"], mask["bias"])
    for m, s in ((model, state), (other, loaded)):
        step(m, s, 2.0)
    assert same(model, other)
    loaded.rollback()
    assert not same(model, other)


def test_parameters_that_require_no_gradient_are_not_trained():
    """They are neither copied nor in the state."""
    model = layer()
    model.bias.requires_grad_(False)
    state = TrainedWeights(model, 1e-2)
    assert list(state.parameters) == list(state.state_dict()["weights"]) == ["weight"]


# ---------------------------------------------------------------- float32 copies, and a whole model


def test_16_bit_weights_are_trained_through_float32_copies():
    """Steps too small for bfloat16 add up as they do in float32; in bfloat16 alone no weight moves."""
    wide, narrow, naive = (
        torch.nn.Parameter(torch.ones(4, dtype=d)) for d in (torch.float32, torch.bfloat16, torch.bfloat16)
    )
    optimizers = [
        torch.optim.AdamW([wide], lr=1e-4, weight_decay=0.0),
        Adam([narrow], 1e-4),
        torch.optim.AdamW([naive], lr=1e-4, weight_decay=0.0),
    ]
    for _ in range(200):
        for p, optimizer in zip((wide, narrow, naive), optimizers, strict=True):
            p.grad = torch.full_like(p, 0.25)
            optimizer.step()
    assert torch.equal(naive, torch.ones_like(naive))
    assert torch.equal(narrow, wide.bfloat16())
    assert (wide < 0.99).all()


def test_rollback_restores_the_accepted_weights_of_a_model():
    """Weights and their float32 copies return bit for bit; the optimizer's moments are cleared."""
    for model in (tiny.tiny_llama(60), tiny.tiny_llama(60).bfloat16()):
        state, start = TrainedWeights(model, 1e-3), weights(model)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            state.optimizer.step()
        assert not same(model, start)
        state.rollback()
        assert same(model, start)
        assert state.state_dict()["moments"] == {}
        state.set_learning_rate(0.25)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        state.optimizer.step()
        biggest = max((p.detach().float() - start[n].float()).abs().max().item() for n, p in model.named_parameters())
        assert biggest == pytest.approx(0.25, rel=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_of_the_penalty_ends_at_zero(dtype):
    """A weight moves towards 0 by rate times strength and not past it; 16-bit weights through float32 copies."""
    model = torch.nn.Linear(3, 1, bias=False).to(dtype)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -0.5, 0.001]]))
    state = TrainedWeights(model, 1e-3)
    for _ in range(10):
        state.shrink(0.5)
    wanted = torch.tensor([[0.995, -0.495, 0.0]])
    torch.testing.assert_close(precise(state)[0], wanted)
    torch.testing.assert_close(model.weight.detach(), wanted.to(dtype))
    state.set_learning_rate(0.25)
    state.shrink(1.0)
    torch.testing.assert_close(precise(state)[0], torch.tensor([[0.745, -0.245, 0.0]]))
    state.shrink(0.0)
    torch.testing.assert_close(precise(state)[0], torch.tensor([[0.745, -0.245, 0.0]]))
