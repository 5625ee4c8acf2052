"""The trained weights: float32 copies, accepted and rolled-back states, masks, and the l1 penalty's step."""

import pytest
import torch
from unlearning_runs import same, weights

from pyunlearn.unlearning.optimizer import MasterWeights, TrainedWeights

pytestmark = pytest.mark.usefixtures("one_thread")


def test_16_bit_weights_are_trained_through_float32_copies():
    """Steps too small for bfloat16 add up as they do in float32; in bfloat16 alone no weight moves."""
    wide, narrow, naive = (
        torch.nn.Parameter(torch.ones(4, dtype=d)) for d in (torch.float32, torch.bfloat16, torch.bfloat16)
    )
    optimizers = [
        torch.optim.AdamW([wide], lr=1e-4, weight_decay=0.0),
        MasterWeights([narrow], 1e-4),
        torch.optim.AdamW([naive], lr=1e-4, weight_decay=0.0),
    ]
    for _ in range(200):
        for p, optimizer in zip((wide, narrow, naive), optimizers, strict=True):
            p.grad = torch.full_like(p, 0.25)
            optimizer.step()
    assert torch.equal(naive, torch.ones_like(naive))
    assert torch.equal(narrow, wide.bfloat16())
    assert (wide < 0.99).all()


def test_rollback_restores_the_accepted_weights_of_a_model(story):
    """Weights and their float32 copies return bit for bit; the optimizer's moments are cleared."""
    for model in (story.fresh(), story.fresh().bfloat16()):
        state, start = TrainedWeights(model, 1e-3), weights(model)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            state.optimizer.step()
        assert not same(model, start)
        state.rollback()
        assert same(model, start)
        assert not state._adam.state
        state.set_learning_rate(0.25)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        state.optimizer.step()
        biggest = max((p.detach().float() - start[n].float()).abs().max().item() for n, p in model.named_parameters())
        assert biggest == pytest.approx(0.25, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_the_penalty_ends_at_zero(dtype):
    """A weight moves towards 0 by rate times strength and not past it; 16-bit weights through float32 copies."""
    model = torch.nn.Linear(3, 1, bias=False).to(dtype)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -0.5, 0.001]]))
    state = TrainedWeights(model, 1e-3)
    for _ in range(10):
        state.shrink(0.5)
    wanted = torch.tensor([[0.995, -0.495, 0.0]])
    torch.testing.assert_close(state._weights[0].detach(), wanted)
    torch.testing.assert_close(model.weight.detach(), wanted.to(dtype))
    state.set_learning_rate(0.25)
    state.shrink(1.0)
    torch.testing.assert_close(state._weights[0].detach(), torch.tensor([[0.745, -0.245, 0.0]]))
    state.shrink(0.0)
    torch.testing.assert_close(state._weights[0].detach(), torch.tensor([[0.745, -0.245, 0.0]]))
