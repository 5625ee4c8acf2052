"""The l1 penalty of a run: its step, its schedule, and what it leaves of a trained model."""

import pytest
import torch
from test_edits import weights
from test_edits_masks import check_held, run

from pyunlearn.errors import ArgumentError
from pyunlearn.unlearning.optimizer import TrainedWeights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_the_penalty_ends_at_zero(dtype):
    """Every weight goes towards 0 by rate times strength and not past it; 16-bit weights through their float32 copies."""
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


def test_the_penalty_falls_in_a_line_to_zero(story, monkeypatch):
    """From its strength at the first step to strength / max_steps at the last."""
    seen, real = [], TrainedWeights.shrink
    monkeypatch.setattr(TrainedWeights, "shrink", lambda self, strength: (seen.append(strength), real(self, strength)))
    run(story, l1=2.0, max_steps=4, learning_rate=1e-5, batch_size=1)
    assert seen == pytest.approx([2.0, 1.5, 1.0, 0.5])


def test_a_text_is_forgotten_in_a_sparser_model(story):
    """Many weights are exactly 0 afterwards, none without the penalty; utility stays within its budget, and a mask holds against it."""
    plain, sparse = run(story), run(story, l1=3.0)
    zeros = [sum(int((p == 0).sum()) for p in r.model.parameters()) for r in (plain, sparse)]
    unused = int((story.model.model.embed_tokens.weight == 0).sum())
    assert zeros[0] <= unused
    assert zeros[1] > unused + 1000
    assert sparse.stopped == "forgotten"
    assert sparse.utility.relative_rise < 0.05
    assert sparse.settings["l1"] == 3.0
    before = weights(story.model)
    mask = {n: torch.rand(p.shape, generator=torch.Generator().manual_seed(0)) < 0.5 for n, p in before.items()}
    check_held(mask, before, weights(run(story, l1=3.0, mask=mask, max_steps=2).model))
    with pytest.raises(ArgumentError, match="l1 must be a number, 0 or more, got -1"):
        run(story, l1=-1)
