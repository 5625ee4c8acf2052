"""Second moments in 8 bits: their mean is kept, so that steps are on average those of moments in 32 bits."""

import pytest
import torch
from torch import nn
from unlearning_runs import check_forgotten, run

from pyunlearn.errors import ArgumentError
from pyunlearn.unlearning.adam import Adam
from pyunlearn.unlearning.config import UnlearnConfig
from pyunlearn.unlearning.eight_bits import decoded, encoded

pytestmark = pytest.mark.usefixtures("one_thread")

DRAWS = 4000


@pytest.mark.parametrize("largest", [1.0, 0.3, 1e-6, 100.0])
def test_the_mean_of_the_codes_is_the_moment(largest):
    """Also of the largest one; neighbours are a quarter of the lower apart, so a code is off by a quarter at most."""
    draws = torch.Generator().manual_seed(0)
    moments = largest**2 * torch.cat([torch.ones(1), 2.0 ** -(60 * torch.rand(50, generator=draws))]).double()
    codes = encoded(moments.repeat(DRAWS, 1), largest, draws)
    ratio = decoded(codes, largest, torch.float64) / moments
    assert codes.dtype == torch.uint8
    assert float((ratio - 1).abs().max()) <= 1 / 4
    error = ratio.std(dim=0) / DRAWS**0.5  # too small where a moment is next to a code, and none was rounded up
    assert ((ratio.mean(dim=0) - 1).abs() <= 5 * error + 1e-3).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_follow_the_gradients_over_many_steps(dtype):
    """The mean of 20,000 weights' moments, each relative to that in 32 bits, is 1 within 1 %, of any size."""
    draws = torch.Generator().manual_seed(0)
    sizes = 10 ** (4 * torch.rand(20_000, generator=draws) - 6)
    weights = [nn.Parameter(torch.zeros(20_000, dtype=dtype)) for _ in range(2)]
    optimizers = [Adam([p], 1e-5, clipped_to=bound) for p, bound in zip(weights, (1.0, None), strict=True)]
    for step in range(1, 301):
        gradient = (torch.randn(20_000, generator=draws) * sizes).to(dtype)
        for p, optimizer in zip(weights, optimizers, strict=True):
            p.grad = gradient.clone()
            optimizer.step()
        if step in (30, 300):
            codes, moments = (o.state[p]["second"] for o, p in zip(optimizers, weights, strict=True))
            ratio = decoded(codes, 1.0, torch.float32) / moments
            assert float(ratio.mean()) == pytest.approx(1, abs=0.01)
            assert float(ratio.std()) < 0.4
    moved = [p.detach().float() for p in weights]
    assert float((moved[0] - moved[1]).norm() / moved[1].norm()) < 0.2


def test_the_same_seed_rounds_alike():
    """And another one otherwise."""
    paths = []
    for seed in (0, 0, 1):
        p = nn.Parameter(torch.zeros(1000))
        optimizer = Adam([p], 1e-3, seed=seed, clipped_to=1.0)
        for step in range(5):
            p.grad = torch.randn(1000, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        paths.append(p.detach())
    assert torch.equal(paths[0], paths[1])
    assert not torch.equal(paths[0], paths[2])


@pytest.mark.parametrize("bound", [0, 101])
def test_without_a_bound_on_the_gradients_it_is_refused(bound):
    """In one sentence, before a model is loaded."""
    with pytest.raises(ArgumentError, match="needs the bound on the gradients that max_grad_norm is"):
        UnlearnConfig(moments_in_8bit=True, max_grad_norm=bound)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(3))
def test_a_run_ends_as_in_32_bits(story, seed):
    """All is forgotten, and the cost for other text is the same to half a per cent."""
    results = [run(story, seed=seed, moments_in_8bit=eight) for eight in (False, True)]
    for result in results:
        check_forgotten(result, story)
    rises = [result.utility.relative_rise for result in results]
    assert rises[0] == pytest.approx(rises[1], abs=0.005)
