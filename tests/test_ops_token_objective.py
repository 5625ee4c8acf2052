"""token_objective and token weights against a loop over the examples in float64."""

import sys

import pytest
import torch
from heads import TOLERANCE, assert_agree, bytes_of, cast, make, plain, products, watch_chunks

from pyunlearn.errors import ArgumentError
from pyunlearn.ops import example_objective, token_objective

pytestmark = pytest.mark.usefixtures("poisoned")
LENGTHS = (2, 0, 9, 4, 1, 7, 5, 0)


@pytest.fixture
def chunks(monkeypatch):
    """Small cases take chunks too; the list says which."""
    return watch_chunks(monkeypatch, sys.modules["pyunlearn.ops.token_objective"])


def of_one(x, extra):
    """One example's loss, nonlinear in every token, with a detached weight: what the function below computes for many."""
    return (x.detach().exp() * x * extra).sum() / max(len(x), 1) + x.exp().sum().square()


def function(x, example, counts, extra):
    """The same, on many."""
    first = x.new_zeros(len(counts)).index_add(0, example, x.detach().exp() * x * extra) / counts.clamp(min=1)
    return first + x.new_zeros(len(counts)).index_add(0, example, x.exp()).square()


def of_pairs(x, example, counts, extra):
    """A product of two neighbours' losses."""
    return function(x, example, counts, extra).view(-1, 2).prod(1)


def problem(**options):
    case = make(sum(LENGTHS), 12, 203, **options)
    index = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(1))]
    return case, index, torch.linspace(0.5, 2, len(index), dtype=torch.float64)


def truth(case, index, extra, group_size=1, **options):
    """(losses, gradients of hidden, weight, bias) by a loop, in float64."""
    leaves = [t.detach().double().requires_grad_() for t in case[:3]]
    found = plain(*leaves[:2], case.targets, bias=leaves[2], **options)
    live = case.targets != -100
    each = [of_one(found[live & (index == b)], extra[live & (index == b)]) for b in range(len(LENGTHS))]
    losses = torch.stack(each).view(-1, group_size).prod(1)
    return [losses.detach(), *torch.autograd.grad(losses.sum(), leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("masked", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.5, "softcap": 2.5}], ids=["", "scale"])
def test_every_token_reaches_its_example(dtype, masked, group_size, options, backend, chunks):
    """Losses and gradients must agree with a loop over examples, for every mask, grouping and number of chunks."""
    case, index, extra = problem(dtype=dtype, masked=masked)
    wanted = truth(case, index, extra, group_size, **options)
    for held in (None, 10, 1, 0):
        leaves = [t.detach().clone().requires_grad_() for t in case[:3]]
        found = token_objective(
            *leaves[:2], case.targets, index, function if group_size == 1 else of_pairs,
            extra.to(torch.promote_types(dtype, torch.float32)), examples=len(LENGTHS), group_size=group_size, bias=leaves[2],
            workspace=None if held is None else bytes_of(held, case) if held else 0, **options,
        )  # fmt: skip
        live = case.targets != -100
        assert found.counts.tolist() == torch.bincount(index[live], minlength=len(LENGTHS)).tolist()
        wide = cast(case, dtype=torch.float64)
        right = plain(*wide[:2], case.targets, bias=wide.bias, **options)
        assert_agree([found.log_likelihood], [right], TOLERANCE.get(dtype, 4e-6))
        gradients = torch.autograd.grad(found.loss, leaves)
        assert_agree([found.losses, *gradients], wanted, TOLERANCE.get(dtype, 2e-3))
    if dtype is not torch.float16:
        assert any(len(sizes) > 1 for sizes in chunks) == (masked < 1)


def test_three_products(backend, chunks):
    """Value and gradient must cost three products in a workspace of a few rows."""
    case, index, extra = problem()
    leaves = [t.detach().clone().requires_grad_() for t in case[:3]]

    def both():
        token_objective(
            *leaves[:2], case.targets, index, function, extra.float(), bias=leaves[2], workspace=bytes_of(10, case)
        ).loss.backward()

    assert products(case, both) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("masked", [0.0, 0.4])
def test_token_weights(dtype, masked, backend):
    """example_objective's weights must multiply log-likelihoods in sums and gradient, and leave the counts."""
    case, index, extra = problem(dtype=dtype, masked=masked)
    leaf = case.hidden.detach().requires_grad_()
    found = example_objective(
        leaf, case.weight, case.targets, index, lambda s, c, z: s.square(), torch.zeros(len(LENGTHS)), bias=case.bias,
        weights=extra.float(),
    )  # fmt: skip
    wide = cast(case, dtype=torch.float64)
    right = wide.hidden.requires_grad_()
    sums = torch.zeros(len(LENGTHS), dtype=torch.float64).index_add(
        0, index, extra * plain(right, wide.weight, case.targets, bias=wide.bias)
    )
    assert found.counts.tolist() == torch.bincount(index[case.targets != -100], minlength=len(LENGTHS)).tolist()
    wanted = [sums.detach(), torch.autograd.grad(sums.square().sum(), right)[0]]
    tolerance = TOLERANCE.get(dtype, 2e-3)
    assert_agree([found.log_likelihood, torch.autograd.grad(found.loss, leaf)[0]], wanted, tolerance)


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (torch.ones(3), r"what is given per token must be tensors of 28 entries on cpu, got torch\.float32 of shape \(3,\)"),
        (1.0, "must be tensors of 28 entries on cpu, got float"),
        (torch.ones(28, requires_grad=True), "what is given per token gets no gradient here, and asks for one: detach it"),
    ],
)  # fmt: skip
def test_errors(extra, sentence):
    """What does not fit is named with what was wanted."""
    case, index, _ = problem()
    with pytest.raises(ArgumentError, match=sentence):
        token_objective(case.hidden, case.weight, case.targets, index, function, extra)
    with pytest.raises(ArgumentError, match="one loss for each example, a tensor of shape"):
        token_objective(case.hidden, case.weight, case.targets, index, lambda x, e, c: x.sum())
