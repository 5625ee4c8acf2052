# mypy: disable-error-code="misc"
"""Every op on a head: repeated, on other streams, in CUDA graphs, and on the second GPU."""

from typing import Any

import pytest
import torch
from heads import assert_agree, assert_equal, cast, make, on_gpu

from pyunlearn.ops import (
    example_objective,
    kl_divergence,
    linear_log_likelihood,
    logit_margin,
    token_objective,
    token_statistics,
    weighted_log_likelihood,
)

pytestmark = pytest.mark.usefixtures("poisoned")


def examples(case):
    """Return example indices, ten rows an example."""
    return torch.arange(len(case.targets), device=case.targets.device) // 10


def loss(sums, counts):
    """Compute an example's loss."""
    return (0.01 * sums).exp()


def token_loss(values, example, counts):
    """Compute each example's loss from its tokens."""
    return values.new_zeros(len(counts)).index_add(0, example, (0.1 * values).exp())


def row_weights(case):
    """Return weights (N,) in float32, of both signs."""
    return torch.linspace(-1, 2, len(case.targets), device=case.targets.device)


OPS: dict[str, Any] = {
    "linear_log_likelihood": lambda case: linear_log_likelihood(*case[:2], case.targets, bias=case.bias),
    "token_statistics": lambda case: token_statistics(*case[:2], case.targets, bias=case.bias).entropy,
    "kl_divergence": lambda case: kl_divergence(
        *case[:2], case.hidden.detach().flip(0), targets=case.targets, bias=case.bias, target_shift=2.0
    ),
    "weighted_log_likelihood": lambda case: weighted_log_likelihood(
        *case[:2], case.targets, row_weights(case), bias=case.bias
    ),
    "example_objective": lambda case: (
        example_objective(*case[:2], case.targets, examples(case), loss, bias=case.bias).loss
    ),
    "token_objective": lambda case: (
        token_objective(
            *case[:2], case.targets, examples(case), token_loss, examples=len(case.targets) // 10, bias=case.bias
        ).loss
    ),
    "logit_margin": lambda case: logit_margin(*case[:2], bias=case.bias),
}
every_op = pytest.mark.parametrize("op", OPS)


def leaves_of(case):
    """Return the case with hidden, weight and bias as leaves of a graph."""
    return case._replace(**{name: getattr(case, name).detach().clone().requires_grad_() for name in case._fields[:3]})


def values_and_gradients(op, case):
    """Return an op's values for a case of leaves, and the gradients of their weighted sum, if they have any."""
    values = OPS[op](case)
    if not values.requires_grad:
        return [values]
    total = values if values.dim() == 0 else (values * row_weights(case)[: len(values)]).sum()
    return [values.detach(), *torch.autograd.grad(total, case[:3])]


@every_op
def test_two_runs(op, device, backend):
    """Two calls with the same inputs give the same bits, which agree with float64 to float32 rounding."""
    case = make(60, 32, 5000, device=device, masked=0.3)
    first, again = (values_and_gradients(op, leaves_of(case)) for _ in range(2))
    assert_equal(again, first)
    assert_agree(first, values_and_gradients(op, leaves_of(cast(case, dtype=torch.float64, device="cpu"))), 1e-5)


@on_gpu
@every_op
def test_side_stream(op, device):
    """Work is queued on the current stream, so a call on a busy side stream sees earlier work there."""
    case = make(60, 32, 5000, device=device, masked=0.3)
    wanted = values_and_gradients(op, leaves_of(case))
    late = leaves_of(case._replace(hidden=torch.zeros_like(case.hidden)))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # cycles, about 10 ms
        with torch.no_grad():
            late.hidden.copy_(case.hidden)
        actual = values_and_gradients(op, late)
    side.synchronize()
    assert_equal(actual, wanted)


@on_gpu
@pytest.mark.parametrize("op", [op for op in OPS if not op.endswith("objective")])
def test_cuda_graph(op, device):
    """A CUDA graph of forward and backward follows new inputs and masks, with NaN in ignored rows."""
    static = leaves_of(make(60, 32, 5000, device=device, masked=0.5))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        values_and_gradients(op, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = values_and_gradients(op, static)
    for seed, masked in ((0, 0.5), (1, 0.0)):
        new = make(60, 32, 5000, masked=masked, seed=seed)
        if op != "logit_margin":  # which has no targets
            new.hidden[new.targets == -100] = torch.nan
        with torch.no_grad():
            for old, fresh in zip(static, new, strict=True):
                old.copy_(fresh)
        graph.replay()
        assert_agree(actual, values_and_gradients(op, leaves_of(cast(new, dtype=torch.float64))), 1e-5)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_op
def test_second_gpu(op):
    """Tensors of the second GPU are processed there while the first is current."""
    case = make(60, 32, 5000, masked=0.3)
    wanted = values_and_gradients(op, leaves_of(cast(case, dtype=torch.float64)))
    with torch.cuda.device(0):
        assert_agree(values_and_gradients(op, leaves_of(cast(case, device="cuda:1"))), wanted, 1e-5)
