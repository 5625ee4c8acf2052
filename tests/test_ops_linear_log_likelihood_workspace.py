"""linear_log_likelihood with a frozen head or trunk, and in any workspace."""

import pytest
import torch
import torch.utils.checkpoint
from coverings import BACKENDS, grid
from heads import (
    Allocations,
    assert_agree,
    assert_equal,
    error,
    make,
    op_module,
    plain,
)
from hypothesis import given
from hypothesis import strategies as st
from linear_cases import evaluate, truth

from pyunlearn.errors import ArgumentError
from pyunlearn.ops import _backend, linear_log_likelihood
from pyunlearn.ops._plan import MIB, Plan, default_workspace, plan
from pyunlearn.ops._products import column_sums

# ---------------------------------------------------------------- the head and the trunk


@grid(trained=[(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], workspace=[0, None], backend=BACKENDS)
def test_frozen(trained, workspace, device, backend):
    """Hidden states, head and bias each get their gradient if they require one, with any of the others frozen."""
    case = make(7, 16, 300, device=device, masked=0.3)
    wanted = truth(case, torch.ones(7))[1:]
    leaves = [t.clone().requires_grad_(i in trained) for i, t in enumerate(case[:3])]
    total = linear_log_likelihood(*leaves[:2], case.targets, bias=leaves[2], workspace=workspace).sum()
    total.backward()
    assert [i for i, leaf in enumerate(leaves) if leaf.grad is not None] == list(trained)
    assert_agree([leaves[i].grad for i in trained], [wanted[i] for i in trained], 4e-6)


def test_tied_head():
    """A weight that is embedding and head at once must get the sum of both gradients."""
    case, ids = make(7, 16, 100), torch.arange(7)
    gradients = []
    for op in (linear_log_likelihood, plain):
        weight = case.weight.double().requires_grad_()
        (g,) = torch.autograd.grad(op(weight[ids].tanh(), weight, case.targets).sum(), weight)
        gradients.append(g)
    assert_agree(gradients[:1], gradients[1:], 1e-12)


def test_sharded_head():
    """A DTensor's shard must not pass for the whole head: it is refused with the way out."""

    class DTensor(torch.Tensor):  # the class alone decides; a real one needs a process group
        pass

    case = make(3, 4, 10)
    with pytest.raises(ArgumentError, match=r"weight is a DTensor, .* pass weight\.full_tensor\(\)"):
        linear_log_likelihood(case.hidden, case.weight.as_subclass(DTensor), case.targets)


# ---------------------------------------------------------------- the workspace


@grid(
    {"dtype": torch.bfloat16, "softcap": 4.0, "backend": "compiled"},
    dtype=[torch.float32, torch.bfloat16, torch.float16, torch.float64],
    group=[64, 192],
    softcap=[None, 4.0],
    backend=BACKENDS,
)
def test_cached_or_recomputed(dtype, group, softcap, device, backend, monkeypatch):
    """Values and gradients have the same bits if logits are cached, recomputed, or some of each."""
    case = make(16, 24, 500, dtype=dtype, device=device, masked=0.4)
    results = []
    for cached in (0, 8 * group, 16 * 300, 16 * 500):
        monkeypatch.setattr(op_module, "plan", lambda rows, v, *_, cached=cached: Plan(v, 64, group, cached))
        results.append(evaluate(linear_log_likelihood, case, softcap=softcap))
    for other in results[1:]:
        assert_equal(other, results[0])
    wanted = truth(case, softcap=softcap)
    assert error(results[0][0], wanted[0]) < 4e-6
    assert_agree(results[0], wanted, {2: 4 * torch.finfo(dtype).eps}.get(dtype.itemsize, 4e-6))


@pytest.mark.full
def test_any_large_workspace():
    """Workspaces of 128 MiB or more give the same bits on the CPU, with logits cached or not."""
    case = make(640, 4, 65537, bias=False)  # 160 MiB of logits
    assert plan(640, 65537, torch.float32, "cpu", 128 * MIB, True).cached < len(
        plan(640, 65537, torch.float32, "cpu", None, True).groups()
    )
    results = [evaluate(linear_log_likelihood, case, workspace=w) for w in (128 * MIB, 144 * MIB, None, 1 << 50)]
    for other in results[1:]:
        assert_equal(other, results[0])


@grid(workspace=[0, 1, 1000, 10**5, 10**6, None, 1 << 50], dtype=[torch.float32, torch.bfloat16], backend=BACKENDS)
def test_any_workspace(workspace, dtype, device, backend):
    """Any number of bytes gives the right answer; only the last digits change."""
    case = make(30, 16, 1111, dtype=dtype, device=device, masked=0.3)
    actual = evaluate(linear_log_likelihood, case, workspace=workspace)
    wanted = [t.cpu() for t in evaluate(linear_log_likelihood, case)]
    assert error(actual[0], wanted[0]) < 2e-6
    assert_agree(actual, wanted, 2 * torch.finfo(dtype).eps if dtype is torch.bfloat16 else 2e-6)


def test_masked_rows_take_no_workspace(device, backend, monkeypatch):
    """A workspace that fits the logits of the live rows caches all of them, with any number of masked rows."""
    case = make(64, 20, 703, device=device, masked=0.7)
    live, workspace, cached, gradient = int((case.targets >= 0).sum()), 120_000, [], _backend.gradient
    plans = [plan(n, 703, torch.float32, device, workspace, True) for n in (live, 64)]
    assert [p.cached == len(p.groups()) for p in plans] == [True, False]
    monkeypatch.setattr(_backend, "gradient", lambda *a: cached.append(a[6]) or gradient(*a))
    assert_agree(evaluate(linear_log_likelihood, case, workspace=workspace), truth(case), 4e-6)
    assert cached
    assert all(cached)


sizes = st.integers(0, 1 << 14)


@given(
    rows=sizes,
    vocabulary=st.integers(1, 300_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    kind=st.sampled_from(["cpu", "cuda"]),
    workspace=st.none() | st.integers(0, 1 << 34),
)
def test_plan(rows, vocabulary, dtype, kind, workspace):
    """Groups and blocks cover the vocabulary once, in order, and the cached logits fit the workspace."""
    p = plan(rows, vocabulary, dtype, kind, workspace, True)
    groups = p.groups()
    blocks = [block for first, end in groups for block in p.blocks_of(first, end)]
    assert [i for i, _, _ in blocks] == list(range(p.blocks))
    for spans in (groups, [(first, end) for _, first, end in blocks]):
        assert [end for _, end in spans] == [*(first for first, _ in spans[1:]), vocabulary]
        assert spans[0][0] == 0
    cached = sum(end - first for first, end in groups[: p.cached]) * rows * dtype.itemsize
    assert cached <= (workspace if workspace is not None else default_workspace(kind))
    if workspace == 1 << 34:
        assert p.cached == len(groups)


@grid(dtype=[torch.float32, torch.bfloat16], workspace=[MIB, 4 * MIB], trained=[True, False])
def test_memory(dtype, workspace, trained, device):
    """Beyond the gradients, a call must allocate its workspace and a few numbers a row, never (N, V) of anything.

    Without gradients it takes one block of logits, a quarter of the workspace.
    """
    rows, width, vocabulary = 1024, 8, 8192  # 32 MiB of float32 logits
    case = make(rows, width, vocabulary, dtype=dtype, device=device)
    with Allocations() as used:
        hidden, weight, bias = (t.requires_grad_(trained) for t in case[:3])
        values = linear_log_likelihood(hidden, weight, case.targets, bias=bias, workspace=workspace)
        if trained:
            values.sum().backward()
    answers = sum(t.numel() * (t.element_size() + 4) for t in case[:3]) if trained else 0  # with their float32 sums
    per_row = rows * 4 * (16 + (vocabulary // 64 if trained else 0) + width) + MIB // 4
    temporaries = workspace if _backend.kernels_for(case.hidden) == "reference" else 0  # plain PyTorch copies a block
    allowed = workspace if trained else workspace // 4
    assert workspace // 8 < used.peak <= allowed + temporaries + answers + per_row
    assert used.largest <= workspace


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [0, 1, 31, 33, 1024])
def test_gradient_of_the_bias(rows, dtype):
    """Columns of the gradient at the logits are summed in float32, and no more than 64 rows of it are copied."""
    matrix = torch.randn(rows, 520, generator=torch.Generator().manual_seed(0)).to(dtype)[:, :515]
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=False) as profile:
        sums = column_sums(matrix, torch.float32)
    assert sums.dtype is torch.float32
    assert_agree([sums], [matrix.double().sum(0)], 1e-6)
    assert max(event.self_cpu_memory_usage for event in profile.function_events) < 64 * 515 * 4
