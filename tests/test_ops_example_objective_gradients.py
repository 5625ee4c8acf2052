"""example_objective's backward pass: repeated, scaled, frozen, compiled, and what it costs."""

import sys

import pytest
import torch
from coverings import BACKENDS, grid, in_full
from heads import (
    Allocations,
    assert_agree,
    assert_equal,
    bytes_of,
    products,
    watch_chunks,
)
from objective_cases import (
    CAPACITIES,
    LENGTHS,
    OBJECTIVES,
    Objective,
    any_capacity,
    evaluate,
    graph,
    problem,
    truth,
    workspace_for,
)

from pyunlearn.ops import _backend, example_objective
from pyunlearn.ops._plan import MIB

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def chunks(monkeypatch):
    """Split small cases into chunks too; return the list that records the rows of each."""
    return watch_chunks(monkeypatch, sys.modules["pyunlearn.ops.example_objective"])


# ---------------------------------------------------------------- forward and backward


@grid(
    {"capacity": 4, "dtype": torch.float32, "backend": "compiled"},
    objective=OBJECTIVES,
    capacity=[None, 4, 0],
    dtype=[torch.float32, torch.float16],
    backend=BACKENDS,
)
def test_second_backward(objective, capacity, dtype, device, backend, chunks):
    """Repeated backward passes of a retained graph give the same bits after any factor, for all leaves or for one."""
    task = problem(masked=0.3, dtype=dtype, device=device)
    actual, leaves = graph(task, objective, workspace=workspace_for(capacity, task.case))
    first = torch.autograd.grad(4 * actual.loss, leaves, retain_graph=True)
    copies = [g.clone() for g in first]
    for _ in range(2):
        assert_equal(torch.autograd.grad(4 * actual.loss, leaves, retain_graph=True), copies)
    one = torch.autograd.grad(actual.loss, leaves, retain_graph=True)
    assert_equal([torch.autograd.grad(actual.loss, leaf, retain_graph=True)[0] for leaf in leaves], one)
    assert_equal(first, copies)  # the caller owns them: later passes must not write into them
    tolerance = 2 * torch.finfo(dtype).eps
    assert_agree(one, [g / 4 for g in truth(task, objective, factor=4.0)[4:]], max(tolerance, 4e-6))


@any_capacity
def test_accumulation(capacity, device, backend, chunks):
    """.grad must add up over backward passes of one graph."""
    task = problem(masked=0.3, device=device)
    actual, leaves = graph(task, OBJECTIVES["npo"], workspace=workspace_for(capacity, task.case))
    actual.loss.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves]
    actual.loss.backward()
    assert_equal([leaf.grad for leaf in leaves], [g + g for g in once])
    assert_agree(once, truth(task, OBJECTIVES["npo"])[4:], 4e-6)


@grid(capacity=CAPACITIES, factor=[0.0, -0.5, 3.0], backend=BACKENDS)
def test_upstream_factor(capacity, factor, device, backend, chunks):
    """A factor on the loss must multiply the gradients and nothing else."""
    task = problem(masked=0.3, device=device)
    options = {"workspace": workspace_for(capacity, task.case), "factor": factor}
    actual, wanted = evaluate(example_objective, task, OBJECTIVES["npo"], **options), truth(task, OBJECTIVES["npo"])
    assert_agree(actual, [*wanted[:4], *(factor * g for g in wanted[4:])], 4e-6)


@grid(capacity=CAPACITIES, trained=[(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], backend=BACKENDS)
def test_frozen(capacity, trained, device, backend, chunks):
    """Hidden states, head and bias each get their gradient if they require one, with any of the others frozen."""
    task = problem(masked=0.3, device=device)
    wanted = truth(task, OBJECTIVES["simnpo"])[4:]
    actual, leaves = graph(task, OBJECTIVES["simnpo"], trained, workspace=workspace_for(capacity, task.case))
    actual.loss.backward()
    assert [i for i, leaf in enumerate(leaves) if leaf.grad is not None] == list(trained)
    assert_agree([leaves[i].grad for i in trained], [wanted[i] for i in trained], 4e-6)


def test_second_derivative():
    """A gradient of the gradient raises a clear error, instead of missing in a sum."""
    actual, (hidden, _, _) = graph(problem(), OBJECTIVES["npo"])
    (gradient,) = torch.autograd.grad(actual.loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        (gradient.square().sum() + hidden.square().sum()).backward()


@grid(mode=[torch.no_grad, torch.inference_mode], objective=OBJECTIVES, capacity=[None, 4, 0], backend=BACKENDS)
def test_no_graph_without_gradients(mode, objective, capacity, device, backend, chunks):
    """Without gradient recording, the loss is the same, has no graph, and costs one product."""
    task, actual = problem(masked=0.3, device=device), []
    workspace = workspace_for(capacity, task.case)

    def unrecorded():
        with mode():
            actual.append(graph(task, objective, workspace=workspace)[0])

    assert products(task.case, unrecorded) == 1
    assert not actual[0].loss.requires_grad
    assert_agree(actual[0], truth(task, objective)[:4], 4e-6)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_constant_function_without_gradients(mode, device, backend):
    """Without gradient recording, a function without a gradient is accepted."""
    task = problem(device=device)
    with mode():
        actual, _ = graph(task, Objective(lambda sums, counts, before: (sums > before).float()))
    assert_agree([actual.losses], [(actual.log_likelihood > task.before).float().cpu()], 0)


@pytest.mark.full
@pytest.mark.parametrize(
    ("dynamic", "objective"), [(False, "dpo"), *in_full((False, "npo"), (True, "dpo"), (True, "npo"))]
)
def test_compile(dynamic, objective, device):
    """torch.compile(fullgraph=True) must compile it and agree with eager to rounding, at every shape."""
    torch._dynamo.reset()

    def function(*args, **options):
        return example_objective(*args, softcap=4.0, **options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for lengths in (LENGTHS, (3, 1, 0, 5)) if dynamic else (LENGTHS,):
        task = problem(lengths=lengths, masked=0.3, device=device)
        actual = evaluate(compiled, task, OBJECTIVES[objective])
        assert_agree(actual, [t.cpu() for t in evaluate(function, task, OBJECTIVES[objective])], 4e-6)


def test_compiled_without_tensors_per_example(device):
    """A compiled call cannot count the examples, and its error names the remedy."""
    torch._dynamo.reset()
    task = problem(device=device)

    def function(hidden):
        return example_objective(hidden, task.case.weight, task.case.targets, task.index, lambda s, c: s).loss

    with pytest.raises(Exception, match="cannot count the examples: pass a per-example tensor, zeros if need be"):
        torch.compile(function, fullgraph=True, backend="aot_eager")(task.case.hidden)


# ---------------------------------------------------------------- cost


@grid(
    head=[(torch.float32, 203), (torch.bfloat16, 1501)],
    expected=[((0, 1, 2), 3), ((1,), 2), ((0, 2), 2), ((2,), 1)],
    backend=BACKENDS,
)
def test_products(head, expected, device, backend, chunks):
    """Three products are enough, two with a frozen head or trunk, in a workspace of one example as in a large one.

    A workspace of 0 bytes costs one more.
    """
    (dtype, vocabulary), (trained, wanted) = head, expected
    task = problem(4, vocabulary, lengths=(2, 0, 1) * 25, dtype=dtype, masked=0.2, device=device)
    actual = [
        products(
            task.case,
            lambda workspace=workspace: graph(task, OBJECTIVES["npo"], trained, workspace=workspace)[0].loss.backward(),
        )
        for workspace in (None, bytes_of(2, task.case), 0)
    ]
    assert actual == [wanted, wanted, wanted + 1]
    assert [len(sizes) > 1 for sizes in chunks] == [False, True, False]


def test_only_a_long_example_is_recomputed(device, backend, chunks):
    """An example longer than a chunk costs a fourth product for its logits that do not fit; the others do not."""
    task = problem(8, 640, lengths=(4,) * 10 + (40,), device=device)
    cost = products(
        task.case, lambda: graph(task, OBJECTIVES["npo"], workspace=bytes_of(4, task.case))[0].loss.backward()
    )
    assert sorted(chunks[0]) == [4] * 10 + [40]
    assert 3 + 0.5 * 0.8 < cost <= 3.5  # half of the rows are in the long one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [True, False])
def test_memory(dtype, cut, device, request):
    """Beyond the gradients, a call must allocate its workspace and a few numbers a row, never (N, V) of anything."""
    width, vocabulary, workspace = 8, 8192, 4 * MIB
    task = problem(width, vocabulary, lengths=(8,) * 120 + (64,), dtype=dtype, ordered=True, device=device)  # 32 MiB
    chunks = request.getfixturevalue("chunks") if cut else [[1024]]
    with Allocations() as used:
        actual, leaves = graph(task, OBJECTIVES["npo"], workspace=workspace)
        actual.loss.backward()
    answers = sum(
        t.numel() * (2 * t.element_size() + 4) for t in leaves
    )  # copies, and gradients with the float32 behind them
    per_row = 1024 * 4 * (24 + vocabulary // 64 + width) + MIB // 4
    temporaries = (
        workspace if _backend.kernels_for(task.case.hidden) == "reference" else 0
    )  # plain PyTorch copies a block
    assert workspace // 8 < used.peak <= workspace + temporaries + answers + per_row
    assert used.largest <= workspace
    assert (len(chunks[0]) > 1) == cut
