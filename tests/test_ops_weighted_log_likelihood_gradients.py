"""weighted_log_likelihood's backward pass: repeated, scaled, frozen, compiled, and what it costs."""

import sys

import pytest
import torch
import torch.utils.checkpoint
from coverings import BACKENDS, grid, in_full
from heads import (
    Allocations,
    assert_agree,
    assert_equal,
    bytes_of,
    make,
    products,
    saved_elsewhere,
    watch_chunks,
)
from torch.utils._python_dispatch import TorchDispatchMode
from weighted_cases import CAPACITIES, any_capacity, coefficients_of, definition, evaluate, graph, truth, workspace_for

from pyunlearn.ops import _backend, weighted_log_likelihood
from pyunlearn.ops._plan import MIB

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def chunks(monkeypatch):
    """Split small cases into chunks too; return the list that records the rows of each."""
    return watch_chunks(monkeypatch, sys.modules["pyunlearn.ops.weighted_log_likelihood"])


# ---------------------------------------------------------------- forward and backward


@grid(
    {"capacity": 5, "dtype": torch.float32, "backend": "compiled"},
    capacity=CAPACITIES,
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    backend=BACKENDS,
)
def test_second_backward(capacity, dtype, device, backend, chunks):
    """Repeated backward passes of a retained graph give the same bits after any factor, for all leaves or for one."""
    case = make(11, 16, 3001, dtype=dtype, device=device, masked=0.3)
    value, leaves = graph(case, workspace=workspace_for(capacity, case))
    first = torch.autograd.grad(4 * value, leaves, retain_graph=True)
    for _ in range(2):
        assert_equal(torch.autograd.grad(4 * value, leaves, retain_graph=True), first)
    one = torch.autograd.grad(value, leaves, retain_graph=True)
    apart = [torch.autograd.grad(value, leaf, retain_graph=True)[0] for leaf in leaves]
    assert_equal(apart, one)
    if dtype is not torch.float16:  # its smallest gradients have fewer digits than four times as large ones
        assert_equal([4 * g for g in one], first)


@any_capacity
def test_gradients_belong_to_the_caller(capacity, device, backend, chunks):
    """A later backward pass of the same graph must not write into the gradients of an earlier one."""
    case = make(11, 16, 300, device=device, masked=0.3)
    value, leaves = graph(case, workspace=workspace_for(capacity, case))
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    copies = [g.clone() for g in first]
    second = torch.autograd.grad(-7 * value, leaves)
    assert_equal(first, copies)
    assert not {g.data_ptr() for g in first} & {g.data_ptr() for g in second}


@any_capacity
def test_accumulation(capacity, device, backend, chunks):
    """.grad must add up over backward passes of one graph, and over graphs."""
    case = make(11, 16, 300, device=device, masked=0.3)
    wanted = truth(case)[1:]
    value, leaves = graph(case, workspace=workspace_for(capacity, case))
    value.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves]
    value.backward()
    assert_equal([leaf.grad for leaf in leaves], [g + g for g in once])
    again = weighted_log_likelihood(
        *leaves[:2], case.targets, coefficients_of(case), bias=leaves[2], workspace=workspace_for(capacity, case)
    )
    again.backward()
    assert_agree([leaf.grad for leaf in leaves], [3 * g for g in wanted], 4e-6)


@grid(capacity=CAPACITIES, factor=[0.0, -0.5, 3.0], backend=BACKENDS)
def test_upstream_factor(capacity, factor, device, backend, chunks):
    """A factor on the value must multiply the gradients and leave the value."""
    case = make(11, 16, 300, device=device, masked=0.3)
    actual = evaluate(weighted_log_likelihood, case, factor=factor, workspace=workspace_for(capacity, case))
    value, *gradients = truth(case)
    assert_agree(actual, [value, *(factor * g for g in gradients)], 4e-6)


@pytest.mark.parametrize(("factor", "wanted"), [(1.0, 0), (2.0, 1)])
def test_a_factor_of_1_costs_nothing(factor, wanted):
    """loss.backward() returns the gradients without another read and write of the weight's."""
    case, scaled = make(9, 8, 50, bias=False), []

    class Scalings(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.mul_.Tensor and args[0].shape == case.weight.shape:
                scaled.append(function)
            return function(*args, **(kwargs or {}))

    weight = case.weight.clone().requires_grad_()
    value = weighted_log_likelihood(case.hidden, weight, case.targets, torch.ones(9))
    with Scalings():
        value.backward(torch.tensor(factor))
    assert len(scaled) == wanted


@grid(capacity=CAPACITIES, trained=[(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], backend=BACKENDS)
def test_frozen(capacity, trained, device, backend, chunks):
    """Hidden states, head and bias each get their gradient if they require one, with any of the others frozen."""
    case = make(7, 16, 300, device=device, masked=0.3)
    wanted = truth(case)[1:]
    value, leaves = graph(case, trained, workspace=workspace_for(capacity, case))
    value.backward()
    assert [i for i, leaf in enumerate(leaves) if leaf.grad is not None] == list(trained)
    assert_agree([leaves[i].grad for i in trained], [wanted[i] for i in trained], 4e-6)


def test_saved_elsewhere(device, backend, chunks):
    """Checkpointing, and saved tensors stored in other memory, must change no gradient."""
    case = make(7, 16, 300, device=device, masked=0.3)

    def checkpointed(*args, **options):
        return torch.utils.checkpoint.checkpoint(weighted_log_likelihood, *args, use_reentrant=False, **options)

    for workspace in (None, bytes_of(2, case)):
        wanted = evaluate(weighted_log_likelihood, case, workspace=workspace)
        assert_equal(evaluate(checkpointed, case, workspace=workspace), wanted)
        with saved_elsewhere():
            assert_equal(evaluate(weighted_log_likelihood, case, workspace=workspace), wanted)


def test_tied_head(chunks):
    """A weight that is embedding and head at once must get the sum of both gradients."""
    case, tokens = make(7, 16, 100), torch.arange(7)
    gradients = []
    for op in (weighted_log_likelihood, definition):
        weight = case.weight.double().requires_grad_()
        value = op(weight[tokens].tanh(), weight, case.targets, coefficients_of(case), workspace=4000)
        gradients.append(torch.autograd.grad(value, weight)[0])
    assert len(chunks[0]) > 1
    assert_agree(gradients[:1], gradients[1:], 1e-12)


def test_changed_head():
    """A head changed in place between forward and backward is an error, as everywhere in PyTorch."""
    value, (_, weight, _) = graph(make(3, 4, 10))
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_second_derivative():
    """A gradient of the gradient raises a clear error, instead of missing in a sum."""
    value, (hidden, _, _) = graph(make(3, 4, 10))
    (gradient,) = torch.autograd.grad(value, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        (gradient.square().sum() + hidden.square().sum()).backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@any_capacity
def test_no_graph_without_gradients(mode, capacity, device, backend, chunks):
    """Without an input that requires a gradient, or without recording, the value has no graph and costs one product."""
    case = make(8, 4, 300, device=device, masked=0.3)
    wanted, actual = truth(case)[:1], []

    def constant():
        actual.append(
            weighted_log_likelihood(
                *case[:2], case.targets, coefficients_of(case), bias=case.bias, workspace=workspace_for(capacity, case)
            )
        )

    def unrecorded():
        with mode():
            actual.append(graph(case, workspace=workspace_for(capacity, case))[0])

    assert [products(case, constant), products(case, unrecorded)] == [1, 1]
    assert not any(value.requires_grad for value in actual)
    for value in actual:
        assert_agree([value], wanted, 4e-6)


@pytest.mark.full
@pytest.mark.parametrize("dynamic", [False, *in_full(True)])
def test_compile(dynamic, device):
    """torch.compile(fullgraph=True) must compile it and agree with eager to rounding, at every shape."""
    torch._dynamo.reset()

    def function(hidden, weight, targets, coefficients, bias):
        return weighted_log_likelihood(hidden, weight, targets, coefficients, bias=bias, softcap=4.0)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (6, 9) if dynamic else (6,):
        case = make(rows, 8, 200, device=device, masked=0.3)
        assert_agree(evaluate(compiled, case), [t.cpu() for t in evaluate(function, case)], 4e-6)


# ---------------------------------------------------------------- cost


@grid(
    head=[(torch.float32, 203), (torch.bfloat16, 1501)],
    expected=[((0, 1, 2), 3), ((1,), 2), ((0, 2), 2), ((2,), 1)],
    backend=BACKENDS,
)
def test_products(head, expected, device, backend, chunks):
    """Three products are enough, two with a frozen head or trunk, in a workspace of few rows as in a large one.

    A workspace of 0 bytes costs one more.
    """
    (dtype, vocabulary), (trained, wanted) = head, expected
    case = make(90, 4, vocabulary, dtype=dtype, device=device, masked=0.3)
    actual = [
        products(case, lambda workspace=workspace: graph(case, trained, workspace=workspace)[0].backward())
        for workspace in (None, bytes_of(3, case), 0)
    ]
    assert actual == [wanted, wanted, wanted + 1]
    assert [len(sizes) > 1 for sizes in chunks] == [False, True, False]


def test_chunks_where_they_pay(device, backend, monkeypatch):
    """By default rows are split into chunks where hundreds fit the workspace, and logits recomputed where few do."""
    seen = []
    module = sys.modules["pyunlearn.ops.weighted_log_likelihood"]
    original = module.one_pass
    monkeypatch.setattr(module, "one_pass", lambda work, *head: seen.append(len(work.chunks)) or original(work, *head))
    case = make(4096, 4, 256, device=device, bias=False)
    wanted = truth(case)
    for capacity in (1024, 8):
        actual = evaluate(weighted_log_likelihood, case, workspace=bytes_of(capacity, case))
        assert_agree(actual, wanted, 1e-5)
    assert seen == [4, 1]


@grid(dtype=[torch.float32, torch.bfloat16], workspace=[MIB, 4 * MIB], trained=[True, False], cut=[True, False])
def test_memory(dtype, workspace, trained, cut, device, request):
    """Beyond the gradients, a call must allocate its workspace and a few numbers a row, never (N, V) of anything.

    Without gradients it takes one block of logits, a quarter of the workspace.
    """
    rows, width, vocabulary = 1024, 8, 8192  # 32 MiB of float32 logits
    case = make(rows, width, vocabulary, dtype=dtype, device=device)
    chunks = request.getfixturevalue("chunks") if cut else [[rows]]
    with Allocations() as used:
        hidden, weight, bias = (t.requires_grad_(trained) for t in case[:3])
        value = weighted_log_likelihood(
            hidden, weight, case.targets, coefficients_of(case), bias=bias, workspace=workspace
        )
        if trained:
            value.backward()
    answers = sum(t.numel() * (t.element_size() + 4) for t in case[:3]) if trained else 0  # with their float32 sums
    per_row = rows * 4 * (16 + (vocabulary // 64 if trained else 0) + width) + MIB // 4
    temporaries = workspace if _backend.kernels_for(case.hidden) == "reference" else 0  # plain PyTorch copies a block
    allowed = workspace if trained else workspace // 4
    assert workspace // 8 < used.peak <= allowed + temporaries + answers + per_row
    assert used.largest <= workspace
    assert (len(chunks[0]) > 1) == cut
