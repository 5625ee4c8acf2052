"""logit_margin against its definition in float64."""

import pytest
import torch
from coverings import grid, in_full
from heads import Allocations, assert_agree, assert_equal, error, make, on_gpu
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pyunlearn.errors import ArgumentError
from pyunlearn.ops import logit_margin, reference

pytestmark = pytest.mark.usefixtures("poisoned")
SMALL = 9 * 64 * 4  # a workspace of one block


def definition(hidden, weight, *, bias=None, logit_scale=1.0, softcap=None, workspace=None):
    """Compute the definition from all logits, in the inputs' own dtype."""
    return reference.logit_margin_of(reference.logits_of(hidden @ weight.T, bias, logit_scale, softcap or 0.0))


def evaluate(op, case, **options):
    """Return an op's margins and the gradients of their sum of squares."""
    leaves = [t.detach().clone().requires_grad_() for t in case[:3]]
    margin = op(*leaves[:2], bias=leaves[2], **options)
    return [margin.detach(), *torch.autograd.grad(margin.square().sum(), leaves)]


@grid(
    {"dtype": torch.bfloat16, "options": {"logit_scale": 2.0, "softcap": 5.0}, "bias": True},
    dtype=[torch.float32, torch.float64, torch.bfloat16],
    options=[{}, {"logit_scale": 0.3}, {"softcap": 3.0}, {"logit_scale": 2.0, "softcap": 5.0}],
    bias=[True, False],
)
def test_the_margin_is_its_definition(device, dtype, options, bias):
    """Values and gradients, in blocks of 64 columns, must agree with float64, 16-bit ones to their own rounding."""
    case = make(9, 16, 300, dtype=dtype, device=device, bias=bias)
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in case[:3]]
    z = leaves[0] @ leaves[1].T
    z = (z if leaves[2] is None else z + leaves[2]) * options.get("logit_scale", 1.0)
    z = options["softcap"] * torch.tanh(z / options["softcap"]) if "softcap" in options else z
    wanted = (z.amax(-1) - z.mean(-1)).square()
    mine = [None if x is None else x.detach().requires_grad_() for x in case[:3]]
    actual = logit_margin(*mine[:2], bias=mine[2], workspace=9 * 64 * 4, **options).square()
    digits = {torch.float32: 1e-5, torch.float64: 1e-11, torch.bfloat16: 2e-2}[dtype]
    assert actual.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    pairs = [(actual, wanted)]
    pairs += zip(
        torch.autograd.grad(actual.sum(), [x for x in mine if x is not None]),
        torch.autograd.grad(wanted.sum(), [x for x in leaves if x is not None]),
        strict=True,
    )
    for f, w in pairs:
        assert (f.double() - w).abs().max() <= digits * w.abs().max()


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_row_without_a_coefficient_leaves_no_nan_in_the_gradients(device, softcap):
    """With any numbers in it: 0 * NaN would be NaN in the weight's gradient, for all."""
    case = make(6, 16, 300, device=device, bias=True)
    coefficients = torch.tensor([0.5, -1.0, 0.0, 2.0, 0.0, 1.0], device=device)

    def gradients():
        leaves = [t.detach().clone().requires_grad_() for t in case[:3]]
        return torch.autograd.grad(logit_margin(*leaves[:2], bias=leaves[2], softcap=softcap), leaves, coefficients)

    wanted = gradients()
    case.hidden[2], case.hidden[4, 0] = torch.nan, torch.inf
    assert_agree(gradients(), wanted, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_layouts(device, dtype, softcap):
    """Sliced or transposed hidden states and heads give the bits of their copies."""
    case = make(9, 32, 300, dtype=dtype, device=device)
    turned = case._replace(hidden=case.hidden.T.contiguous().T, weight=case.weight.T.contiguous().T)
    sliced = case._replace(
        hidden=case.hidden.repeat_interleave(2, 1)[:, ::2], weight=case.weight.repeat_interleave(2, 0)[::2]
    )

    def actual(shown):
        leaves = [shown.hidden.detach().requires_grad_(), shown.weight.detach().requires_grad_()]
        margin = logit_margin(*leaves, softcap=softcap)
        return [margin.detach(), *torch.autograd.grad(margin.sum(), leaves)]

    wanted = actual(case._replace(hidden=case.hidden.clone(), weight=case.weight.clone()))
    for layout in (turned, sliced):
        assert_agree(actual(layout), wanted, 1e-5 if dtype is torch.float32 else 1e-2)
        assert_equal(actual(layout)[:1], wanted[:1])


def test_frozen_head():
    """A frozen head gets no gradient, and a head of another width is an error."""
    case = make(5, 8, 100, bias=False)
    hidden = case.hidden.clone().requires_grad_()
    logit_margin(hidden, case.weight).sum().backward()
    assert hidden.grad is not None
    assert case.weight.grad is None
    with pytest.raises(ArgumentError, match="weight must have shape"):
        logit_margin(hidden, case.weight[:, :3])


every_softcap = pytest.mark.parametrize("softcap", [None, 3.0])


@every_softcap
def test_gradcheck(softcap, device, backend):
    """The gradients must agree with finite differences in float64."""
    case = make(6, 5, 130, dtype=torch.float64, device=device)

    def function(hidden, weight, bias):
        return logit_margin(hidden, weight, bias=bias, logit_scale=0.5, softcap=softcap, workspace=0)

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in case[:3]], fast_mode=True)


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_worse_than_pytorch(dtype, softcap, device, backend):
    """Against float64, values and gradients must be no further off than PyTorch's in the same dtype.

    Added to the tolerance: 4e-6 and, for gradients, half the dtype's epsilon of the largest. Rows whose two largest
    logits are closer than rounding are left out: either may be the argmax.
    """
    case = make(60, 48, 701, dtype=dtype, device=device)
    wide = case._replace(hidden=case.hidden.double(), weight=case.weight.double(), bias=case.bias.double())
    two = reference.logits_of(wide.hidden @ wide.weight.T, wide.bias, 1.0, softcap or 0.0).topk(2).values
    clear = two[:, 0] - two[:, 1] > 0.1
    assert clear.sum() > 20
    case, wide = case._replace(hidden=case.hidden[clear]), wide._replace(hidden=wide.hidden[clear])
    wanted = evaluate(definition, wide, softcap=softcap)
    ours, theirs = (evaluate(op, case, softcap=softcap, workspace=SMALL) for op in (logit_margin, definition))
    for at, (actual, other, right) in enumerate(zip(ours, theirs, wanted, strict=True)):
        allowed = 4e-6 + (torch.finfo(dtype).eps / 2 if at else 0)
        assert error(actual, right.cpu()) <= error(other, right.cpu()) + allowed, at


@pytest.mark.full
@pytest.mark.parametrize(("softcap", "dynamic"), [(3.0, False), *in_full((None, False), (3.0, True), (None, True))])
def test_compile(dynamic, softcap, device):
    """torch.compile(fullgraph=True) must compile it and agree with eager, at every number of rows."""
    torch._dynamo.reset()

    def function(hidden, weight, **options):
        return logit_margin(hidden, weight, softcap=softcap, **options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (9, 5) if dynamic else (9,):
        case = make(rows, 8, 130, device=device)
        assert_agree(evaluate(compiled, case), [t.cpu() for t in evaluate(function, case)], 2e-6)


shapes = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 150), st.integers(0, 2**31))


@given(shape=shapes, constant=st.floats(-100, 100), workspace=st.integers(0, 100_000))
def test_constant_on_all_logits(shape, constant, workspace, device, backend):
    """Neither one constant on every logit nor the workspace changes anything, and no margin is below 0."""
    case = make(*shape[:3], dtype=torch.float64, device=device, seed=shape[3])
    wanted = [t.cpu() for t in evaluate(logit_margin, case)]
    assert (wanted[0] >= -1e-12).all()
    moved = case._replace(bias=case.bias + constant)
    assert_agree(evaluate(logit_margin, moved, workspace=workspace), wanted, 1e-9)


def test_equal_logits(device, backend):
    """The uniform distribution has margin 0; the first of equal largest logits gets the gradient."""
    hidden = torch.ones(3, 4, device=device)
    bias = torch.zeros(70, device=device, requires_grad=True)
    margin = logit_margin(hidden, torch.ones(70, 4, device=device), bias=bias, workspace=0)
    assert_equal([margin.detach()], [torch.zeros_like(margin)])
    (d_bias,) = torch.autograd.grad(margin.sum(), bias)
    assert d_bias.argmax() == 0
    assert d_bias[0].item() == pytest.approx(3 - 3 / 70)


@every_softcap
def test_memory(softcap, device):
    """Nothing of size (N, V) may be allocated: no tensor is larger than the workspace."""
    rows, width, vocabulary, workspace = 1024, 8, 8192, 4 << 20  # 32 MiB of logits
    case = make(rows, width, vocabulary, device=device)
    leaf = case.hidden.clone().requires_grad_()
    with Allocations() as used:
        logit_margin(leaf, case.weight, softcap=softcap, workspace=workspace).sum().backward()
    assert workspace // 16 < used.largest <= workspace
    assert used.peak <= workspace


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_share_their_argmax(dtype, device):
    """Rows with the same argmax add up in float32 and round once: the bits of a loop over rows, on the CPU."""
    case = make(300, 24, 11, dtype=dtype, device=device)
    leaves = [t.clone().requires_grad_() for t in case[:3]]
    margin = logit_margin(*leaves[:2], bias=leaves[2])
    c = torch.linspace(-1, 2, 300, device=device)
    d_weight, d_bias = torch.autograd.grad(margin, leaves[1:], c)
    first = (case.hidden.float() @ case.weight.float().T + case.bias.float()).argmax(dim=1)
    pulled, sums = c[:, None] * case.hidden.float(), torch.zeros(11, 24, device=device)
    biases = (-c.sum() / 11).repeat(11)
    for n, v in enumerate(first.tolist()):
        sums[v] += pulled[n]
        biases[v] += c[n]
    wanted = (sums - pulled.sum(dim=0) / 11).to(dtype)
    if device == "cpu":
        assert_equal([d_weight, d_bias], [wanted, biases.to(dtype)])
    assert_agree([d_weight, d_bias], [wanted, biases.to(dtype)], 1e-6 if dtype is torch.float32 else 8e-3)


class NoSynchronization(TorchDispatchMode):
    """Fail on operations that synchronize with a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in (
            torch.ops.aten.nonzero,
            torch.ops.aten._unique2,
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.bincount,
        )
        return function(*args, **(kwargs or {}))


@every_softcap
def test_no_synchronization(softcap, device):
    """Neither forward nor backward reads a number, which on a GPU would synchronize."""
    case = make(20, 8, 70, device=device)
    with NoSynchronization():
        evaluate(logit_margin, case, softcap=softcap)


@on_gpu
def test_many_rows_on_gpu(device):
    """Many rows that share few argmax tokens give the same bits in every run, without synchronization."""
    case = make(4000, 64, 50, device=device)
    wanted = evaluate(logit_margin, case)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = [evaluate(logit_margin, case) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for again in actual:
        assert_equal(again, wanted)
