"""example_objective, value and gradients out of one pass, against PyTorch in float64."""

import sys
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from heads import (
    TOLERANCE,
    Allocations,
    Case,
    assert_agree,
    assert_equal,
    bytes_of,
    cast,
    elsewhere,
    error,
    ids,
    make,
    plain,
    products,
    watch_chunks,
)
from hypothesis import given
from hypothesis import strategies as st

from pyunlearn.errors import ArgumentError
from pyunlearn.ops import _backend, example_objective, reference
from pyunlearn.ops._plan import MIB

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def chunks(monkeypatch):
    """Small cases take chunks too; the list says which."""
    return watch_chunks(monkeypatch, sys.modules["pyunlearn.ops.example_objective"])


def ascent(sums, counts, before):
    """The mean log-likelihood of an example's tokens."""
    return sums / counts.clamp(min=1)


def npo(sums, counts, before):
    """Negative preference optimization."""
    return 20 * F.softplus(0.1 * (sums - before))


def simnpo(sums, counts, before):
    """NPO without a reference model."""
    return 0.8 * F.softplus(2.5 * sums / counts.clamp(min=1) + 3.0)


def dpo(sums, counts, before):
    """Direct preference optimization of pairs (chosen, rejected)."""
    margin = sums - before
    return F.softplus(-0.1 * (margin[:, 0] - margin[:, 1]))


class Objective(NamedTuple):
    """A function, and how many examples it takes together."""

    function: object
    group_size: int = 1


OBJECTIVES = {"ascent": Objective(ascent), "npo": Objective(npo), "simnpo": Objective(simnpo), "dpo": Objective(dpo, 2)}
every_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)

# rows of each example: the first, one in the middle and the last have none; no order
LENGTHS = (2, 0, 9, 4, 1, 7, 5, 0)
ROWS = sum(LENGTHS)


def layout(lengths=LENGTHS, *, seed=0, ordered=False):
    """The example of each row."""
    index = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return index if ordered else index[torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))]


def likelihoods_before(case, index, examples):
    """A reference model's log-likelihoods, near those of the head."""
    case = cast(case, dtype=torch.float64, device="cpu")
    found = plain(*case[:2], case.targets, bias=case.bias)
    return torch.linspace(-3, 3, examples, dtype=torch.float64).index_add(0, index, found)


class Problem(NamedTuple):
    """A case, its rows' examples, and what there is per example."""

    case: Case
    index: torch.Tensor
    before: torch.Tensor


def problem(width=20, vocabulary=203, *, lengths=LENGTHS, ordered=False, seed=0, device="cpu", **options):
    """A problem with examples of those lengths, their rows in any order."""
    case = make(sum(lengths), width, vocabulary, seed=seed, device=device, **options)
    index = layout(lengths, seed=seed, ordered=ordered)
    before = likelihoods_before(case, index, len(lengths))
    real = torch.promote_types(case.hidden.dtype, torch.float32)
    return Problem(case, index.to(device), before.to(device, real))


def definition(hidden, weight, targets, index, function, before, *, group_size=1, **options):
    """(loss, losses, sums, counts) in PyTorch alone."""
    found = plain(hidden, weight, targets, **options)
    sums = found.new_zeros(len(before)).index_add(0, index, found)
    counts = torch.bincount(index[targets != options.get("ignore_index", -100)], minlength=len(before))
    given = [sums, counts, before.to(sums)]
    losses = function(*(x.view(-1, group_size) for x in given) if group_size > 1 else given)
    return losses.sum(), losses.detach(), sums.detach(), counts


def evaluate(op, given, objective, *, factor=1.0, **options):
    """[loss, losses, log_likelihood, counts, gradient of factor * loss for hidden, weight and, if there is one, bias]."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in given.case[:3]]
    loss, *others = op(
        *leaves[:2], given.case.targets, given.index, objective.function, given.before,
        group_size=objective.group_size, bias=leaves[2], **options,
    )  # fmt: skip
    assert not any(x.requires_grad for x in others)
    gradients = torch.autograd.grad(factor * loss, [leaf for leaf in leaves if leaf is not None])
    return [loss.detach(), *others, *gradients]


def truth(given, objective, **options):
    """What `evaluate` should find, from float64."""
    case = cast(given.case, dtype=torch.float64, device="cpu")
    return evaluate(definition, Problem(case, given.index.cpu(), given.before.double().cpu()), objective, **options)


def graph(given, objective, trained=(0, 1, 2), **options):
    """What the op returns, and hidden, weight and bias, of which the trained ones want a gradient."""
    leaves = [t.detach().clone().requires_grad_(i in trained) for i, t in enumerate(given.case[:3])]
    found = example_objective(
        *leaves[:2], given.case.targets, given.index, objective.function, given.before,
        group_size=objective.group_size, bias=leaves[2], **options,
    )  # fmt: skip
    return found, leaves


# how many rows' logits the workspace holds; None: the default, all of them; 0: none, so that they are made again
HELD = [None, 10, 4, 1, 0]
any_workspace = pytest.mark.parametrize("held", HELD)


def held_by(held, case):
    """The workspace in bytes."""
    return None if held is None else bytes_of(held, case) if held else 0


# ---------------------------------------------------------------- the answer is right


@every_objective
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.0625}, {"softcap": 2.5}], ids=["", "scale", "softcap"])
def test_every_objective(objective, dtype, masked, ordered, options, device, backend, chunks):
    """Losses, log-likelihoods, counts and gradients must agree with float64 for every objective, mask, order and number of chunks."""
    given = problem(dtype=dtype, masked=masked, ordered=ordered, device=device)
    wanted, live = truth(given, objective, **options), int((given.case.targets != -100).sum())
    for held in HELD:
        found = evaluate(example_objective, given, objective, workspace=held_by(held, given.case), **options)
        assert [f.dtype for f in found] == [*[dtype] * 3, torch.int64, *[dtype] * 3]
        assert_agree(found, wanted, TOLERANCE[dtype])
    assert all(sum(sizes) == live for sizes in chunks)
    assert [len(sizes) > 1 for sizes in chunks] == [held in (10, 4, 1) and live > held for held in HELD]


@pytest.mark.parametrize("group_size", [1, 2, 4])
@pytest.mark.parametrize("held", [1, 4, 7, 12, 16])
def test_groups_stay_together(group_size, held, device, backend, chunks):
    """No group of examples may be cut; a chunk holds as many whole groups as fit, or one that does not."""
    given = problem(ordered=True, device=device)
    asked = []

    def function(sums, counts, before):
        asked.append(counts.view(-1, group_size).sum(1).tolist())
        return (sums - before).square() if group_size == 1 else (sums - before).square().sum(1)

    found = evaluate(example_objective, given, Objective(function, group_size), workspace=bytes_of(held, given.case))
    (sizes,), groups = chunks, torch.tensor(LENGTHS).view(-1, group_size).sum(1).tolist()
    assert [sum(rows) for rows in asked] == sizes
    assert [rows for chunk in asked for rows in chunk] == groups
    assert all(asked)
    assert all(sum(rows) <= held or len([r for r in rows if r]) == 1 for rows in asked)
    assert_agree(found, truth(given, Objective(function, group_size)), 4e-6)


@pytest.mark.parametrize("lengths", [(0, 9), (0, 0, 9, 0, 9, 0), (9, 0), (9, 0, 1), (0, 0)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_examples_without_rows(lengths, bias, dtype, device, backend, chunks):
    """Before, between and after examples longer than a chunk, examples without a row must count 0 and disturb nothing."""
    given = problem(lengths=lengths, bias=bias, dtype=dtype, device=device)
    wanted, tolerance = truth(given, OBJECTIVES["npo"]), TOLERANCE.get(dtype, 2 * torch.finfo(dtype).eps)
    for held in (2, 0, None):
        found = evaluate(example_objective, given, OBJECTIVES["npo"], workspace=held_by(held, given.case))
        assert_agree(found, wanted, tolerance)


@every_objective
@pytest.mark.parametrize("held", [None, 4, 0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(objective, held, dtype, device, backend, chunks):
    """From 16-bit inputs losses must be good to float32 and gradients to their own rounding, in any number of chunks."""
    given = problem(4, 3001, lengths=[6 * n for n in LENGTHS], dtype=dtype, masked=0.3, device=device)
    found = evaluate(example_objective, given, objective, workspace=held_by(held, given.case))
    wanted = truth(given, objective)
    assert [f.dtype for f in found] == [*[torch.float32] * 3, torch.int64, *[dtype] * 3]
    assert_agree(found[:4], wanted[:4], 4e-6)
    assert_agree(found, wanted, 2 * torch.finfo(dtype).eps)
    # float16 waits for the loss scale
    assert [len(sizes) > 1 for sizes in chunks] == ([held == 4] if dtype is torch.bfloat16 else [])


@every_objective
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(507, 123), (64, 3001)])
@pytest.mark.parametrize("held", [0, 7, None])
def test_no_worse_than_pytorch(objective, dtype, shape, held, device, backend, chunks):
    """Against float64, losses and gradients must be no further off than PyTorch's in the same dtype.

    Plus 4e-6 of the largest for what is float32 whatever the dtype. For gradients, plus half the dtype's epsilon, to which they are
    rounded.
    """
    given = problem(*shape, dtype=dtype, masked=0.3, device=device)
    wanted = truth(given, objective)
    ours = evaluate(example_objective, given, objective, workspace=held_by(held, given.case))
    theirs = evaluate(definition, given, objective)
    for at, (found, other, right) in enumerate(zip(ours, theirs, wanted, strict=True)):
        allowed = 4e-6 + (torch.finfo(dtype).eps / 2 if at >= 4 else 0)
        assert error(found, right) <= error(other, right) + allowed, at


@given(
    rows=st.lists(st.tuples(st.integers(0, 7), st.booleans()), max_size=24),
    held=st.integers(0, 24),
    name=st.sampled_from(sorted(OBJECTIVES)),
    seed=st.integers(0, 2**31),
)
def test_chunks_change_nothing(rows, held, name, seed, device, backend, chunks):
    """However rows, masks and examples lie, the answer is the same for any number of chunks."""
    case = make(len(rows), 6, 150, seed=seed)
    case.targets[torch.tensor([ignored for _, ignored in rows], dtype=torch.bool)] = -100
    index = torch.tensor([b for b, _ in rows], dtype=torch.int64)
    before = likelihoods_before(case, index, 8)
    given = Problem(cast(case, device=device), index.to(device), before.float().to(device))
    found = evaluate(example_objective, given, OBJECTIVES[name], workspace=held_by(held, case))
    wanted = evaluate(example_objective, given, OBJECTIVES[name], workspace=1 << 40)
    assert len(chunks[-1]) == 1
    assert_agree(found, [t.cpu() for t in wanted], 1e-5)


@given(order=st.randoms(use_true_random=False), held=st.sampled_from(HELD))
def test_permuted_rows(order, held, device, backend, chunks):
    """In whatever order the rows come, losses stay the same and each row keeps its gradient."""
    given = problem(masked=0.3, device=device)
    p = order.sample(range(ROWS), ROWS)
    moved = given._replace(
        case=given.case._replace(hidden=given.case.hidden[p], targets=given.case.targets[p]), index=given.index[p]
    )
    workspace = held_by(held, given.case)
    wanted = [t.cpu() for t in evaluate(example_objective, given, OBJECTIVES["npo"], workspace=workspace)]
    wanted[4] = wanted[4][p]
    assert_agree(evaluate(example_objective, moved, OBJECTIVES["npo"], workspace=workspace), wanted, 4e-6)


@every_objective
@pytest.mark.parametrize("held", [None, 4, 0])
def test_gradcheck(objective, held, device, backend, chunks):
    """The gradients must be those that finite differences find in float64, with bias, scale and softcap."""
    given = problem(3, 140, lengths=(2, 0, 5, 3), dtype=torch.float64, masked=0.2, device=device)
    options = {"logit_scale": 0.5, "softcap": 2.0, "workspace": held_by(held, given.case)}

    def function(hidden, weight, bias):
        return example_objective(
            hidden, weight, given.case.targets, given.index, objective.function, given.before,
            group_size=objective.group_size, bias=bias, **options,
        ).loss  # fmt: skip

    leaves = [t.requires_grad_() for t in given.case[:3]]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_reference_is_the_definition():
    """pyunlearn.ops.reference must say what PyTorch's cross-entropy says."""
    (hidden, weight, bias, targets), index, before = problem(dtype=torch.float64, masked=0.3)
    options = {"bias": bias, "logit_scale": 0.5, "softcap": 3.0}
    found = reference.example_objective(hidden, weight, targets, index, npo, before, examples=len(before), **options)
    assert_agree([found], definition(hidden, weight, targets, index, npo, before, **options)[:1], 1e-12)


# ---------------------------------------------------------------- what is given per example


@pytest.mark.parametrize("held", [None, 4])
@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_per_example(held, group_size, dtype, device, backend, chunks):
    """Any number of tensors per example, of any dtype and further dimensions, must reach the function beside their example."""
    given = problem(dtype=dtype, masked=0.2, device=device)
    examples = len(LENGTHS)
    table = torch.arange(6.0 * examples, device=device).view(examples, 2, 3)
    flags = torch.arange(examples, device=device) % 3 == 0

    def function(sums, counts, before, table, flags):
        assert table.shape == (*sums.shape, 2, 3)
        assert counts.shape == before.shape == flags.shape == sums.shape
        each = torch.where(flags, sums - before, 0.1 * sums * table.sum((-2, -1)))
        return each if group_size == 1 else each.prod(1)

    leaf = given.case.hidden.detach().requires_grad_()
    args = (given.case.weight, given.case.targets, given.index, function, given.before, table, flags)
    options = {"group_size": group_size, "bias": given.case.bias}
    found = example_objective(leaf, *args, workspace=held_by(held, given.case), **options)

    def closed(sums, counts, before):
        cut = (-1, group_size) if group_size > 1 else (-1,)
        return function(sums, counts, before, table.cpu().unflatten(0, cut), flags.cpu().view(cut))

    wanted = truth(given, Objective(closed, group_size))
    assert_agree([found.losses], [wanted[1]], 4e-6)
    tolerance = TOLERANCE.get(dtype, 2 * torch.finfo(dtype).eps)
    assert_agree(torch.autograd.grad(found.loss, leaf), [wanted[4]], tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("group_size", "examples"), [(1, 7), (2, 8), (3, 9)])
def test_number_of_examples(group_size, examples, dtype, device, backend):
    """With nothing given per example there are as many as the largest index says, in whole groups."""
    given = problem(dtype=dtype, device=device)

    def function(sums, counts):
        return -sums if group_size == 1 else -sums.sum(1)

    found = example_objective(*given.case[:2], given.case.targets, given.index, function, group_size=group_size)
    assert found.losses.shape == (examples // group_size,)
    assert found.counts.tolist() == [*LENGTHS, 0][:examples]
    assert found.log_likelihood.shape == (examples,)
    assert_agree([-found.log_likelihood.sum()], [found.loss.cpu()], 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("examples", [None, 0, 4])
def test_no_rows(examples, group_size, dtype, device, backend):
    """Without a row, without an example even, the loss is connected to the graph and its gradients are zero."""
    case = make(0, 8, 100, dtype=dtype, device=device)
    leaves = [t.requires_grad_() for t in case[:3]]
    per_example = [] if examples is None else [torch.full((examples,), 5.0, device=device)]

    def function(sums, counts, *before):
        each = (sums - before[0] if before else sums).square()
        return each if group_size == 1 else each.sum(1)

    index = torch.zeros(0, dtype=torch.int64, device=device)
    found = example_objective(
        *leaves[:2], case.targets, index, function, *per_example, group_size=group_size, bias=leaves[2]
    )
    assert found.loss.item() == 25.0 * (examples or 0)
    assert found.losses.shape == ((examples or 0) // group_size,)
    assert found.log_likelihood.tolist() == found.counts.tolist() == [0] * (examples or 0)
    gradients = torch.autograd.grad(found.loss, leaves)
    assert [g.shape for g in gradients] == [t.shape for t in leaves]
    assert not any(g.any() for g in gradients)


# ---------------------------------------------------------------- the edges


@any_workspace
def test_what_an_ignored_row_holds(held, device, backend, chunks):
    """NaN and infinity in ignored rows must not matter, and their gradient is 0."""
    given = problem(masked=0.4, device=device)
    wanted = truth(given, OBJECTIVES["npo"])
    ignored = (given.case.targets == -100).nonzero().squeeze(1)
    given.case.hidden[ignored[::2]], given.case.hidden[ignored[1::2]] = torch.nan, torch.inf
    found = evaluate(example_objective, given, OBJECTIVES["npo"], workspace=held_by(held, given.case))
    assert_agree(found, wanted, 4e-6)


@pytest.mark.parametrize("held", [None, 4])
def test_int32(held, device, backend, chunks):
    """Targets and example indices may be int32."""
    given = problem(masked=0.2, device=device)
    narrow = given._replace(case=given.case._replace(targets=given.case.targets.int()), index=given.index.int())
    for dtype in (torch.float32, torch.float16):
        cut = narrow._replace(case=cast(narrow.case, dtype=dtype))
        found = evaluate(example_objective, cut, OBJECTIVES["npo"], workspace=held_by(held, given.case))
        wanted = truth(given._replace(case=cast(given.case, dtype=dtype)), OBJECTIVES["npo"])
        assert_agree(found, wanted, 4e-6 if dtype is torch.float32 else 2e-3)


def test_ignore_index(device, backend):
    """Any number can mean "ignored", a token's own id too."""
    given = problem(device=device)
    given.case.targets[::3] = 0
    found = evaluate(example_objective, given, OBJECTIVES["simnpo"], ignore_index=0)
    assert found[3].sum() < ROWS
    assert_agree(found, truth(given, OBJECTIVES["simnpo"], ignore_index=0), 4e-6)


@any_workspace
def test_two_runs(held, device, backend, chunks):
    """The same inputs must give the same bits again."""
    given = problem(33, 1000, masked=0.3, device=device)
    first, second = (
        evaluate(example_objective, given, OBJECTIVES["npo"], workspace=held_by(held, given.case)) for _ in range(2)
    )
    assert_equal(second, first)


def test_mixed_dtypes(device, backend, chunks):
    """Hidden states, head and bias of different dtypes meet in the widest; each gradient comes back in its own."""
    given = problem(masked=0.2, device=device)
    case = given.case._replace(hidden=given.case.hidden.bfloat16(), bias=given.case.bias.half())
    given = given._replace(case=case)
    for workspace in (None, bytes_of(4, case)):
        found = evaluate(example_objective, given, OBJECTIVES["npo"], workspace=workspace)
        assert [g.dtype for g in found[4:]] == [torch.bfloat16, torch.float32, torch.float16]
        assert_agree(found, truth(given, OBJECTIVES["npo"]), 5e-3)
        assert_agree(found[:4], truth(given, OBJECTIVES["npo"])[:4], 4e-6)
    assert [len(sizes) > 1 for sizes in chunks] == [False, True]


def test_autocast(device, backend):
    """Under autocast the product takes 16-bit operands, and gradients come back in the parameters' own dtype."""
    given = problem(masked=0.2, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = evaluate(example_objective, given, OBJECTIVES["npo"])
    case = given.case._replace(hidden=given.case.hidden.bfloat16(), weight=given.case.weight.bfloat16())
    wanted = truth(given._replace(case=case), OBJECTIVES["npo"])
    assert [g.dtype for g in found[4:]] == [torch.float32] * 3
    assert_agree(found[:4], wanted[:4], 4e-6)
    assert_agree(found, wanted, 1e-2)


# ---------------------------------------------------------------- forward and backward


@every_objective
@pytest.mark.parametrize("held", [None, 4, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_second_backward(objective, held, dtype, device, backend, chunks):
    """Backward again and again over a retained graph must give the same bits, whatever factor came before, asked for together or apart."""
    given = problem(masked=0.3, dtype=dtype, device=device)
    found, leaves = graph(given, objective, workspace=held_by(held, given.case))
    first = torch.autograd.grad(4 * found.loss, leaves, retain_graph=True)
    copies = [g.clone() for g in first]
    for _ in range(2):
        assert_equal(torch.autograd.grad(4 * found.loss, leaves, retain_graph=True), copies)
    one = torch.autograd.grad(found.loss, leaves, retain_graph=True)
    assert_equal([torch.autograd.grad(found.loss, leaf, retain_graph=True)[0] for leaf in leaves], one)
    assert_equal(first, copies)  # they were given away, and nobody has written into them
    tolerance = 2 * torch.finfo(dtype).eps
    assert_agree(one, [g / 4 for g in truth(given, objective, factor=4.0)[4:]], max(tolerance, 4e-6))


@any_workspace
def test_accumulation(held, device, backend, chunks):
    """.grad must add up over backward passes of one graph."""
    given = problem(masked=0.3, device=device)
    found, leaves = graph(given, OBJECTIVES["npo"], workspace=held_by(held, given.case))
    found.loss.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves]
    found.loss.backward()
    assert_equal([leaf.grad for leaf in leaves], [g + g for g in once])
    assert_agree(once, truth(given, OBJECTIVES["npo"])[4:], 4e-6)


@any_workspace
@pytest.mark.parametrize("factor", [0.0, -0.5, 3.0])
def test_upstream_factor(held, factor, device, backend, chunks):
    """What the loss is multiplied with must multiply the gradient, and leave the rest."""
    given = problem(masked=0.3, device=device)
    options = {"workspace": held_by(held, given.case), "factor": factor}
    found, wanted = evaluate(example_objective, given, OBJECTIVES["npo"], **options), truth(given, OBJECTIVES["npo"])
    assert_agree(found, [*wanted[:4], *(factor * g for g in wanted[4:])], 4e-6)


@any_workspace
@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_frozen(held, trained, device, backend, chunks):
    """Hidden states, head and bias each get their gradient if they ask for it, whatever else is frozen."""
    given = problem(masked=0.3, device=device)
    wanted = truth(given, OBJECTIVES["simnpo"])[4:]
    found, leaves = graph(given, OBJECTIVES["simnpo"], trained, workspace=held_by(held, given.case))
    found.loss.backward()
    assert [i for i, leaf in enumerate(leaves) if leaf.grad is not None] == list(trained)
    assert_agree([leaves[i].grad for i in trained], [wanted[i] for i in trained], 4e-6)


def test_second_derivative():
    """A gradient of the gradient is refused in words, not left out of a sum."""
    found, (hidden, _, _) = graph(problem(), OBJECTIVES["npo"])
    (gradient,) = torch.autograd.grad(found.loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        (gradient.square().sum() + hidden.square().sum()).backward()


@every_objective
@pytest.mark.parametrize("held", [None, 4, 0])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_graph_without_gradients(mode, objective, held, device, backend, chunks):
    """Where no gradient is recorded, the loss has no graph, is the same, and costs one product."""
    given, found = problem(masked=0.3, device=device), []
    workspace = held_by(held, given.case)

    def unrecorded():
        with mode():
            found.append(graph(given, objective, workspace=workspace)[0])

    assert products(given.case, unrecorded) == 1
    assert not found[0].loss.requires_grad
    assert_agree(found[0], truth(given, objective)[:4], 4e-6)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_constant_function_will_do_without_gradients(mode, device, backend):
    """Where no gradient is recorded, nobody asks whether the function has one."""
    given = problem(device=device)
    with mode():
        found, _ = graph(given, Objective(lambda sums, counts, before: (sums > before).float()))
    assert_agree([found.losses], [(found.log_likelihood > given.before).float().cpu()], 0)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("objective", [OBJECTIVES["npo"], OBJECTIVES["dpo"]], ids=["npo", "dpo"])
def test_compile(dynamic, objective, device):
    """torch.compile(fullgraph=True) must take it without a break and give the eager answer to rounding, at every shape."""
    torch._dynamo.reset()

    def function(*args, **options):
        return example_objective(*args, softcap=4.0, **options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for lengths in (LENGTHS, (3, 1, 0, 5)) if dynamic else (LENGTHS,):
        given = problem(lengths=lengths, masked=0.3, device=device)
        found = evaluate(compiled, given, objective)
        assert_agree(found, [t.cpu() for t in evaluate(function, given, objective)], 4e-6)


def test_compiled_without_anything_per_example(device):
    """A compiled call cannot count the examples, and says what to give it."""
    torch._dynamo.reset()
    given = problem(device=device)

    def function(hidden):
        return example_objective(hidden, given.case.weight, given.case.targets, given.index, lambda s, c: s).loss

    with pytest.raises(Exception, match="cannot count the examples: pass a per-example tensor, zeros if need be"):
        torch.compile(function, fullgraph=True, backend="aot_eager")(given.case.hidden)


# ---------------------------------------------------------------- what it costs


@pytest.mark.parametrize(("dtype", "vocabulary"), [(torch.float32, 203), (torch.bfloat16, 1501)])
@pytest.mark.parametrize(("trained", "wanted"), [((0, 1, 2), 3), ((1,), 2), ((0, 2), 2), ((2,), 1)])
def test_products(dtype, vocabulary, trained, wanted, device, backend, chunks):
    """Three products are enough, two without the head's gradient or the trunk's, in a workspace of one example as in a large one.

    In one of none, there is one more.
    """
    given = problem(4, vocabulary, lengths=(2, 0, 1) * 25, dtype=dtype, masked=0.2, device=device)
    found = [
        products(
            given.case,
            lambda workspace=workspace: graph(given, OBJECTIVES["npo"], trained, workspace=workspace)[
                0
            ].loss.backward(),
        )
        for workspace in (None, bytes_of(2, given.case), 0)
    ]
    assert found == [wanted, wanted, wanted + 1]
    assert [len(sizes) > 1 for sizes in chunks] == [False, True, False]


def test_a_long_example_alone_is_made_again(device, backend, chunks):
    """Of examples of which one is longer than a chunk, that one costs a fourth product, for what does not fit, and the others none."""
    given = problem(8, 640, lengths=(4,) * 10 + (40,), device=device)
    cost = products(
        given.case, lambda: graph(given, OBJECTIVES["npo"], workspace=bytes_of(4, given.case))[0].loss.backward()
    )
    assert sorted(chunks[0]) == [4] * 10 + [40]
    assert 3 + 0.5 * 0.8 < cost <= 3.5  # half of the rows are in the long one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [True, False])
def test_memory(dtype, cut, device, request):
    """Beyond the gradients, a call must take its workspace and a few numbers a row, and never N * V of anything."""
    width, vocabulary, workspace = 8, 8192, 4 * MIB
    given = problem(width, vocabulary, lengths=(8,) * 120 + (64,), dtype=dtype, ordered=True, device=device)  # 32 MiB
    chunks = request.getfixturevalue("chunks") if cut else [[1024]]
    with Allocations() as used:
        found, leaves = graph(given, OBJECTIVES["npo"], workspace=workspace)
        found.loss.backward()
    answers = sum(
        t.numel() * (2 * t.element_size() + 4) for t in leaves
    )  # copies, and gradients with the float32 behind them
    per_row = 1024 * 4 * (24 + vocabulary // 64 + width) + MIB // 4
    temporaries = (
        workspace if _backend.kernels_for(given.case.hidden) == "reference" else 0
    )  # plain torch makes copies of a block
    assert workspace // 8 < used.peak <= workspace + temporaries + answers + per_row
    assert used.largest <= workspace
    assert (len(chunks[0]) > 1) == cut


# ---------------------------------------------------------------- errors


def broken(**changes):
    """Valid arguments but for the changes."""
    case = make(4, 4, 10)
    valid = {
        "hidden": case.hidden, "weight": case.weight, "targets": case.targets, "example_index": torch.tensor([0, 1, 2, 3]),
        "function": lambda sums, counts, *_: sums, "per_example": (),
    }  # fmt: skip
    return valid | changes


def call(**given):
    """example_objective with names for everything."""
    front = [given.pop(name) for name in ("hidden", "weight", "targets", "example_index", "function")]
    return example_objective(*front, *given.pop("per_example"), **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"hidden": torch.ones(2, 2, 4), "targets": ids(2, 2)},
            r"hidden must have shape \(N, D\) and targets \(N,\), got targets of shape \(2, 2\): flatten both",
        ),
        (
            {"example_index": torch.ones(4)},
            r"example_index must be an int64 tensor, got torch\.float32 of shape \(4,\)",
        ),
        ({"example_index": [0, 1, 2, 3]}, "example_index must be an int64 tensor, got list"),
        ({"example_index": ids(3)}, r"one number for each target, shape \(4,\) on cpu, got \(3,\) on cpu"),
        ({"example_index": ids(4, 1)}, r"one number for each target, shape \(4,\) on cpu, got \(4, 1\) on cpu"),
        ({"example_index": ids(4, **elsewhere)}, r"one number for each target, .* on cpu, got \(4,\) on meta"),
        ({"example_index": torch.tensor([0, 1, -1, 2])}, r"example_index must lie in \[0, 3\), got -1"),
        (
            {"per_example": (torch.zeros(3),)},
            r"example_index must lie in \[0, 3\), got 3: does a per_example tensor lack entries\?",
        ),
        (
            {"per_example": (torch.zeros(4), torch.zeros(5))},
            r"per_example must be tensors of 4 entries on cpu, got torch\.float32 of shape \(5,\)",
        ),
        ({"per_example": (torch.zeros(4), 1.0)}, "must be tensors of 4 entries on cpu, got float"),
        ({"per_example": ([0, 1, 2, 3],)}, "must be tensors of 4 entries on cpu, got list"),
        ({"per_example": (torch.zeros(4, **elsewhere),)}, "must be tensors of 4 entries on cpu, got"),
        (
            {"per_example": (torch.zeros(4, requires_grad=True),)},
            "per_example tensors are constants here, and one requires a gradient: detach it",
        ),
        (
            {"per_example": (torch.zeros(5),), "group_size": 2},
            "5 examples do not make whole groups of 2: add or drop some",
        ),
        ({"group_size": 0}, "group_size must be a whole number, 1 or more, got 0"),
        ({"group_size": 2.0}, r"group_size must be a whole number, 1 or more, got 2\.0"),
        (
            {"function": lambda sums, counts: sums.mean()},
            r"function must return one loss for each example, a tensor of shape \(4,\), got \(\): leave the mean out",
        ),
        (
            {"function": lambda sums, counts: sums, "group_size": 2},
            r"one loss for each group of 2 examples, a tensor of shape \(2,\), got \(2, 2\)",
        ),
        ({"function": lambda sums, counts: 0.0}, r"a tensor of shape \(4,\), got float: leave the mean out"),
        (
            {"function": lambda sums, counts: sums.detach()},
            "function must be differentiable in its first argument, and its losses want no gradient: use torch operations",
        ),
        ({"targets": ids(3)}, r"one token id for each row of hidden, shape \(4,\), got \(3,\)"),
        ({"targets": torch.tensor([0, -100, 10, 1])}, r"targets must lie in \[0, 10\) or be -100 .*, got 10: "),
        ({"weight": torch.ones(10, 5)}, r"weight must have shape \(V, 4\) to match hidden .*, got \(10, 5\)"),
        ({"bias": torch.ones(9)}, r"bias must have shape \(10,\), one number for each vocabulary entry, got \(9,\)"),
        ({"softcap": 0.0}, r"softcap must be positive, got 0\.0: leave it None for no cap"),
        ({"workspace": -1}, "workspace must be a number of bytes, 0 or more, got -1"),
    ],
)
def test_errors(changes, sentence, dtype):
    """Each wrong argument is named with what was wanted and what came, on both ways through."""
    given = broken(**changes)
    given |= {"hidden": given["hidden"].to(dtype).requires_grad_(), "weight": given["weight"].to(dtype)}
    with pytest.raises(ArgumentError, match=sentence):
        call(**given)


def test_valid_arguments():
    """What the errors above start from is no error."""
    assert call(**broken()).losses.shape == (4,)


def test_a_tensor_of_the_functions_own_is_refused():
    """A parameter inside the function would silently get no gradient; one that wants none may be there."""
    beta = torch.tensor(0.1, requires_grad=True)
    given = [torch.randn(4, 3, requires_grad=True), torch.randn(5, 3), torch.arange(4), torch.tensor([0, 0, 1, 1])]
    with pytest.raises(ArgumentError, match="wants a gradient of its own"):
        example_objective(*given, lambda sums, counts: sums * (2 * beta))
    example_objective(*given, lambda sums, counts: sums * beta.detach()).loss.backward()
