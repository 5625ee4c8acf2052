"""kl_divergence: products, memory and synchronization, PyTorch's own checks, and errors."""

import math

import pytest
import torch
from coverings import BACKENDS, grid, in_full
from heads import (
    Allocations,
    assert_agree,
    assert_equal,
    elsewhere,
    ids,
    on_gpu,
    products,
)
from kl_cases import DTYPES, assert_right, coefficients_of, evaluate, graph, op_module, pair

from pyunlearn.errors import ArgumentError
from pyunlearn.ops import _backend, _passes, kl_divergence
from pyunlearn.ops._check import NOTHING
from pyunlearn.ops._plan import MIB

pytestmark = pytest.mark.usefixtures("poisoned")


# ---------------------------------------------------------------- cost, and PyTorch's own checks


def watched():
    """Return Allocations that record inside kl_divergence."""
    used, ops = Allocations(), torch.ops.pyunlearn
    used.inside[ops.kl_divergence.default] = op_module._forward
    used.inside[ops.kl_divergence_backward.default] = op_module._backward
    return used


@pytest.mark.parametrize(("trained", "wanted"), [((0, 1, 2), 2), ((0,), 1), ((1,), 1), ((2,), 0)])
def test_products(trained, wanted, device, backend):
    """Two products forward, one backward for hidden states and for the head if trained, two to recompute logits."""
    model, other = pair(90, (8, 8), 203, device=device, masked=0.3)
    full = evaluate(kl_divergence, model, other)[1:]
    for workspace, again in ((None, 0), (0, 2)):

        def run(workspace=workspace):
            with watched():
                values, leaves = graph(kl_divergence, model, other, trained, workspace=workspace)
                values.backward(coefficients_of(values))
            assert_agree([leaves[i].grad for i in trained], [full[i].cpu() for i in trained], 4e-6)
            assert [i for i in range(3) if leaves[i].grad is not None] == list(trained)

        assert products(model, run) == 2 + wanted + again
    assert products(model, lambda: graph_without(model, other)) == 2


@grid(dtype=DTYPES, masked=[0.0, 0.3], backend=BACKENDS)
def test_itself_as_reference_is_one_product(dtype, masked, device, backend):
    """The model as its own reference gives the bits of a copy, with one product less forward and to recompute."""
    model, _ = pair(90, (8, 8), 203, dtype=dtype, device=device, masked=masked)

    def run(reference, workspace):
        hidden, weight = model.hidden.clone().requires_grad_(), model.weight.clone().requires_grad_()
        other = [x.detach() if reference == "itself" else x.detach().clone() for x in (hidden, weight)]
        with watched():
            values = kl_divergence(
                hidden, weight, *other, model.targets, bias=model.bias, target_shift=2.0, workspace=workspace
            )
            values.backward(coefficients_of(values))
        return values.detach(), hidden.grad, weight.grad

    for workspace, again in ((None, 0), (0, 1)):
        assert_equal(run("itself", workspace), run("a copy", workspace))
        if dtype is not torch.float16 and dtype is not torch.bfloat16:
            assert products(model, lambda w=workspace: run("itself", w)) == 3 + again


@pytest.mark.parametrize("reference", ["itself", "another"])
def test_masked_rows_take_no_workspace(reference, device, backend):
    """A workspace that fits both logits of the live rows caches all of them, so that no product is computed twice."""
    model, other = pair(64, (20, 8), 703, device=device, masked=0.7)
    other = model if reference == "itself" else other
    live, workspace = int((model.targets >= 0).sum()), 240_000
    plans = [
        op_module._plan(model.hidden.new_empty(n, 20), model.weight, workspace, True, False)
        for n in (live, len(model.hidden))
    ]
    assert [p.cached == len(p.groups()) for p in plans] == [True, False]

    def run():
        hidden = model.hidden.clone().requires_grad_()
        theirs = (hidden.detach(), model.weight) if reference == "itself" else other[:2]
        with watched():
            kl_divergence(hidden, model.weight, *theirs, model.targets, workspace=workspace).sum().backward()

    shares = 1 if reference == "itself" else 1 + 8 / 20
    assert products(model, run) == pytest.approx(shares + 1)
    assert_right(model, other, workspaces=(workspace,))


@pytest.mark.parametrize("ignore_index", [None, -100])
def test_backward_counts_no_rows(ignore_index, device, backend, monkeypatch):
    """Live rows are counted once, in forward, and never with ignore_index=None: on a GPU a count synchronizes."""
    model, other = pair(40, (8, 5), 203, device=device, masked=0.0 if ignore_index is None else 0.4)
    queries, original = [], op_module.live_rows

    def live_rows(targets, ignore_index):
        if ignore_index != NOTHING:
            queries.append(len(targets))
        return original(targets, ignore_index)

    for module in (op_module, _passes):
        monkeypatch.setattr(module, "live_rows", live_rows)
    values, leaves = graph(kl_divergence, model, other, ignore_index=ignore_index)
    assert queries == ([] if ignore_index is None else [40])
    torch.autograd.grad(values.sum(), leaves)
    assert len(queries) == (ignore_index is not None)


@on_gpu
def test_backward_never_synchronizes(device, backend):
    """The backward pass does not synchronize with the GPU, with or without ignored rows."""
    for masked in (0.4, 0.0):
        model, other = pair(40, (8, 5), 203, device=device, masked=masked)
        values, leaves = graph(kl_divergence, model, other)
        total = values.sum()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            actual = torch.autograd.grad(total, leaves)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(g.isfinite().all() for g in actual)


def graph_without(model, other):
    """Compute the values alone."""
    with watched():
        graph(kl_divergence, model, other, ())


@grid(dtype=[torch.float32, torch.bfloat16], workspace=[MIB, 4 * MIB], trained=[True, False])
def test_memory(dtype, workspace, trained, device):
    """Beyond the gradients, a call must allocate its workspace and a few numbers a row, never (N, V) of anything."""
    rows, width, vocabulary = 1024, 8, 8192  # 32 MiB of float32 logits, twice
    model, other = pair(rows, (width, 4), vocabulary, dtype=dtype, device=device)
    with watched() as used:
        values, _ = graph(kl_divergence, model, other, (0, 1, 2) if trained else (), workspace=workspace)
        if trained:
            values.sum().backward()
    leaves = sum(t.numel() * t.element_size() for t in model[:3])
    answers = leaves + (sum(t.numel() * (t.element_size() + 4) for t in model[:3]) if trained else 0)
    per_row = rows * 4 * (24 + 2 * width) + MIB // 4
    copies = 4 * workspace if _backend.kernels_for(model.hidden) == "reference" else 0  # plain PyTorch copies a block
    assert workspace // 8 < used.peak <= workspace + copies + answers + per_row
    assert used.largest <= workspace


@grid(dtype=[torch.float32, torch.bfloat16], workspace=[17, 20, 24, 32, 128, 132, 144], strength=1)
def test_memory_of_cached_groups(dtype, workspace, device):
    """Cached groups, of one block or several, and a group's gradient fit the workspace and use at least half of it."""
    rows, width, vocabulary = (
        1024,
        8,
        2048 if workspace < 64 else 16384,
    )  # 16 or 128 MiB of float32 logits, twice included
    model, other = pair(rows, (width, 4), vocabulary, dtype=dtype, device=device, bias=False)
    p = op_module._plan(model.hidden, model.weight, workspace * MIB, True, False)
    assert p.group == p.block * (1 if workspace < 64 or device != "cpu" else 4)
    assert p.cached == len(p.groups()) or p.cached >= (workspace / 2) // (2 * rows * p.group * 4 / MIB)
    with watched() as used:
        values, _ = graph(kl_divergence, model, other, (0, 1), workspace=workspace * MIB)
        values.sum().backward()
    answers = sum(t.numel() * (2 * t.element_size() + 4) for t in model[:2])
    outside = answers + rows * 4 * (24 + 2 * width) + MIB // 4
    copies = 4 * 8 * MIB if _backend.kernels_for(model.hidden) == "reference" else 0  # plain PyTorch copies a block
    assert used.peak <= workspace * MIB + outside + copies, (used.peak, p)


def test_products_of_whole_groups(device, backend, monkeypatch):
    """The gradient's products take a group of blocks at a time, so the hidden gradient is a sum of few terms."""
    model, other = pair(3, (8, 5), 50257, device=device, bias=False)  # blocks of 8192 columns, groups of four or eight
    sums, add_product = [], op_module.add_product
    monkeypatch.setattr(op_module, "add_product", lambda out, a, b: sums.append(a.shape[1]) or add_product(out, a, b))
    evaluate(kl_divergence, model, other)
    group = op_module._plan(model.hidden, model.weight, None, True, False).group
    assert sums == [min(group, 50257 - first) for first in range(0, 50257, group)]
    assert group >= 4 * 8192


def test_opcheck(device):
    """Schema, fake kernels and autograd of both ops must pass torch.library.opcheck."""
    op, back = torch.ops.pyunlearn.kl_divergence.default, torch.ops.pyunlearn.kl_divergence_backward.default
    model, other = pair(4, (8, 5), 90, device=device)
    leaves = [t.clone().requires_grad_() for t in model[:3]]
    torch.library.opcheck(op, (*leaves, *other[:3], model.targets, 0.5, 3.0, 2.0, False, -100, None, True))
    torch.library.opcheck(op, (*leaves, *model[:3], model.targets, 0.5, 3.0, 2.0, True, -100, None, True))
    torch.library.opcheck(op, (*model[:2], None, *other[:2], None, model.targets, 1.0, 0.0, 0.0, False, -100, 0, False))
    static = ("test_schema", "test_faketensor")  # it has no gradient of its own
    for needs, itself in (([True, True, True], False), ([True, False, False], True), ([False, True, False], False)):
        rest = (*model[:3], *(model if itself else other)[:3], model.targets, 0.5, 3.0, 2.0, itself, -100, 20000)
        kl, maximum, total, cached = op(*rest, True)
        torch.library.opcheck(back, (torch.ones_like(kl), maximum, total, cached, *rest, needs), test_utils=static)


@pytest.mark.parametrize("dynamic", [False, *in_full(True)])
def test_compile(dynamic, device):
    """torch.compile(fullgraph=True) must compile it and agree with eager bit for bit, at every shape."""
    torch._dynamo.reset()

    def function(*args, **options):
        return kl_divergence(*args, **options, softcap=4.0, target_shift=2.0)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (6, 9) if dynamic else (6,):
        both = pair(rows, (8, 5), 200, device=device, masked=0.3)
        assert_equal(evaluate(compiled, *both), evaluate(function, *both))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"target_shift": 1.0}, "target_shift must be 0 or more and goes with targets, got 1.0 and targets=None"),
        ({"target_shift": -1.0, "targets": ids(3)}, "target_shift must be 0 or more"),
        ({"target_shift": math.nan, "targets": ids(3)}, "target_shift must be 0 or more"),
        ({"targets": torch.tensor([0, -100, 10])}, r"targets must lie in \[0, 10\) or be -100 \(ignored\), got 10: "),
        ({"targets": ids(4)}, r"one token id for each row of hidden, shape \(3,\), got \(4,\)"),
        ({"hidden": ids(3, 4)}, r"hidden must be a float32, .*, got torch\.int64"),
        ({"reference_hidden": ids(3, 5)}, r"reference_hidden must be a floating-point tensor, got torch\.int64"),
        (
            {"reference_hidden": torch.ones(4, 5)},
            r"must have the rows of hidden, shape \(3, 'D'\) on cpu, got \(4, 5\)",
        ),
        ({"reference_hidden": torch.ones(3, 5, **elsewhere)}, r"must have the rows of hidden, .* got \(3, 5\) on meta"),
        ({"reference_hidden": torch.ones(3, 6)}, r"the reference's weight must have shape \(V, 6\)"),
        ({"reference_weight": torch.ones(11, 5)}, "must have one vocabulary, got 10 and 11 entries"),
        ({"reference_weight": None}, r"the reference's weight must have shape \(V, 5\) .*, got \(10, 4\)"),
        ({"reference_weight": torch.ones(10, 5, **elsewhere)}, "the reference's weight is on meta and hidden on cpu"),
        ({"reference_bias": torch.ones(9)}, r"the reference's bias must have shape \(10,\), .*, got \(9,\)"),
        ({"reference_bias": torch.ones(10, 2)}, r"bias must .*got .*\(10, 2\)"),
        ({"reference_bias": ids(10)}, r"bias must be a floating-point tensor .*, got torch\.int64"),
        ({"reference_bias": torch.ones(10, **elsewhere)}, "bias is on meta and .* on cpu"),
        ({"bias": torch.ones(10, **elsewhere)}, "bias is on meta and the rest on cpu: move them to one device"),
        ({"softcap": 0.0}, r"softcap must be positive, got 0\.0"),
        ({"workspace": -1}, "workspace must be a number of bytes, 0 or more, got -1"),
    ],
)
def test_errors(changes, sentence):
    """Each wrong argument raises an error that names it, the requirement and the value."""
    model, other = pair(3, (4, 5), 10)
    valid = {"hidden": model.hidden, "weight": model.weight, "reference_hidden": other.hidden}
    with pytest.raises(ArgumentError, match=sentence):
        kl_divergence(**valid | {"reference_weight": other.weight} | changes)
