"""token_objective and token weights against a loop over the examples in float64."""

import sys

import pytest
import torch
from coverings import BACKENDS, grid, in_full
from heads import TOLERANCE, assert_agree, assert_equal, bytes_of, cast, error, make, plain, products, watch_chunks
from hypothesis import given
from hypothesis import strategies as st

from pyunlearn.errors import ArgumentError
from pyunlearn.ops import example_objective, reference, token_objective

pytestmark = pytest.mark.usefixtures("poisoned")
LENGTHS = (2, 0, 9, 4, 1, 7, 5, 0)


@pytest.fixture
def chunks(monkeypatch):
    """Split small cases into chunks too; return the list that records the rows of each."""
    return watch_chunks(monkeypatch, sys.modules["pyunlearn.ops.token_objective"])


def of_one(x, extra):
    """Compute one example's loss, nonlinear in every token, with a detached weight."""
    return (x.detach().exp() * x * extra).sum() / max(len(x), 1) + x.exp().sum().square()


def function(x, example, counts, extra):
    """Compute the losses of many examples as `of_one` does one."""
    first = x.new_zeros(len(counts)).index_add(0, example, x.detach().exp() * x * extra) / counts.clamp(min=1)
    return first + x.new_zeros(len(counts)).index_add(0, example, x.exp()).square()


def of_pairs(x, example, counts, extra):
    """Compute the product of two neighbours' losses."""
    return function(x, example, counts, extra).view(-1, 2).prod(1)


def problem(**options):
    case = make(sum(LENGTHS), 12, 203, **options)
    index = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(1))]
    return case, index, torch.linspace(0.5, 2, len(index), dtype=torch.float64)


def truth(case, index, extra, group_size=1, **options):
    """Return [losses, gradients of hidden, weight, bias], from a loop in float64."""
    leaves = [t.detach().double().requires_grad_() for t in case[:3]]
    actual = plain(*leaves[:2], case.targets, bias=leaves[2], **options)
    live = case.targets != -100
    each = [of_one(actual[live & (index == b)], extra[live & (index == b)]) for b in range(len(LENGTHS))]
    losses = torch.stack(each).view(-1, group_size).prod(1)
    return [losses.detach(), *torch.autograd.grad(losses.sum(), leaves)]


@grid(
    {"dtype": torch.float32, "masked": 1.0, "group_size": 2, "backend": "compiled"},
    dtype=[torch.float32, torch.float64, torch.float16],
    masked=[0.0, 0.4, 1.0],
    group_size=[1, 2],
    options=[{}, {"logit_scale": 0.5, "softcap": 2.5}],
    backend=BACKENDS,
)
def test_every_token_reaches_its_example(dtype, masked, group_size, options, backend, chunks):
    """Losses and gradients must agree with a loop over examples, for every mask, grouping and number of chunks."""
    case, index, extra = problem(dtype=dtype, masked=masked)
    wanted = truth(case, index, extra, group_size, **options)
    for capacity in (None, 10, 1, 0):
        leaves = [t.detach().clone().requires_grad_() for t in case[:3]]
        actual = token_objective(
            *leaves[:2],
            case.targets,
            index,
            function if group_size == 1 else of_pairs,
            extra.to(torch.promote_types(dtype, torch.float32)),
            examples=len(LENGTHS),
            group_size=group_size,
            bias=leaves[2],
            workspace=None if capacity is None else bytes_of(capacity, case) if capacity else 0,
            **options,
        )
        live = case.targets != -100
        assert actual.counts.tolist() == torch.bincount(index[live], minlength=len(LENGTHS)).tolist()
        wide = cast(case, dtype=torch.float64)
        right = plain(*wide[:2], case.targets, bias=wide.bias, **options)
        assert_agree([actual.log_likelihood], [right], TOLERANCE.get(dtype, 4e-6))
        gradients = torch.autograd.grad(actual.loss, leaves)
        assert_agree([actual.losses, *gradients], wanted, TOLERANCE.get(dtype, 2e-3))
    if dtype is not torch.float16:
        assert any(len(sizes) > 1 for sizes in chunks) == (masked < 1)


@pytest.mark.parametrize("group_size", [1, 2])
def test_reference_is_the_definition(group_size):
    """pyunlearn.ops.reference must agree with a loop over the examples, and the op with both."""
    case, index, extra = problem(dtype=torch.float64, masked=0.3)
    options = {"bias": case.bias, "logit_scale": 0.5, "softcap": 3.0, "examples": len(LENGTHS)}
    task = (*case[:2], case.targets, index, function if group_size == 1 else of_pairs, extra)
    actual = reference.token_objective(*task, group_size=group_size, **options)
    wanted = truth(case, index, extra, group_size, logit_scale=0.5, softcap=3.0)[0].sum()
    assert_agree([actual, token_objective(*task, group_size=group_size, **options).loss], [wanted, wanted], 1e-12)


@pytest.mark.parametrize("capacity", [None, 10])
def test_two_runs(capacity, backend, chunks):
    """Two calls, and two backward passes of a retained graph, must give the same bits."""
    case, index, extra = problem(masked=0.3)
    actual = []
    for _ in range(2):
        leaves = [t.detach().clone().requires_grad_() for t in case[:3]]
        loss = token_objective(
            *leaves[:2],
            case.targets,
            index,
            function,
            extra.float(),
            examples=len(LENGTHS),
            bias=leaves[2],
            workspace=bytes_of(capacity, case) if capacity else None,
        ).loss
        actual += [[loss.detach(), *torch.autograd.grad(loss, leaves, retain_graph=True)] for _ in range(2)]
    for again in actual[1:]:
        assert_equal(again, actual[0])


def smooth(x, example, counts):
    """An objective with nothing detached, which finite differences can follow."""
    return x.new_zeros(len(counts)).index_add(0, example, x.exp()).square()


@pytest.mark.parametrize("capacity", [None, 10, 0])
def test_gradcheck(capacity, backend, chunks):
    """The gradients must agree with finite differences in float64, with bias, scale and softcap."""
    case, index, _ = problem(dtype=torch.float64, masked=0.2)
    options = {"logit_scale": 0.5, "softcap": 2.0, "workspace": bytes_of(capacity, case) if capacity else capacity}

    def loss(hidden, weight, bias):
        return token_objective(
            hidden, weight, case.targets, index, smooth, examples=len(LENGTHS), bias=bias, **options
        ).loss

    assert torch.autograd.gradcheck(loss, [t.requires_grad_() for t in case[:3]], fast_mode=True)


@pytest.mark.parametrize("dynamic", [False, *in_full(True)])
def test_compile(dynamic):
    """torch.compile(fullgraph=True) must compile it and agree with eager to rounding, at every number of rows."""
    torch._dynamo.reset()

    def loss(hidden, weight, targets, index):
        return token_objective(hidden, weight, targets, index, smooth, examples=len(LENGTHS), softcap=4.0).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    case, index, _ = problem(masked=0.3)
    for rows in (len(index), 11) if dynamic else (len(index),):
        leaves = [case.hidden[:rows].clone().requires_grad_(), case.weight.clone().requires_grad_()]
        answers = [f(*leaves, case.targets[:rows], index[:rows]) for f in (compiled, loss)]
        actual, wanted = ([a.detach(), *torch.autograd.grad(a, leaves)] for a in answers)
        assert_agree(actual, wanted, 4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("capacity", [None, 10])
def test_no_worse_than_pytorch(dtype, capacity, backend, chunks):
    """Against float64, loss and gradients must be no further off than the definition in the same dtype.

    Plus 4e-6 of the largest, and for gradients half the dtype's epsilon, to which they are rounded.
    """
    case, index, extra = problem(dtype=dtype, masked=0.3)
    narrow = extra.to(dtype)
    losses, *gradients = truth(case, index, narrow.double())
    workspace = bytes_of(capacity, case) if capacity else None

    def ours(*head, **options):
        return token_objective(*head, workspace=workspace, **options).loss

    answers = []
    for op, given_extra in ((ours, narrow.float()), (reference.token_objective, narrow)):
        leaves = [t.detach().clone().requires_grad_() for t in case[:3]]
        loss = op(*leaves[:2], case.targets, index, function, given_extra, examples=len(LENGTHS), bias=leaves[2])
        answers.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for at, (actual, other, right) in enumerate(zip(*answers, [losses.sum(), *gradients], strict=True)):
        allowed = 4e-6 + (torch.finfo(dtype).eps / 2 if at else 0)
        assert error(actual, right) <= error(other, right) + allowed, at


@given(order=st.randoms(use_true_random=False), capacity=st.sampled_from([None, 10, 1, 0]))
def test_permuted_rows(order, capacity, backend, chunks):
    """Permuting the rows, in any number of chunks, changes no loss and permutes their gradients."""
    case, index, extra = problem(masked=0.3)
    p = order.sample(range(len(index)), len(index))

    def both(hidden, targets, index, extra, workspace):
        leaf = hidden.clone().requires_grad_()
        actual = token_objective(
            leaf, case.weight, targets, index, function, extra.float(), examples=len(LENGTHS), workspace=workspace
        )
        return [actual.losses, torch.autograd.grad(actual.loss, leaf)[0]]

    losses, d_hidden = both(case.hidden, case.targets, index, extra, None)
    workspace = bytes_of(capacity, case) if capacity else capacity
    actual = both(case.hidden[p], case.targets[p], index[p], extra[p], workspace)
    assert_agree(actual, [losses, d_hidden[p]], 1e-5)


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
    actual = example_objective(
        leaf,
        case.weight,
        case.targets,
        index,
        lambda s, c, z: s.square(),
        torch.zeros(len(LENGTHS)),
        bias=case.bias,
        weights=extra.float(),
    )
    wide = cast(case, dtype=torch.float64)
    right = wide.hidden.requires_grad_()
    sums = torch.zeros(len(LENGTHS), dtype=torch.float64).index_add(
        0, index, extra * plain(right, wide.weight, case.targets, bias=wide.bias)
    )
    assert actual.counts.tolist() == torch.bincount(index[case.targets != -100], minlength=len(LENGTHS)).tolist()
    wanted = [sums.detach(), torch.autograd.grad(sums.square().sum(), right)[0]]
    tolerance = TOLERANCE.get(dtype, 2e-3)
    assert_agree([actual.log_likelihood, torch.autograd.grad(actual.loss, leaf)[0]], wanted, tolerance)


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (
            torch.ones(3),
            r"per_token must be tensors of 28 entries on cpu, got torch\.float32 of shape \(3,\)",
        ),
        (1.0, "must be tensors of 28 entries on cpu, got float"),
        (
            torch.ones(28, requires_grad=True),
            "per_token tensors are constants here, and one requires a gradient: detach it",
        ),
    ],
)
def test_errors(extra, sentence):
    """A wrong argument raises an error that names the requirement."""
    case, index, _ = problem()
    with pytest.raises(ArgumentError, match=sentence):
        token_objective(case.hidden, case.weight, case.targets, index, function, extra)
    with pytest.raises(ArgumentError, match="one loss for each example, a tensor of shape"):
        token_objective(case.hidden, case.weight, case.targets, index, lambda x, e, c: x.sum())
