"""weighted_log_likelihood, value and gradients out of one pass, against PyTorch in float64."""

import math
import sys

import pytest
import torch
import torch.utils.checkpoint
from coverings import BACKENDS, grid
from heads import (
    TOLERANCE,
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
    watch_chunks,
)
from hypothesis import given
from hypothesis import strategies as st
from weighted_cases import (
    CAPACITIES,
    any_capacity,
    coefficients_of,
    definition,
    evaluate,
    expected_chunks,
    truth,
    workspace_for,
)

from pyunlearn.errors import ArgumentError
from pyunlearn.ops import linear_log_likelihood, reference, weighted_log_likelihood

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def chunks(monkeypatch):
    """Split small cases into chunks too; return the list that records the rows of each."""
    return watch_chunks(monkeypatch, sys.modules["pyunlearn.ops.weighted_log_likelihood"])


# ---------------------------------------------------------------- values and gradients


@grid(
    {"dtype": torch.float32, "masked": 1.0, "softcap": 2.5, "backend": "compiled"},
    dtype=[torch.float32, torch.float64],
    masked=[0.0, 0.6, 1.0],
    bias=[False, True],
    logit_scale=[1.0, 0.0625],
    softcap=[None, 2.5],
    backend=BACKENDS,
)
def test_every_option(dtype, masked, bias, logit_scale, softcap, device, backend, chunks):
    """Value and gradients must agree with float64 for each mix of options, in any number of chunks."""
    case = make(13, 20, 203, dtype=dtype, device=device, bias=bias, masked=masked)
    options = {"logit_scale": logit_scale, "softcap": softcap}
    wanted, live = truth(case, **options), int((case.targets != -100).sum())
    for capacity in CAPACITIES:
        actual = evaluate(weighted_log_likelihood, case, workspace=workspace_for(capacity, case), **options)
        assert [f.dtype for f in actual] == [dtype] * len(wanted)
        assert_agree(actual, wanted, TOLERANCE[dtype])
    assert [(max(sizes), len(sizes)) for sizes in chunks] == [
        expected_chunks(capacity, live) for capacity in CAPACITIES
    ]


@any_capacity
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(capacity, dtype, device, backend, chunks):
    """The value of 16-bit inputs must be right to float32, gradients to their own rounding, in any number of chunks."""
    case = make(60, 4, 3001, dtype=dtype, device=device, masked=0.3)
    actual, wanted = evaluate(weighted_log_likelihood, case, workspace=workspace_for(capacity, case)), truth(case)
    assert actual[0].dtype is torch.float32
    assert [g.dtype for g in actual[1:]] == [dtype] * 3
    assert error(actual[0], wanted[0]) < 4e-6
    assert_agree(actual, wanted, 2 * torch.finfo(dtype).eps)
    # float16 gradients wait for the loss scale
    assert [len(sizes) > 1 for sizes in chunks] == ([bool(capacity)] if dtype is torch.bfloat16 else [])


@grid(
    {"dtype": torch.bfloat16, "shape": (40, 64, 3001), "softcap": 5.0, "capacity": 7, "backend": "compiled"},
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    shape=[(252, 507, 123), (40, 64, 3001)],
    softcap=[None, 5.0],
    capacity=[0, 7, None],
    backend=BACKENDS,
)
def test_no_worse_than_pytorch(dtype, shape, softcap, capacity, device, backend, chunks):
    """Against float64, value and gradients must be no further off than PyTorch's in the same dtype.

    Added to the tolerance: 2e-6 of the summands for the value, which is float32 in every dtype; for gradients, half the
    dtype's epsilon, to which they are rounded, and 4e-6 for the order of float32 sums, which differs for few rows.
    """
    case = make(*shape, dtype=dtype, device=device, masked=0.3)
    coefficients = coefficients_of(case)
    wanted = truth(case, softcap=softcap)
    ours = evaluate(weighted_log_likelihood, case, softcap=softcap, workspace=workspace_for(capacity, case))
    theirs = evaluate(definition, case, softcap=softcap)
    summands = (coefficients * plain(case.hidden, case.weight, case.targets, bias=case.bias)).abs().sum().item()
    for at, (actual, other, right) in enumerate(zip(ours, theirs, wanted, strict=True)):
        allowed = 4e-6 + torch.finfo(dtype).eps / 2 * right.abs().max().item() if at else 2e-6 * summands
        far = [(x.double().cpu() - right).abs().max().item() for x in (actual, other)]
        assert far[0] <= far[1] + allowed, (at, far)


def test_sums_over_chunks_are_not_rounded(device, backend, chunks):
    """bfloat16 gradients summed over 600 chunks must be as good as those of one, so sums are not rounded in between."""
    case = make(600, 4, 128, dtype=torch.bfloat16, device=device)
    case.hidden.abs_()
    coefficients = torch.ones(600, device=device)
    wanted = truth(case, coefficients)
    one, many = (evaluate(weighted_log_likelihood, case, coefficients, workspace=w) for w in (None, bytes_of(1, case)))
    assert [len(sizes) for sizes in chunks] == [1, 600]
    for at in (2, 3):
        assert error(many[at], wanted[at]) <= error(one[at], wanted[at]) + torch.finfo(torch.bfloat16).eps / 2


@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(65, 300), st.integers(0, 2**31)),
    workspace=st.integers(0, 20_000),
    softcap=st.sampled_from([None, 4.0]),
)
def test_workspace_changes_nothing(shape, workspace, softcap, device, backend, chunks):
    """Value and gradients are the same for any number of bytes allowed."""
    rows, width, vocabulary, seed = shape
    case = make(rows, width, vocabulary, device=device, masked=0.2, seed=seed)
    actual = evaluate(weighted_log_likelihood, case, softcap=softcap, workspace=workspace)
    wanted = [t.cpu() for t in evaluate(weighted_log_likelihood, case, softcap=softcap)]
    assert_agree(actual, wanted, 4e-6)


@any_capacity
def test_gradcheck(capacity, device, backend, chunks):
    """The gradients must agree with finite differences in float64, with bias, scale and softcap."""
    case = make(6, 3, 140, dtype=torch.float64, device=device, masked=0.2)
    options = {"logit_scale": 0.5, "softcap": 2.0, "workspace": workspace_for(capacity, case)}

    def function(hidden, weight, bias):
        return weighted_log_likelihood(hidden, weight, case.targets, coefficients_of(case), bias=bias, **options)

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in case[:3]], fast_mode=True)


def test_reference_is_the_definition():
    """pyunlearn.ops.reference must agree with PyTorch's cross-entropy."""
    case = make(9, 16, 70, dtype=torch.float64, masked=0.3)
    options = {"logit_scale": 0.5, "softcap": 3.0}
    assert_agree(evaluate(reference.weighted_log_likelihood, case, **options), truth(case, **options), 1e-12)


# ---------------------------------------------------------------- the edges


@grid(capacity=CAPACITIES, dtype=[torch.float32, torch.bfloat16, torch.float16], rows=[0, 9], backend=BACKENDS)
def test_nothing_scored(capacity, dtype, rows, device, backend, chunks):
    """No row, or none that counts: 0, connected to the graph, with gradients of zero for everything."""
    case = make(rows, 8, 100, dtype=dtype, device=device, masked=1.0)
    value, *gradients = evaluate(weighted_log_likelihood, case, workspace=workspace_for(capacity, case))
    assert value.shape == ()
    assert value == 0
    assert [g.shape for g in gradients] == [t.shape for t in case[:3]]
    assert not any(g.any() for g in gradients)


@any_capacity
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_contents_of_ignored_rows(capacity, dtype, device, backend, chunks):
    """NaN and infinity in hidden states and coefficients of ignored rows must not matter; the gradient there is 0."""
    case = make(12, 8, 200, dtype=dtype, device=device)
    case.targets[[0, 2, 5, 11]] = -100
    wanted = truth(case)
    coefficients = coefficients_of(case)
    case.hidden[[0, 2]], case.hidden[[5, 11]] = torch.nan, torch.inf
    coefficients[[0, 5]], coefficients[[2, 11]] = torch.nan, torch.inf
    actual = evaluate(weighted_log_likelihood, case, coefficients, workspace=workspace_for(capacity, case))
    assert_agree(actual, wanted, TOLERANCE.get(dtype, 2 * torch.finfo(dtype).eps))


@pytest.mark.parametrize("shape", [(), (12,), (3, 4), (2, 3, 2), (2, 0)])
@pytest.mark.parametrize("capacity", [0, 2])
def test_leading_dimensions(shape, capacity, device, backend, chunks):
    """Leading dimensions of hidden states, targets (int32 too) and coefficients must be flattened row by row."""
    case = make(math.prod(shape), 8, 90, device=device, masked=0.2)
    shaped = Case(case.hidden.reshape(*shape, 8), *case[1:3], case.targets.reshape(shape).int())
    actual = evaluate(weighted_log_likelihood, shaped, workspace=workspace_for(capacity, case))
    assert actual[1].shape == (*shape, 8)
    actual[1] = actual[1].reshape(-1, 8)
    assert_agree(actual, truth(case), 4e-6)


def test_layouts(device, backend, chunks):
    """Transposed, sliced and expanded inputs must give the result of contiguous copies."""
    case = make(6, 8, 90, device=device)
    sliced = torch.full((6, 16), torch.nan, device=device)
    sliced[:, ::2] = case.hidden
    targets = case.targets.repeat_interleave(2)[::2]
    shown = (sliced[:, ::2], case.weight.T.contiguous().T, case.bias.repeat_interleave(3)[::3])
    leaves = [t.detach().requires_grad_() for t in shown]  # preserves the strides, which clone() would not
    assert not any(t.is_contiguous() for t in (*leaves, targets))
    coefficients = torch.ones((), device=device).expand(6)
    for workspace in (0, bytes_of(2, case)):
        value = weighted_log_likelihood(*leaves[:2], targets, coefficients, bias=leaves[2], workspace=workspace)
        actual = [value.detach(), *torch.autograd.grad(value, leaves)]
        assert_agree(actual, truth(case, torch.ones(6)), 4e-6)
    assert [len(sizes) for sizes in chunks] == [1, 3]


def test_ignore_index(device, backend):
    """Any number can mean "ignored", a token's own id too; then -100 is out of range."""
    case = make(6, 8, 50, device=device)
    case.targets[1] = 0
    actual = evaluate(weighted_log_likelihood, case, ignore_index=0)
    assert_agree(actual, truth(case, ignore_index=0), 4e-6)
    if device == "cpu":
        with pytest.raises(ArgumentError, match=r"or be 0 \(ignored\), got -100"):
            weighted_log_likelihood(*case[:2], case.targets.fill_(-100), coefficients_of(case), ignore_index=0)


@any_capacity
def test_two_runs(capacity, device, backend, chunks):
    """Two calls with the same inputs must give the same bits."""
    case = make(65, 33, 1000, device=device, masked=0.3)
    first, second = (evaluate(weighted_log_likelihood, case, workspace=workspace_for(capacity, case)) for _ in range(2))
    assert_equal(second, first)


def test_mixed_dtypes(device, backend, chunks):
    """Hidden states, head, bias and coefficients are computed in their widest dtype; each gradient has its own."""
    case = make(9, 16, 200, device=device)
    mixed = Case(case.hidden.bfloat16(), case.weight, case.bias.half(), case.targets)
    coefficients = coefficients_of(case).bfloat16()
    for workspace in (None, bytes_of(2, case)):
        actual = evaluate(weighted_log_likelihood, mixed, coefficients, workspace=workspace)
        assert [g.dtype for g in actual] == [torch.float32, torch.bfloat16, torch.float32, torch.float16]
        assert_agree(actual, truth(mixed, coefficients), 5e-3)
        assert error(actual[0], truth(mixed, coefficients)[0]) < 4e-6
    assert [len(sizes) for sizes in chunks] == [1, 5]


def test_autocast(device, backend):
    """Autocast gives the product 16-bit operands, and gradients come back in the parameters' own dtype."""
    case = make(9, 16, 200, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        actual = evaluate(weighted_log_likelihood, case)
        wide = evaluate(weighted_log_likelihood, cast(case, dtype=torch.float64))
    rounded = Case(case.hidden.bfloat16(), case.weight.bfloat16(), case.bias, case.targets)
    assert [g.dtype for g in actual] == [torch.float32] * 4
    assert error(actual[0], truth(rounded)[0]) < 4e-6
    assert_agree(actual, truth(rounded), 1e-2)
    assert wide[0].dtype is torch.float64
    assert_agree(wide, truth(case), 1e-12)


# ---------------------------------------------------------------- errors


def broken(**changes):
    """Return valid arguments, overridden by the changes."""
    case = make(3, 4, 10)
    valid = {"hidden": case.hidden, "weight": case.weight, "targets": case.targets, "coefficients": torch.ones(3)}
    return valid | changes


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"coefficients": torch.ones(3, requires_grad=True)},
            r"coefficients must be constants here, .*: pass coefficients\.detach\(\), "
            r"or multiply linear_log_likelihood",
        ),
        (
            {"coefficients": torch.ones(4)},
            r"coefficients must be a floating-point tensor with one number for each target, shape \(3,\), "
            r"got torch\.float32 of shape \(4,\)",
        ),
        ({"coefficients": torch.ones(3, 1)}, r"shape \(3,\), got torch\.float32 of shape \(3, 1\)"),
        ({"coefficients": torch.tensor(1.0)}, r"shape \(3,\), got torch\.float32 of shape \(\)"),
        ({"coefficients": ids(3)}, r"coefficients must be a floating-point tensor .*, got torch\.int64"),
        ({"coefficients": 1.0}, "coefficients must be a floating-point tensor .*, got float"),
        ({"coefficients": torch.ones(3, **elsewhere)}, "coefficients are on meta and targets on cpu: move them to one"),
        ({"hidden": ids(3, 4)}, r"hidden must be a float32, .*, got torch\.int64 of shape \(3, 4\)"),
        ({"targets": torch.ones(3)}, r"targets must be an int64 tensor .*, got torch\.float32 .*: .* with \.long\(\)"),
        ({"targets": ids(4)}, r"one token id for each row of hidden, shape \(3,\), got \(4,\)"),
        ({"targets": ids(3, **elsewhere)}, "targets are on meta and hidden on cpu: move them to one device"),
        ({"targets": torch.tensor([0, -100, 10])}, r"targets must lie in \[0, 10\) or be -100 \(ignored\), got 10: "),
        ({"targets": torch.tensor([0, -1, 3])}, r"targets must lie in \[0, 10\) or be -100 \(ignored\), got -1: "),
        ({"weight": torch.ones(10, 5)}, r"weight must have shape \(V, 4\) to match hidden .*, got \(10, 5\)"),
        ({"weight": torch.ones(10, 4, **elsewhere)}, "weight is on meta and hidden on cpu: move them to one device"),
        ({"bias": torch.ones(9)}, r"bias must have shape \(10,\), one number for each vocabulary entry, got \(9,\)"),
        ({"bias": torch.ones(10, **elsewhere)}, "bias is on meta and the rest on cpu: move them to one device"),
        ({"softcap": 0.0}, r"softcap must be positive, got 0\.0: leave it None for no cap"),
        ({"workspace": -1}, "workspace must be a number of bytes, 0 or more, got -1"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_errors(changes, sentence, dtype):
    """Each wrong argument raises an error that names it, the requirement and the value, in one pass and in two."""
    task = broken(**changes)
    if task["hidden"].is_floating_point():
        task |= {"hidden": task["hidden"].to(dtype), "weight": task["weight"].to(dtype)}
    with pytest.raises(ArgumentError, match=sentence):
        weighted_log_likelihood(**task)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_as_the_rows_of_linear_log_likelihood(dtype, device, backend, chunks):
    """One row with coefficient 1 must have its value in linear_log_likelihood."""
    case = make(5, 16, 300, dtype=dtype, device=device, masked=0.3)
    rows = linear_log_likelihood(*case[:2], case.targets, bias=case.bias)
    for n in range(5):
        coefficients = torch.zeros(5, device=device).index_fill(0, torch.tensor(n, device=device), 1.0)
        value = weighted_log_likelihood(*case[:2], case.targets, coefficients, bias=case.bias, workspace=3000)
        assert_agree([value], [rows[n].cpu()], 2e-6)
