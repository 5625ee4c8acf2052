"""The l1 penalty of a run: its decay to 0, and the sparsity that it leaves."""

import pytest
import torch
from test_edits_masks import check_held
from unlearning_runs import run, weights

from pyunlearn.errors import ArgumentError
from pyunlearn.unlearning.optimizer import TrainedWeights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.full
def test_the_penalty_decays_linearly_to_zero(story, monkeypatch):
    """Its strength is l1 at the first step and l1 / max_steps at the last."""
    seen, real = [], TrainedWeights.shrink
    monkeypatch.setattr(TrainedWeights, "shrink", lambda self, strength: (seen.append(strength), real(self, strength)))
    run(story, l1=2.0, max_steps=4, learning_rate=1e-5, batch_size=1)
    assert seen == pytest.approx([2.0, 1.5, 1.0, 0.5])


@pytest.mark.full
def test_a_run_with_the_penalty_ends_with_weights_that_are_exactly_zero(story):
    """The text is forgotten within the utility budget; weights outside a mask keep their bits."""
    plain, sparse = run(story), run(story, l1=1.0)
    zeros = [sum(int((p == 0).sum()) for p in r.model.parameters()) for r in (plain, sparse)]
    unused = int((story.model.model.embed_tokens.weight == 0).sum())
    assert zeros[0] <= unused
    assert zeros[1] > unused + 1000
    assert sparse.stopped == "forgotten"
    assert sparse.utility.relative_rise < 0.05
    assert sparse.settings["l1"] == 1.0
    before = weights(story.model)
    mask = {n: torch.rand(p.shape, generator=torch.Generator().manual_seed(0)) < 0.5 for n, p in before.items()}
    check_held(mask, before, weights(run(story, l1=1.0, mask=mask, max_steps=2).model))
    with pytest.raises(ArgumentError, match="l1 must be a number, 0 or more, got -1"):
        run(story, l1=-1)
