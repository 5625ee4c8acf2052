"""linear_log_likelihood, and log_likelihood where one claim holds for both: properties, gradients and precision."""

import pytest
import torch
import torch.utils.checkpoint
from coverings import BACKENDS, grid
from heads import (
    Case,
    assert_agree,
    assert_equal,
    cast,
    error,
    make,
    plain,
)
from hypothesis import given
from hypothesis import strategies as st
from linear_cases import OPS, both_ops, evaluate, truth

from pyunlearn.ops import linear_log_likelihood

# ---------------------------------------------------------------- both ops: properties


shapes = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 150), st.integers(0, 2**31))


@both_ops
@given(shape=shapes, constant=st.floats(-100, 100))
def test_constant_on_all_logits(op, shape, constant, device, backend):
    """Adding one constant to every logit changes nothing."""
    case = make(*shape[:3], dtype=torch.float64, device=device, seed=shape[3])
    moved = case._replace(bias=case.bias + constant)
    assert_agree(evaluate(op, moved, workspace=0), [t.cpu() for t in evaluate(op, case, workspace=0)], 1e-11)


@both_ops
@given(shape=shapes, order=st.randoms(use_true_random=False), softcap=st.sampled_from([None, 4.0]))
def test_permuted_rows(op, shape, order, softcap, device, backend):
    """Permuting the rows permutes the values."""
    case = make(*shape[:3], device=device, masked=0.3, seed=shape[3])
    p = order.sample(range(shape[0]), shape[0])
    values = op(*case[:2], case.targets, softcap=softcap)
    assert_agree([op(case.hidden[p], case.weight, case.targets[p], softcap=softcap)], [values[p]], 2e-6)


@both_ops
@given(shape=shapes, logit_scale=st.floats(0.1, 3), softcap=st.sampled_from([None, 4.0]))
def test_probabilities(op, shape, logit_scale, softcap, device, backend):
    """exp of the log-likelihoods of all tokens sums to 1."""
    _, width, vocabulary, seed = shape
    case = make(1, width, vocabulary, device=device, seed=seed)
    every = torch.arange(vocabulary, device=device)
    options = {"bias": case.bias, "logit_scale": logit_scale, "softcap": softcap, "workspace": 0}
    values = op(case.hidden.expand(vocabulary, width), case.weight, every, **options)
    assert values.double().exp().sum().item() == pytest.approx(1, abs=3e-6)


@both_ops
@given(shape=shapes, softcap=st.sampled_from([None, 4.0]))
def test_ascent_and_descent(op, shape, softcap, device, backend):
    """The gradient that makes text less likely is minus the one that makes it more likely."""
    case = make(*shape[:3], device=device, masked=0.3, seed=shape[3])
    coefficients = torch.linspace(0.5, 2, shape[0])
    up = evaluate(op, case, coefficients, softcap=softcap, workspace=0)[1:]
    down = evaluate(op, case, -coefficients, softcap=softcap, workspace=0)[1:]
    assert_equal(up, [-g for g in down])


@given(shape=shapes, workspace=st.integers(0, 200_000), softcap=st.sampled_from([None, 4.0]))
def test_workspace_changes_nothing(shape, workspace, softcap, device, backend):
    """Values and gradients are the same for any number of bytes allowed."""
    rows, width, vocabulary, seed = shape
    case = make(rows, width, 3 * vocabulary, device=device, masked=0.2, seed=seed)
    actual = evaluate(linear_log_likelihood, case, softcap=softcap, workspace=workspace)
    assert_agree(actual, evaluate(linear_log_likelihood, case, softcap=softcap), 3e-6)


# ---------------------------------------------------------------- both ops: PyTorch's own checks


@both_ops
@pytest.mark.parametrize("workspace", [0, None])
def test_gradcheck(op, workspace, device, backend):
    """The gradients must agree with finite differences in float64, with bias, scale and softcap."""
    case = make(4, 3, 140, dtype=torch.float64, device=device, masked=0.2)
    options = {"logit_scale": 0.5, "softcap": 2.0, "workspace": workspace}

    def function(hidden, weight, bias):
        return op(hidden, weight, case.targets, bias=bias, **options)

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in case[:3]], fast_mode=True)


def test_opcheck(device):
    """Schema, fake kernels and autograd of every op must pass torch.library.opcheck."""
    ops, (hidden, weight, bias, targets) = torch.ops.pyunlearn, make(4, 8, 90, device=device)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    for args in (  # chosen so that all that is allocated is filled, for opcheck compares it
        (*leaves, targets, 0.5, 3.0, -100, None, True, False),
        (hidden, weight, None, targets, 1.0, 0.0, -100, 0, False, False),
    ):
        torch.library.opcheck(ops.linear_log_likelihood.default, args)
    logits = hidden @ weight.T
    torch.library.opcheck(ops.log_likelihood.default, (logits.clone().requires_grad_(), bias, targets, 0.5, 3.0, -100))

    static = ("test_schema", "test_faketensor")  # they have no gradient of their own
    for needs in ([True, True, True], [True, False, False], [False, True, False]):
        out = ops.linear_log_likelihood(hidden, weight, bias, targets, 0.5, 3.0, -100, 20000, True, False)
        args = (torch.ones_like(out[0]), hidden, weight, bias, targets, *out, 0.5, 3.0, -100, 20000, False, needs)
        torch.library.opcheck(ops.linear_log_likelihood_backward.default, args, test_utils=static)
    out = ops.log_likelihood(logits, bias, targets, 0.5, 3.0, -100)
    args = (torch.ones_like(out[0]), logits, bias, targets, *out, 0.5, 3.0, -100)
    torch.library.opcheck(ops.log_likelihood_backward.default, args, test_utils=static)


@grid(op=OPS, dynamic=[False, True], strength=1)
def test_compile(op, dynamic, device):
    """torch.compile(fullgraph=True) must compile it and agree with eager bit for bit, at every shape."""
    torch._dynamo.reset()

    def function(hidden, weight, targets, bias):
        return op(hidden, weight, targets, bias=bias, softcap=4.0)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (6, 9) if dynamic else (6,):
        case = make(rows, 8, 200, device=device, masked=0.3)
        wanted = evaluate(function, case)
        assert_equal(evaluate(compiled, case), wanted)


# ---------------------------------------------------------------- precision


@grid(
    {"dtype": torch.bfloat16, "shape": (40, 64, 3001), "softcap": 5.0, "workspace": 0, "backend": "compiled"},
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    shape=[(252, 507, 123), (40, 64, 3001)],
    softcap=[None, 5.0],
    workspace=[0, None],
    backend=BACKENDS,
)
def test_no_worse_than_pytorch(dtype, shape, softcap, workspace, device, backend):
    """Against float64, values and gradients must be no further off than PyTorch's in the same dtype.

    Added to the tolerance: 2e-6 for values, which are float32 in every dtype; for gradients, half the dtype's epsilon,
    to which they are rounded, and 2e-6 for the order of float32 sums.
    """
    case = make(*shape, dtype=dtype, device=device, masked=0.3)
    wanted = truth(case, softcap=softcap)
    ours = evaluate(linear_log_likelihood, case, softcap=softcap, workspace=workspace)
    theirs = evaluate(plain, case, softcap=softcap)
    for at, (actual, other, right) in enumerate(zip(ours, theirs, wanted, strict=True)):
        allowed = (torch.finfo(dtype).eps / 2 if at else 0) * right.abs().max().item() + 2e-6
        far = [(x.double().cpu() - right).abs().max().item() for x in (actual, other)]
        assert far[0] <= far[1] + allowed, (at, far)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_are_never_rounded(dtype, device, backend):
    """Values of 16-bit inputs must be right to float32: rounding the logits on the way would cost 1e-2."""
    case = make(50, 256, 1000, dtype=dtype, device=device)
    actual = linear_log_likelihood(*case[:2], case.targets, bias=case.bias)
    assert actual.dtype is torch.float32
    assert_agree([actual], [truth(case)[0]], 2e-6)


def test_mixed_dtypes(device, backend):
    """Hidden states, head and bias are computed in their widest dtype; each gradient comes back in its own."""
    case = make(9, 16, 200, device=device)
    mixed = Case(case.hidden.bfloat16(), case.weight, case.bias.half(), case.targets)
    actual = evaluate(linear_log_likelihood, mixed)
    assert [g.dtype for g in actual] == [torch.float32, torch.bfloat16, torch.float32, torch.float16]
    assert_agree(actual, truth(mixed), 5e-3)
    assert error(actual[0], truth(mixed)[0]) < 4e-6


def test_autocast(device, backend):
    """Autocast gives the product 16-bit operands, and gradients come back in the parameters' own dtype."""
    case = make(9, 16, 200, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        actual = evaluate(linear_log_likelihood, case)
        wide = evaluate(linear_log_likelihood, cast(case, dtype=torch.float64))
    rounded = Case(case.hidden.bfloat16(), case.weight.bfloat16(), case.bias, case.targets)
    assert [g.dtype for g in actual] == [torch.float32] * 4
    assert error(actual[0], truth(rounded)[0]) < 4e-6
    assert_agree(actual, truth(rounded), 1e-2)
    assert wide[0].dtype is torch.float64
    assert_agree(wide, truth(case), 1e-12)
