"""Rows without a part in a gradient leave its products: coefficient 0, unselected tokens, certain targets."""

import sys

import pytest
import torch
from coverings import BACKENDS, grid
from heads import (
    TOLERANCE,
    Allocations,
    assert_agree,
    bytes_of,
    cast,
    make,
    op_module,
    plain,
    products,
    statistics_module,
    watch_chunks,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pyunlearn.errors import ArgumentError
from pyunlearn.ops import (
    _backend,
    _one_pass,
    _passes,
    _plan,
    example_objective,
    kl_divergence,
    linear_log_likelihood,
    token_statistics,
    weighted_log_likelihood,
)
from pyunlearn.ops.example_objective import top_counts, top_tokens

pytestmark = pytest.mark.usefixtures("poisoned")
LENGTHS = (2, 0, 9, 4, 1, 7, 5, 0)


@pytest.fixture
def chunks(monkeypatch):
    """Split small cases into chunks of rows, and make compaction of cached rows cost nothing."""
    monkeypatch.setattr(_passes, "balance", lambda *_: 0)
    return watch_chunks(monkeypatch, sys.modules["pyunlearn.ops.example_objective"])


def index_of(lengths=LENGTHS, *, shuffled=True):
    """Return the example index of each row."""
    index = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return index[torch.randperm(len(index), generator=torch.Generator().manual_seed(3))] if shuffled else index


def curved(sums, counts):
    """Compute a loss that is nonlinear in sums and counts."""
    return (sums / counts.clamp(min=1) + 1.5).square() + 0.1 * counts


def selected(actual, live, index, examples, share):
    """Return a mask of the top fraction of each example's live rows, chosen one by one."""
    taken = torch.zeros_like(live)
    for b in range(examples):
        rows = [n for n in range(len(actual)) if live[n] and index[n] == b]
        rows.sort(key=lambda n: -float(actual[n]))
        taken[rows[: max(1, int(share * len(rows) + 1e-9))]] = True
    return taken & live


def by_hand(case, index, share):
    """Return [loss, losses, sums, counts, gradients], from autograd in float64 and a loop over examples."""
    case = cast(case, dtype=torch.float64, device="cpu")
    leaves = [t.detach().clone().requires_grad_() for t in case[:3]]
    actual, live = plain(*leaves[:2], case.targets, bias=leaves[2]), case.targets != -100
    taken = selected(actual.detach(), live, index, len(LENGTHS), share)
    sums = torch.stack([actual[taken & (index == b)].sum() for b in range(len(LENGTHS))])
    counts = torch.bincount(index[taken], minlength=len(LENGTHS))
    losses = curved(sums, counts)
    gradients = torch.autograd.grad(losses.sum(), leaves)
    return [*(x.detach() for x in (losses.sum(), losses, sums, counts)), *gradients]


def evaluate(case, index, **options):
    """Return the op's [loss, losses, sums, counts, gradients]."""
    leaves = [t.detach().clone().requires_grad_() for t in case[:3]]
    zeros = torch.zeros(len(LENGTHS), device=index.device)
    actual = example_objective(
        *leaves[:2], case.targets, index, lambda sums, counts, _: curved(sums, counts), zeros, bias=leaves[2], **options
    )
    return [*(x.detach() for x in actual), *torch.autograd.grad(actual.loss, leaves)]


@grid(
    {"share": 0.1, "masked": 0.4, "capacity": 4, "dtype": torch.bfloat16, "backend": "compiled"},
    share=[0.1, 0.5, 0.8, 1.0],
    masked=[0.0, 0.4],
    capacity=[None, 10, 4, 0],
    dtype=[torch.float32, torch.float64, torch.bfloat16, torch.float16],
    backend=BACKENDS,
)
def test_top_fraction(share, masked, capacity, dtype, device, backend, chunks):
    """Results must be those of each example's top fraction of tokens alone, chosen one by one in float64."""
    case, index = make(sum(LENGTHS), 20, 203, dtype=dtype, device=device, masked=masked), index_of()
    workspace = None if capacity is None else bytes_of(capacity, case) if capacity else 0
    actual, wanted = (
        evaluate(case, index.to(device), top_fraction=share, workspace=workspace),
        by_hand(case, index, share),
    )
    tolerance = TOLERANCE.get(dtype, 2 * torch.finfo(dtype).eps)
    assert_agree(actual[:4], wanted[:4], min(tolerance, 8e-6))
    assert_agree(actual[4:], wanted[4:], 2 * tolerance)


@given(
    groups=st.lists(st.lists(st.sampled_from([-3.0, -2.0, -1.0, -0.5]), max_size=7), max_size=6),
    share=st.floats(0.01, 1.0),
)
def test_top_fraction_of_rows(groups, share):
    """With any ties, each example gives its share, rounded down, one at least, and no row left out is more likely."""
    values, lengths = (
        torch.tensor([x for g in groups for x in g]),
        torch.tensor([len(g) for g in groups], dtype=torch.int64),
    )
    counted = top_counts(lengths, share)
    taken = top_tokens(values, lengths, counted)
    assert counted.tolist() == [0 if not g else max(1, int(share * len(g) + 1e-9)) for g in groups]
    for part, mine, count in zip(values.split(lengths.tolist()), taken.split(lengths.tolist()), counted, strict=True):
        assert int(mine.sum()) == count
        assert not len(part[~mine]) or float(part[~mine].max()) <= float(part[mine].min())


@given(rows=st.lists(st.booleans(), min_size=1, max_size=300), width=st.integers(1, 9), at_a_time=st.integers(1, 100))
def test_squeeze(rows, width, at_a_time):
    """In-place compaction, any number of rows at a time, must leave exactly the selected rows, in order."""
    matrix = torch.arange(len(rows) * width, dtype=torch.float32).view(len(rows), width)
    indices = torch.tensor(rows).nonzero().squeeze(1)
    wanted = matrix[indices]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_passes, "MIB", at_a_time * width)  # a quarter of the bytes of at_a_time rows
        assert torch.equal(_passes.squeeze(matrix, indices), wanted)


@pytest.mark.parametrize("shape", [(4096, 700), (6, 3 << 20)])
def test_squeeze_takes_a_few_mib(shape):
    """Compaction moves about 4 MiB of rows at a time on the CPU, one row at least."""
    matrix = torch.zeros(shape)
    with Allocations() as used:
        _passes.squeeze(matrix, torch.arange(1, shape[0]))
    row = shape[1] * 4
    assert used.largest == max(1, (4 << 20) // row) * row


def pulled(case, coefficients, op, **options):
    """Return [value, gradients] of the weighted sum."""
    leaves = [t.detach().clone().requires_grad_() for t in case[:3]]
    value = op(*leaves[:2], case.targets, coefficients, bias=leaves[2], **options)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def in_two_passes(hidden, weight, targets, coefficients, **options):
    """Compute the weighted sum through linear_log_likelihood, which gets the coefficients in the backward pass."""
    return (coefficients * linear_log_likelihood(hidden, weight, targets, **options)).sum()


@grid(
    {"workspace": 40_000, "idle": 1.0, "dtype": torch.bfloat16, "backend": "compiled"},
    op=[weighted_log_likelihood, in_two_passes],
    workspace=[None, 40_000, 0],
    idle=[0.0, 0.5, 0.9, 1.0],
    dtype=[torch.float32, torch.bfloat16, torch.float64],
    backend=BACKENDS,
)
def test_coefficient_zero(op, workspace, idle, dtype, device, backend, chunks):
    """Rows with coefficient 0 change no gradient by leaving the products, with logits cached or recomputed."""
    case = make(61, 20, 703, dtype=dtype, device=device, masked=0.2)
    coefficients = torch.linspace(-1, 2, 61, device=device)
    coefficients[torch.rand(61, generator=torch.Generator().manual_seed(1)).to(device) < idle] = 0
    real = cast(case, dtype=torch.float64, device="cpu")
    leaves = [t.detach().clone().requires_grad_() for t in real[:3]]
    value = (coefficients.cpu().double() * plain(*leaves[:2], real.targets, bias=leaves[2])).sum()
    wanted = [value.detach(), *torch.autograd.grad(value, leaves)]
    actual = pulled(case, coefficients, op, workspace=workspace)
    assert_agree(actual, wanted, TOLERANCE.get(dtype, 2 * torch.finfo(dtype).eps))


@pytest.mark.parametrize("op", [weighted_log_likelihood, in_two_passes])
@pytest.mark.parametrize("workspace", [None, 0])
def test_coefficient_zero_hides_nan(op, workspace, device, backend):
    """A row with coefficient 0 that holds NaN changes no gradient, also where dropping it would not pay."""
    case, coefficients = make(61, 20, 703, device=device), torch.linspace(1, 2, 61, device=device)
    coefficients[7] = 0
    wanted = pulled(case, coefficients, op, workspace=workspace)
    case.hidden[7] = torch.nan
    actual = pulled(case, coefficients, op, workspace=workspace)
    assert_agree(actual[1:], wanted[1:], 1e-6)


@pytest.mark.parametrize("workspace", [None, 0])
def test_products_saved(workspace, backend, chunks):
    """Half of the rows idle halves the backward products: 1 + 2 / 2 with cached logits, 1 + 3 / 2 recomputed."""
    if backend == "reference":
        pytest.skip("counts products, which are the same")
    case = make(64, 20, 703)
    coefficients = torch.ones(64)
    coefficients[::2] = 0
    leaves = [case.hidden.requires_grad_(), case.weight.requires_grad_()]

    def run():
        weighted_log_likelihood(*leaves, case.targets, coefficients, workspace=workspace).backward()

    assert products(case, run) == pytest.approx(2.0 if workspace is None else 2.5, abs=0.01)


def test_left_where_moving_costs_more(backend):
    """One idle row among many stays, since compaction of the cached others would cost more."""
    case = make(64, 20, 703)
    coefficients = torch.ones(64)
    coefficients[3] = 0
    leaves = [case.hidden.requires_grad_(), case.weight.requires_grad_()]
    run = lambda: weighted_log_likelihood(*leaves, case.targets, coefficients).backward()  # noqa: E731
    assert products(case, run) == pytest.approx(3.0)


@pytest.mark.skipif(_backend.on_cpu().kernels == "reference", reason="the definition makes copies of a block")
def test_memory(chunks):
    """Leaving rows out must not take more than the workspace."""
    case = make(512, 64, 4096, bias=False)
    coefficients = torch.ones(512)
    coefficients[::2] = 0
    leaves = [case.hidden.requires_grad_(), case.weight.requires_grad_()]
    logits = 512 * 4096 * 4
    with Allocations() as allocated:
        weighted_log_likelihood(*leaves, case.targets, coefficients, workspace=logits).backward()
    outside = 2 * (case.hidden.nbytes + case.weight.nbytes) + (1 << 20)
    assert allocated.peak <= logits + outside, allocated.peak


def test_temperature():
    """Log-likelihoods at temperature T are those of logit_scale / T and softcap / T."""
    case = make(9, 20, 203)
    z = 3.0 * torch.tanh(0.5 * (case.hidden @ case.weight.T + case.bias) / 3.0)
    wanted = torch.log_softmax(z / 2.0, -1).gather(1, case.targets[:, None]).squeeze(1)
    actual = linear_log_likelihood(*case[:2], case.targets, bias=case.bias, logit_scale=0.25, softcap=1.5)
    assert_agree([actual], [wanted], 4e-6)


@pytest.mark.parametrize(
    "options", [{"top_fraction": 0.0}, {"top_fraction": 1.5}, {"negligible": -0.1}, {"negligible": 1.0}]
)
def test_refused(options):
    """A share or probability out of range is an error that names the argument."""
    case = make(sum(LENGTHS), 20, 203)
    with pytest.raises(ArgumentError, match=next(iter(options))):
        evaluate(case, index_of(), **options)


class Synchronizations(TorchDispatchMode):
    """Count operations that synchronize with a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inside = INSIDE.get(function)
        if inside is not None:
            with self:
                return inside(*args, **(kwargs or {}))
        self.count += function in (torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default)
        return function(*args, **(kwargs or {}))


INSIDE = {
    torch.ops.pyunlearn.linear_log_likelihood.default: op_module._forward,
    torch.ops.pyunlearn.linear_log_likelihood_backward.default: op_module._backward,
    torch.ops.pyunlearn.token_statistics.default: statistics_module._forward,
    torch.ops.pyunlearn.kl_divergence.default: sys.modules["pyunlearn.ops.kl_divergence"]._forward,
    torch.ops.pyunlearn.kl_divergence_backward.default: sys.modules["pyunlearn.ops.kl_divergence"]._backward,
}


@pytest.mark.parametrize("op", [linear_log_likelihood, token_statistics, weighted_log_likelihood, kl_divergence])
def test_nothing_ignored(op, device, backend, monkeypatch):
    """ignore_index=None gives the same result without counting live rows, which on a GPU would synchronize."""
    case = make(13, 20, 203, device=device)
    monkeypatch.setattr(_passes, "rows_with_gradient", lambda *_, **__: (None, False))  # never called on a GPU
    monkeypatch.setattr(_one_pass, "_known_to_be_one", lambda *_: False)  # nor is this one

    def run(ignore_index):
        leaves = [t.detach().clone().requires_grad_() for t in case[:2]]
        more = {
            weighted_log_likelihood: (case.targets, torch.ones(13, device=device)),
            kl_divergence: (case.hidden * 0.5, case.weight, case.targets),
        }.get(op, (case.targets,))
        actual = op(*leaves, *more, ignore_index=ignore_index)
        return [*actual] if op is token_statistics else [actual.detach(), *torch.autograd.grad(actual.sum(), leaves)]

    assert all(torch.equal(a, b) for a, b in zip(run(None), run(-100), strict=True))
    with monkeypatch.context() as patch:  # the CPU checks targets, a GPU does not
        for module in {sys.modules[f"pyunlearn.ops.{op.__name__}"], op_module, statistics_module, _passes}:
            patch.setattr(module, "check_targets", lambda *_: True)
        for ignore_index, least in ((None, 0), (-100, 1)):
            with Synchronizations() as waits:
                run(ignore_index)
            assert min(waits.count, 1) == least
    case.targets[3] = -100
    if device == "cpu":
        with pytest.raises(ArgumentError, match=r"targets must lie in \[0, 203\), got -100"):
            run(None)


class CudaTensor:
    """The attributes of a CUDA tensor that `allowance` reads."""

    is_cuda, device, dtype = True, torch.device("cuda", 0), torch.bfloat16

    def element_size(self):
        return 2


@pytest.mark.parametrize(("free", "unused", "wanted"), [(64, 0, 2 << 30), (1, 1, 1 << 30), (0, 0, 0)])
def test_default_workspace_on_gpu(free, unused, wanted, monkeypatch):
    """The default workspace on a GPU is half of the free memory, cached blocks included, and 2 GiB at most."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free << 30, 80 << 30))
    capacity = {"reserved_bytes": (unused + 3) << 30, "allocated_bytes": 3 << 30}
    stats = {name: {"all": {"current": n}} for name, n in capacity.items()}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: stats)
    monkeypatch.setattr(_plan, "host_may_wait", lambda x: True)
    assert _plan.allowance(None, CudaTensor(), 8192, 128256) == wanted
    assert _plan.allowance(7, CudaTensor(), 8192, 128256) == 7
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: pytest.fail("queried without need"))
    assert _plan.allowance(None, CudaTensor(), 100, 128256) == 2 << 30
