"""log_likelihood on logits in any layout; claims shared with linear_log_likelihood are in that op's tests."""

import math

import pytest
import torch
from coverings import BACKENDS, grid
from heads import Allocations, assert_agree, on_gpu, plain_from_logits
from hypothesis import given
from hypothesis import strategies as st

from pyunlearn.errors import ArgumentError
from pyunlearn.ops import log_likelihood

NARROW = [torch.bfloat16, torch.float16]


def scored(logits, targets, **options):
    """Return [values, gradient of their weighted sum for the logits]."""
    logits = logits.detach().requires_grad_()  # preserves the strides, which clone() would not
    values = log_likelihood(logits, targets, **options)
    coefficients = torch.linspace(-1, 2, values.numel(), device=values.device).reshape(values.shape).to(values)
    return [values.detach(), *torch.autograd.grad(values, logits, coefficients)]


def truth(logits, targets, **options):
    """Return what `scored` should return, computed by PyTorch in float64."""
    logits, targets = logits.detach().double().cpu().requires_grad_(), targets.cpu()
    values = plain_from_logits(logits, targets, **options)
    coefficients = torch.linspace(-1, 2, len(values)).double()
    return [values.detach(), *torch.autograd.grad(values, logits, coefficients)]


def some(rows, vocabulary, *, dtype=torch.float32, device="cpu", seed=0):
    """Return random logits and targets."""
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, vocabulary, generator=g)
    return logits.to(device, dtype), torch.randint(vocabulary, (rows,), generator=g).to(device)


# ---------------------------------------------------------------- the answer


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_narrow_logits_are_read_and_written_exactly(dtype, softcap, device, backend):
    """16-bit logits, subnormal and infinite ones too, are read exactly; only the gradient is rounded, once."""
    logits, targets = some(9, 515, dtype=dtype, device=device)
    smallest = torch.finfo(dtype).smallest_normal
    logits[0, :8] = torch.tensor([-torch.inf, -1e4, smallest, smallest / 4, -smallest / 8, 0, -0.0, 1e-3])
    logits[1] = 3e-5  # subnormal in float16
    values, gradient = scored(logits, targets, softcap=softcap)
    right, right_gradient = truth(logits, targets, softcap=softcap)
    assert_agree([values], [right], 2e-6)
    rounding = torch.finfo(dtype).eps / 2 + 1e-4
    least = 2.0**-24 if dtype is torch.float16 else 1e-30  # float16's smallest step
    assert ((gradient.double().cpu() - right_gradient).abs() <= rounding * right_gradient.abs() + least).all()


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
@pytest.mark.parametrize("shape", [(252, 123), (9, 50257)])
def test_no_worse_than_pytorch(dtype, shape, device, backend):
    """Against float64, no further off than PyTorch's cross-entropy plus 2e-6 for the order of sums."""
    logits, targets = some(*shape, dtype=dtype, device=device)
    wanted = truth(logits, targets)
    leaf = logits.clone().requires_grad_()
    values = -torch.nn.functional.cross_entropy(leaf.float(), targets, reduction="none")
    theirs = [values.detach(), *torch.autograd.grad(values, leaf, torch.linspace(-1, 2, shape[0], device=device))]
    for actual, other, right in zip(scored(logits, targets), theirs, wanted, strict=True):
        far = [(x.double().cpu() - right).abs().max().item() for x in (actual, other)]
        assert far[0] <= far[1] + 2e-6, far


extreme = st.floats(-(2.0**99), 2.0**99, width=32) | st.floats(-90, 90, width=32)


@given(row=st.lists(extreme, min_size=1, max_size=40), at=st.integers(0, 39))
def test_any_logits(row, at, device, backend):
    """Value and gradient of any finite logits, tiny next to huge, agree with float64 to float32 rounding."""
    logits, targets = torch.tensor([row], device=device), torch.tensor([at % len(row)], device=device)
    assert_agree(scored(logits, targets), truth(logits, targets), 2e-6)


def test_no_distribution(device, backend):
    """Rows that are no distribution (all -inf, +inf, NaN) give NaN, as in PyTorch, and leave the others alone."""
    logits, targets = some(5, 130, device=device)
    logits[1], logits[2, 7], logits[3, 100] = -torch.inf, torch.inf, torch.nan
    assert log_likelihood(logits, targets).isnan().tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_that_learns(dtype, device, backend):
    """A bias that requires a gradient gets it."""
    logits, targets = some(6, 70, dtype=dtype, device=device)
    bias = torch.linspace(-1, 1, 70, device=device).requires_grad_()
    log_likelihood(logits, targets, bias=bias, softcap=4.0).sum().backward()
    exact = bias.detach().double().cpu().requires_grad_()
    plain_from_logits(logits.double().cpu(), targets.cpu(), bias=exact, softcap=4.0).sum().backward()
    assert_agree([bias.grad], [exact.grad], 4e-6)


# ---------------------------------------------------------------- the memory


LAYOUTS = {
    "columns of a wider tensor": lambda x: torch.cat([x, torch.full_like(x, torch.nan)], 1)[:, : x.shape[1]],
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "every second column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "transposed": lambda x: x.T.contiguous().T,
    "one row for all": lambda x: x[:1].expand_as(x),
    "one column for all": lambda x: x[:, :1].expand_as(x),
    "overlapping rows": lambda x: x.flatten().as_strided(x.shape, (1, 1)),
}


@grid(layout=list(LAYOUTS), vocabulary=[1, 131], rows=[1, 6], backend=BACKENDS)
def test_layouts(layout, vocabulary, rows, device, backend):
    """Logits in any memory layout must give the result of a contiguous copy, with a gradient of their shape."""
    logits, targets = some(rows, vocabulary, device=device)
    shown = LAYOUTS[layout](logits)
    assert_agree(scored(shown, targets), truth(shown, targets), 4e-6)


def test_batched_gradients_and_lazy_negation():
    """Where a tensor's memory is not what it says, torch's dispatcher makes it so: batched gradients, negated views."""
    logits, targets = torch.randn(3, 7, requires_grad=True), torch.tensor([1, 0, 6])
    (rows,) = torch.autograd.grad(
        log_likelihood(logits, targets), logits, torch.eye(3), is_grads_batched=True, retain_graph=True
    )
    assert_agree([rows.sum(0)], list(torch.autograd.grad(log_likelihood(logits, targets).sum(), logits)), 1e-6)
    negative = torch._neg_view(logits.detach())
    assert_agree([log_likelihood(negative, targets)], [log_likelihood(negative.resolve_neg(), targets)], 1e-6)


def test_a_batch_of_sequences(device, backend):
    """Logits (B, T, V) of a model, shifted by a slice, are scored where they lie."""
    logits, _ = some(12, 90, device=device)
    ids = torch.randint(90, (3, 4), device=device)
    actual = log_likelihood(logits.reshape(3, 4, 90)[:, :-1], ids[:, 1:])
    right = truth(logits.reshape(3, 4, 90)[:, :-1].reshape(9, 90), ids[:, 1:].reshape(9))[0]
    assert actual.shape == (3, 3)
    assert_agree([actual.flatten()], [right], 4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory(dtype, device, backend):
    """Forward allocates a few numbers a row and backward the gradient alone, never a float32 copy of the logits."""
    if backend == "reference":
        pytest.skip("plain PyTorch makes copies")
    logits, targets = some(256, 4096, dtype=dtype, device=device)
    with Allocations() as used:
        values = log_likelihood(logits.requires_grad_(), targets)
        assert used.peak <= 256 * 64
        values.sum().backward()
    assert logits.nbytes <= used.peak <= logits.nbytes + 256 * 128


@on_gpu
def test_past_32_bits(device, backend):
    """Beyond 2^31 logits indices must not wrap, forward or backward."""
    rows, vocabulary = 16800, 128256
    logits = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device=device)
    last = 3 * torch.randn(vocabulary, device=device).bfloat16()
    logits[-1] = last
    targets = torch.full((rows,), vocabulary - 1, device=device)
    values = log_likelihood(logits.requires_grad_(), targets)
    (gradient,) = torch.autograd.grad(values[-1], logits)
    exact = last.double().cpu().log_softmax(0)
    assert values[0].item() == pytest.approx(-math.log(vocabulary), abs=1e-5)
    assert values[-1].item() == pytest.approx(exact[-1].item(), abs=1e-5)
    assert gradient[-1, -1].item() == pytest.approx(-math.expm1(exact[-1].item()), rel=1e-2)
    assert not gradient[:-1].any()


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("logits", "options", "sentence"),
    [
        (torch.ones(2, 3).long(), {}, r"logits must be a float32, .*, got torch\.int64 of shape \(2, 3\)"),
        (torch.ones(2, 0), {}, r"logits must have at least one column, got shape \(2, 0\)"),
        (torch.ones(3, 3), {}, r"one token id for each row of logits, shape \(3,\), got \(2,\)"),
        (torch.ones(2, 3), {"bias": torch.ones(2)}, r"bias must have shape \(3,\), .*, got \(2,\)"),
        (torch.ones(2, 3), {"bias": torch.ones(3, device="meta")}, "bias is on meta and the rest on cpu"),
        (torch.ones(2, 3), {"softcap": -1.0}, r"softcap must be positive, got -1\.0"),
    ],
)
def test_errors(logits, options, sentence):
    """Each wrong argument raises an error that names it, the requirement and the value."""
    with pytest.raises(ArgumentError, match=sentence):
        log_likelihood(logits, torch.zeros(2, dtype=torch.int64), **options)
