"""example_objective, value and gradients out of one pass, against PyTorch in float64."""

import sys

import pytest
import torch
from coverings import BACKENDS, grid
from heads import (
    TOLERANCE,
    assert_agree,
    assert_equal,
    bytes_of,
    cast,
    error,
    make,
    watch_chunks,
)
from hypothesis import given
from hypothesis import strategies as st
from objective_cases import (
    CAPACITIES,
    LENGTHS,
    OBJECTIVES,
    ROWS,
    Objective,
    Problem,
    any_capacity,
    definition,
    evaluate,
    npo,
    problem,
    reference_likelihoods,
    truth,
    workspace_for,
)

from pyunlearn.ops import example_objective, reference

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def chunks(monkeypatch):
    """Split small cases into chunks too; return the list that records the rows of each."""
    return watch_chunks(monkeypatch, sys.modules["pyunlearn.ops.example_objective"])


# ---------------------------------------------------------------- values and gradients


@grid(
    {"masked": 1.0, "options": {"softcap": 2.5}, "backend": "compiled"},
    objective=OBJECTIVES,
    dtype=[torch.float32, torch.float64],
    masked=[0.0, 0.5, 1.0],
    ordered=[False, True],
    options=[{}, {"logit_scale": 0.0625}, {"softcap": 2.5}],
    backend=BACKENDS,
)
def test_every_objective(objective, dtype, masked, ordered, options, device, backend, chunks):
    """All results must agree with float64 for every objective, mask, order of rows and number of chunks."""
    task = problem(dtype=dtype, masked=masked, ordered=ordered, device=device)
    wanted, live = truth(task, objective, **options), int((task.case.targets != -100).sum())
    for capacity in CAPACITIES:
        actual = evaluate(example_objective, task, objective, workspace=workspace_for(capacity, task.case), **options)
        assert [f.dtype for f in actual] == [*[dtype] * 3, torch.int64, *[dtype] * 3]
        assert_agree(actual, wanted, TOLERANCE[dtype])
    assert all(sum(sizes) == live for sizes in chunks)
    assert [len(sizes) > 1 for sizes in chunks] == [
        capacity in (10, 4, 1) and live > capacity for capacity in CAPACITIES
    ]


@grid(group_size=[1, 2, 4], capacity=[1, 4, 7, 12, 16], backend=BACKENDS)
def test_groups_stay_together(group_size, capacity, device, backend, chunks):
    """A chunk has as many whole groups of examples as fit, or one that does not fit; no group is cut."""
    task = problem(ordered=True, device=device)
    queries = []

    def function(sums, counts, before):
        queries.append(counts.view(-1, group_size).sum(1).tolist())
        return (sums - before).square() if group_size == 1 else (sums - before).square().sum(1)

    actual = evaluate(example_objective, task, Objective(function, group_size), workspace=bytes_of(capacity, task.case))
    (sizes,), groups = chunks, torch.tensor(LENGTHS).view(-1, group_size).sum(1).tolist()
    assert [sum(rows) for rows in queries] == sizes
    assert [rows for chunk in queries for rows in chunk] == groups
    assert all(queries)
    assert all(sum(rows) <= capacity or len([r for r in rows if r]) == 1 for rows in queries)
    assert_agree(actual, truth(task, Objective(function, group_size)), 4e-6)


@grid(
    {"lengths": (0, 0), "dtype": torch.bfloat16, "backend": "compiled"},
    lengths=[(0, 9), (0, 0, 9, 0, 9, 0), (9, 0), (9, 0, 1), (0, 0)],
    bias=[False, True],
    dtype=[torch.float32, torch.bfloat16],
    backend=BACKENDS,
)
def test_examples_without_rows(lengths, bias, dtype, device, backend, chunks):
    """Examples without a row, anywhere among examples longer than a chunk, count 0 and change nothing."""
    task = problem(lengths=lengths, bias=bias, dtype=dtype, device=device)
    wanted, tolerance = truth(task, OBJECTIVES["npo"]), TOLERANCE.get(dtype, 2 * torch.finfo(dtype).eps)
    for capacity in (2, 0, None):
        actual = evaluate(example_objective, task, OBJECTIVES["npo"], workspace=workspace_for(capacity, task.case))
        assert_agree(actual, wanted, tolerance)


@grid(objective=OBJECTIVES, capacity=[None, 4, 0], dtype=[torch.bfloat16, torch.float16], backend=BACKENDS)
def test_16_bits(objective, capacity, dtype, device, backend, chunks):
    """Losses of 16-bit inputs must be right to float32, gradients to their own rounding, in any number of chunks."""
    task = problem(4, 3001, lengths=[6 * n for n in LENGTHS], dtype=dtype, masked=0.3, device=device)
    actual = evaluate(example_objective, task, objective, workspace=workspace_for(capacity, task.case))
    wanted = truth(task, objective)
    assert [f.dtype for f in actual] == [*[torch.float32] * 3, torch.int64, *[dtype] * 3]
    assert_agree(actual[:4], wanted[:4], 4e-6)
    assert_agree(actual, wanted, 2 * torch.finfo(dtype).eps)
    # float16 gradients wait for the loss scale
    assert [len(sizes) > 1 for sizes in chunks] == ([capacity == 4] if dtype is torch.bfloat16 else [])


@grid(
    {"dtype": torch.bfloat16, "shape": (64, 3001), "capacity": 7, "backend": "compiled"},
    objective=OBJECTIVES,
    dtype=[torch.float32, torch.bfloat16],
    shape=[(507, 123), (64, 3001)],
    capacity=[0, 7, None],
    backend=BACKENDS,
)
def test_no_worse_than_pytorch(objective, dtype, shape, capacity, device, backend, chunks):
    """Against float64, losses and gradients must be no further off than PyTorch's in the same dtype.

    Added to the tolerance: 4e-6 of the largest, and for gradients half the dtype's epsilon, to which they are rounded.
    """
    task = problem(*shape, dtype=dtype, masked=0.3, device=device)
    wanted = truth(task, objective)
    ours = evaluate(example_objective, task, objective, workspace=workspace_for(capacity, task.case))
    theirs = evaluate(definition, task, objective)
    for at, (actual, other, right) in enumerate(zip(ours, theirs, wanted, strict=True)):
        allowed = 4e-6 + (torch.finfo(dtype).eps / 2 if at >= 4 else 0)
        assert error(actual, right) <= error(other, right) + allowed, at


@given(
    rows=st.lists(st.tuples(st.integers(0, 7), st.booleans()), max_size=24),
    capacity=st.integers(0, 24),
    name=st.sampled_from(sorted(OBJECTIVES)),
    seed=st.integers(0, 2**31),
)
def test_chunks_change_nothing(rows, capacity, name, seed, device, backend, chunks):
    """The result is the same in any number of chunks, for any layout of rows, masks and examples."""
    case = make(len(rows), 6, 150, seed=seed)
    case.targets[torch.tensor([ignored for _, ignored in rows], dtype=torch.bool)] = -100
    index = torch.tensor([b for b, _ in rows], dtype=torch.int64)
    before = reference_likelihoods(case, index, 8)
    task = Problem(cast(case, device=device), index.to(device), before.float().to(device))
    actual = evaluate(example_objective, task, OBJECTIVES[name], workspace=workspace_for(capacity, case))
    wanted = evaluate(example_objective, task, OBJECTIVES[name], workspace=1 << 40)
    assert len(chunks[-1]) == 1
    assert_agree(actual, [t.cpu() for t in wanted], 1e-5)


@given(order=st.randoms(use_true_random=False), capacity=st.sampled_from(CAPACITIES))
def test_permuted_rows(order, capacity, device, backend, chunks):
    """Permuting the rows changes no loss and permutes their gradients."""
    task = problem(masked=0.3, device=device)
    p = order.sample(range(ROWS), ROWS)
    moved = task._replace(
        case=task.case._replace(hidden=task.case.hidden[p], targets=task.case.targets[p]), index=task.index[p]
    )
    workspace = workspace_for(capacity, task.case)
    wanted = [t.cpu() for t in evaluate(example_objective, task, OBJECTIVES["npo"], workspace=workspace)]
    wanted[4] = wanted[4][p]
    assert_agree(evaluate(example_objective, moved, OBJECTIVES["npo"], workspace=workspace), wanted, 4e-6)


@grid(objective=OBJECTIVES, capacity=[None, 4, 0], backend=BACKENDS)
def test_gradcheck(objective, capacity, device, backend, chunks):
    """The gradients must agree with finite differences in float64, with bias, scale and softcap."""
    task = problem(3, 140, lengths=(2, 0, 5, 3), dtype=torch.float64, masked=0.2, device=device)
    options = {"logit_scale": 0.5, "softcap": 2.0, "workspace": workspace_for(capacity, task.case)}

    def function(hidden, weight, bias):
        return example_objective(
            hidden,
            weight,
            task.case.targets,
            task.index,
            objective.function,
            task.before,
            group_size=objective.group_size,
            bias=bias,
            **options,
        ).loss

    leaves = [t.requires_grad_() for t in task.case[:3]]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_reference_is_the_definition():
    """pyunlearn.ops.reference must agree with PyTorch's cross-entropy."""
    (hidden, weight, bias, targets), index, before = problem(dtype=torch.float64, masked=0.3)
    options = {"bias": bias, "logit_scale": 0.5, "softcap": 3.0}
    actual = reference.example_objective(hidden, weight, targets, index, npo, before, examples=len(before), **options)
    assert_agree([actual], definition(hidden, weight, targets, index, npo, before, **options)[:1], 1e-12)


# ---------------------------------------------------------------- tensors per example


@pytest.mark.parametrize("capacity", [None, 4])
@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_per_example(capacity, group_size, dtype, device, backend, chunks):
    """Tensors per example, in any number, dtype and shape, must reach the function aligned with their example."""
    task = problem(dtype=dtype, masked=0.2, device=device)
    examples = len(LENGTHS)
    table = torch.arange(6.0 * examples, device=device).view(examples, 2, 3)
    flags = torch.arange(examples, device=device) % 3 == 0

    def function(sums, counts, before, table, flags):
        assert table.shape == (*sums.shape, 2, 3)
        assert counts.shape == before.shape == flags.shape == sums.shape
        each = torch.where(flags, sums - before, 0.1 * sums * table.sum((-2, -1)))
        return each if group_size == 1 else each.prod(1)

    leaf = task.case.hidden.detach().requires_grad_()
    args = (task.case.weight, task.case.targets, task.index, function, task.before, table, flags)
    options = {"group_size": group_size, "bias": task.case.bias}
    actual = example_objective(leaf, *args, workspace=workspace_for(capacity, task.case), **options)

    def closed(sums, counts, before):
        cut = (-1, group_size) if group_size > 1 else (-1,)
        return function(sums, counts, before, table.cpu().unflatten(0, cut), flags.cpu().view(cut))

    wanted = truth(task, Objective(closed, group_size))
    assert_agree([actual.losses], [wanted[1]], 4e-6)
    tolerance = TOLERANCE.get(dtype, 2 * torch.finfo(dtype).eps)
    assert_agree(torch.autograd.grad(actual.loss, leaf), [wanted[4]], tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("group_size", "examples"), [(1, 7), (2, 8), (3, 9)])
def test_number_of_examples(group_size, examples, dtype, device, backend):
    """Without tensors per example, the largest index determines the number of examples, in whole groups."""
    task = problem(dtype=dtype, device=device)

    def function(sums, counts):
        return -sums if group_size == 1 else -sums.sum(1)

    actual = example_objective(*task.case[:2], task.case.targets, task.index, function, group_size=group_size)
    assert actual.losses.shape == (examples // group_size,)
    assert actual.counts.tolist() == [*LENGTHS, 0][:examples]
    assert actual.log_likelihood.shape == (examples,)
    assert_agree([-actual.log_likelihood.sum()], [actual.loss.cpu()], 2e-6)


@grid(examples=[None, 0, 4], group_size=[1, 2], dtype=[torch.float32, torch.bfloat16, torch.float16], backend=BACKENDS)
def test_no_rows(examples, group_size, dtype, device, backend):
    """Without a row, without an example even, the loss is connected to the graph and its gradients are zero."""
    case = make(0, 8, 100, dtype=dtype, device=device)
    leaves = [t.requires_grad_() for t in case[:3]]
    per_example = [] if examples is None else [torch.full((examples,), 5.0, device=device)]

    def function(sums, counts, *before):
        each = (sums - before[0] if before else sums).square()
        return each if group_size == 1 else each.sum(1)

    index = torch.zeros(0, dtype=torch.int64, device=device)
    actual = example_objective(
        *leaves[:2], case.targets, index, function, *per_example, group_size=group_size, bias=leaves[2]
    )
    assert actual.loss.item() == 25.0 * (examples or 0)
    assert actual.losses.shape == ((examples or 0) // group_size,)
    assert actual.log_likelihood.tolist() == actual.counts.tolist() == [0] * (examples or 0)
    gradients = torch.autograd.grad(actual.loss, leaves)
    assert [g.shape for g in gradients] == [t.shape for t in leaves]
    assert not any(g.any() for g in gradients)


# ---------------------------------------------------------------- the edges


@any_capacity
def test_contents_of_ignored_rows(capacity, device, backend, chunks):
    """NaN and infinity in ignored rows must not matter, and the gradient of these rows is 0."""
    task = problem(masked=0.4, device=device)
    wanted = truth(task, OBJECTIVES["npo"])
    ignored = (task.case.targets == -100).nonzero().squeeze(1)
    task.case.hidden[ignored[::2]], task.case.hidden[ignored[1::2]] = torch.nan, torch.inf
    actual = evaluate(example_objective, task, OBJECTIVES["npo"], workspace=workspace_for(capacity, task.case))
    assert_agree(actual, wanted, 4e-6)


@pytest.mark.parametrize("capacity", [None, 4])
def test_int32(capacity, device, backend, chunks):
    """Targets and example indices may be int32."""
    task = problem(masked=0.2, device=device)
    narrow = task._replace(case=task.case._replace(targets=task.case.targets.int()), index=task.index.int())
    for dtype in (torch.float32, torch.float16):
        cut = narrow._replace(case=cast(narrow.case, dtype=dtype))
        actual = evaluate(example_objective, cut, OBJECTIVES["npo"], workspace=workspace_for(capacity, task.case))
        wanted = truth(task._replace(case=cast(task.case, dtype=dtype)), OBJECTIVES["npo"])
        assert_agree(actual, wanted, 4e-6 if dtype is torch.float32 else 2e-3)


def test_ignore_index(device, backend):
    """Any number can mean "ignored", a token's own id too."""
    task = problem(device=device)
    task.case.targets[::3] = 0
    actual = evaluate(example_objective, task, OBJECTIVES["simnpo"], ignore_index=0)
    assert actual[3].sum() < ROWS
    assert_agree(actual, truth(task, OBJECTIVES["simnpo"], ignore_index=0), 4e-6)


@any_capacity
def test_two_runs(capacity, device, backend, chunks):
    """Two calls with the same inputs must give the same bits."""
    task = problem(33, 1000, masked=0.3, device=device)
    first, second = (
        evaluate(example_objective, task, OBJECTIVES["npo"], workspace=workspace_for(capacity, task.case))
        for _ in range(2)
    )
    assert_equal(second, first)


def test_mixed_dtypes(device, backend, chunks):
    """Hidden states, head and bias are computed in their widest dtype; each gradient comes back in its own."""
    task = problem(masked=0.2, device=device)
    case = task.case._replace(hidden=task.case.hidden.bfloat16(), bias=task.case.bias.half())
    task = task._replace(case=case)
    for workspace in (None, bytes_of(4, case)):
        actual = evaluate(example_objective, task, OBJECTIVES["npo"], workspace=workspace)
        assert [g.dtype for g in actual[4:]] == [torch.bfloat16, torch.float32, torch.float16]
        assert_agree(actual, truth(task, OBJECTIVES["npo"]), 5e-3)
        assert_agree(actual[:4], truth(task, OBJECTIVES["npo"])[:4], 4e-6)
    assert [len(sizes) > 1 for sizes in chunks] == [False, True]


def test_autocast(device, backend):
    """Autocast gives the product 16-bit operands, and gradients come back in the parameters' own dtype."""
    task = problem(masked=0.2, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        actual = evaluate(example_objective, task, OBJECTIVES["npo"])
    case = task.case._replace(hidden=task.case.hidden.bfloat16(), weight=task.case.weight.bfloat16())
    wanted = truth(task._replace(case=case), OBJECTIVES["npo"])
    assert [g.dtype for g in actual[4:]] == [torch.float32] * 3
    assert_agree(actual[:4], wanted[:4], 4e-6)
    assert_agree(actual, wanted, 1e-2)
