"""Nearly certain targets: their gradients are right, and leave the products only if `negligible` allows it."""

import sys

import pytest
import torch
from coverings import BACKENDS, grid
from heads import Case, bytes_of, cast, make, plain, watch_chunks

from pyunlearn.ops import _passes, example_objective, weighted_log_likelihood

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def chunks(monkeypatch):
    """Split small cases into chunks of rows, and make compaction of cached rows cost nothing."""
    monkeypatch.setattr(_passes, "balance", lambda *_: 0)
    watch_chunks(monkeypatch, sys.modules["pyunlearn.ops.weighted_log_likelihood"])
    return watch_chunks(monkeypatch, sys.modules["pyunlearn.ops.example_objective"])


def weighted(case, coefficients, **options):
    """Return the gradients of weighted_log_likelihood for hidden, weight and, if there is one, bias."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in case[:3]]
    value = weighted_log_likelihood(*leaves[:2], case.targets, coefficients, bias=leaves[2], **options)
    return torch.autograd.grad(value, [leaf for leaf in leaves if leaf is not None])


def objective(case, coefficients, **options):
    """Return the same gradients from example_objective with one row in each example."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in case[:3]]
    index = torch.arange(len(case.targets), device=case.targets.device)
    loss = example_objective(
        *leaves[:2], case.targets, index, lambda s, n, c: c * s, coefficients, bias=leaves[2], **options
    ).loss
    return torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None])


def definition(case, coefficients, *, workspace=None, **options):
    """Return the same gradients, computed in plain PyTorch, and the log-likelihoods."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in case[:3]]
    values = plain(*leaves[:2], case.targets, bias=leaves[2], **options)
    total = (coefficients.to(values) * values).sum()
    return torch.autograd.grad(total, [leaf for leaf in leaves if leaf is not None]), values.detach()


OPS = {"weighted": weighted, "objective": objective}


def certain(device="cpu", dtype=torch.float32):
    """Return a case in which half of the targets have nearly all of the probability."""
    case = make(40, 20, 703, dtype=dtype, device=device, bias=True)
    at = torch.arange(0, 40, 2, device=device)
    own = case.weight[case.targets[at]].float()
    case.hidden[at] = (own * (90 / own.square().sum(1, keepdim=True))).to(dtype)
    return case


@grid(op=OPS, negligible=[0.0, 1e-4, 1e-2], dtype=[torch.float32, torch.bfloat16], backend=BACKENDS)
def test_negligible(op, negligible, dtype, device, backend, chunks):
    """A row's gradient for its logits loses at most 2 |coefficient * scale| negligible, which bounds all gradients."""
    case, scale = certain(device, dtype), 0.9
    coefficients = torch.linspace(-1, 2, 40, device=device)
    d_hidden, d_weight, d_bias = op(case, coefficients, logit_scale=scale, negligible=negligible)
    real = cast(case, dtype=torch.float64, device="cpu")
    wanted, values = definition(real, coefficients.cpu(), logit_scale=scale)
    left_out = (1 - values.exp()) < negligible
    assert bool(left_out.sum() >= 15) == bool(negligible)  # otherwise the case would test nothing
    bound = 2 * scale * negligible * coefficients.cpu().abs().double()
    rounding = 8 * torch.finfo(dtype).eps if dtype is not torch.float32 else 2e-5
    hidden_off = (d_hidden.cpu().double() - wanted[0]).norm(dim=1)
    assert (hidden_off <= bound * real.weight.norm(dim=1).max() + rounding * wanted[0].norm(dim=1).max()).all()
    assert (d_hidden[left_out.to(device)] == 0).all()
    weight_off = (d_weight.cpu().double() - wanted[1]).norm()
    assert weight_off <= (bound * left_out * real.hidden.norm(dim=1)).sum() + rounding * wanted[1].norm()
    assert (d_bias.cpu().double() - wanted[2]).norm() <= (bound * left_out).sum() + rounding * wanted[2].norm()


def memorized(gap, device="cpu", dtype=torch.float32):
    """Return a case in which every target has a probability near 1 - gap, as in text that the model has memorized."""
    vocabulary, rows = 300, 24
    g = torch.Generator().manual_seed(0)
    targets = torch.randperm(vocabulary, generator=g)[:rows]
    hidden = 0.1 * torch.randn(rows, vocabulary, generator=g)
    hidden[torch.arange(rows), targets] += torch.tensor((vocabulary - 1) * (1 - gap) / gap).log()
    return cast(Case(hidden, torch.eye(vocabulary), None, targets), device=device, dtype=dtype)


@grid(
    {"op": weighted, "gap": 1e-4, "dtype": torch.float32, "backend": "compiled"},
    {"op": objective, "gap": 1e-4, "dtype": torch.float32, "backend": "compiled"},
    op=OPS,
    gap=[1e-2, 1e-4, 1e-5],
    capacity=[None, 5, 0],
    dtype=[torch.float32, torch.bfloat16],
    backend=BACKENDS,
)
def test_memorized_rows_have_their_gradient(op, gap, capacity, dtype, device, backend, chunks):
    """By default, the gradient of every row whose target has probability 1 - gap agrees with float64, row by row.

    Added to the tolerance, PyTorch's error in the same dtype: the rounding of 1 - p in float32 and of the gradient.
    """
    case, coefficients = memorized(gap, device, dtype), torch.linspace(0.5, 2, 24, device=device)
    workspace = bytes_of(capacity, case) if capacity else capacity
    actual = op(case, coefficients, workspace=workspace)
    theirs, _ = definition(case, coefficients)
    wanted, values = definition(cast(case, dtype=torch.float64, device="cpu"), coefficients.cpu())
    assert ((gap / 4 < 1 - values.exp()) & (1 - values.exp() < 4 * gap)).all()  # otherwise the case would test nothing
    rounding = 4 * torch.finfo(torch.float32).eps / gap + 2 * torch.finfo(dtype).eps
    for at, rows in ((0, slice(None)), (1, case.targets.cpu())):
        ours, other = (abs(d[at].double().cpu() - wanted[at])[rows].amax(dim=1) for d in (actual, theirs))
        assert (ours <= other + rounding * wanted[at][rows].abs().amax(dim=1)).all()
