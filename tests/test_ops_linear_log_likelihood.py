"""linear_log_likelihood, and with it log_likelihood where one claim holds for both, against PyTorch in float64."""

import math

import pytest
import torch
import torch.utils.checkpoint
from heads import (
    TOLERANCE,
    Allocations,
    Case,
    assert_agree,
    assert_equal,
    cast,
    elsewhere,
    error,
    ids,
    logits_module,
    make,
    on_gpu,
    op_module,
    plain,
    saved_elsewhere,
)
from hypothesis import given
from hypothesis import strategies as st

from pyunlearn.errors import ArgumentError
from pyunlearn.ops import _backend, _passes, hopper, linear_log_likelihood, log_likelihood, reference
from pyunlearn.ops._plan import MIB, Plan, default_workspace, plan


def from_logits(hidden, weight, targets, *, workspace=None, **options):
    """log_likelihood with linear_log_likelihood's signature."""
    return log_likelihood(hidden @ weight.T, targets, **options)


def evaluate(function, case, coefficients=None, **options):
    """[values, gradient of sum(coefficients * values) for hidden, weight and, if there is one, bias]."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in case[:3]]
    values = function(leaves[0], leaves[1], case.targets, bias=leaves[2], **options)
    coefficients = torch.linspace(-1, 2, len(values)) if coefficients is None else coefficients
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [values.detach(), *torch.autograd.grad(values, wanted, coefficients.to(values))]


def truth(case, coefficients=None, **options):
    """What `evaluate` should find, from float64."""
    return evaluate(plain, cast(case, dtype=torch.float64, device="cpu"), coefficients, **options)


both_ops = pytest.mark.parametrize(
    "op", [pytest.param(linear_log_likelihood, id="linear"), pytest.param(from_logits, id="logits")]
)


# ---------------------------------------------------------------- both ops: the answer is right


@both_ops
@pytest.mark.parametrize("width", [1, 64, 123, 896, 2304])
def test_every_width(op, width, device, backend):
    """Values and gradients must agree with float64 for any hidden size, bias included once."""
    case = make(5, width, 300, device=device)
    assert_agree(evaluate(op, case, workspace=0), truth(case), 4e-6)


@both_ops
@pytest.mark.parametrize("vocabulary", [1, 2, 123, 50257, 65537, 128256])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_every_vocabulary(op, vocabulary, softcap, device, backend):
    """Values and gradients must agree with float64 for any vocabulary, whole blocks or not, padding never counted.

    Plus PyTorch's own error: a float32 sum over so many columns is only as good as the machine's product makes it.
    """
    case = make(3, 4, vocabulary, device=device)
    wanted = truth(case, softcap=softcap)
    theirs = max(error(f, w) for f, w in zip(evaluate(plain, case, softcap=softcap), wanted, strict=True))
    assert_agree(evaluate(op, case, softcap=softcap), wanted, 4e-6 + theirs)


@both_ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("logit_scale", [1.0, 0.0625])
@pytest.mark.parametrize("softcap", [None, 2.5])
def test_every_option(op, dtype, masked, bias, logit_scale, softcap, device, backend):
    """Values and gradients must agree with float64 for each mix of dtype, mask, bias, scale and softcap."""
    case = make(13, 20, 203, dtype=dtype, device=device, bias=bias, masked=masked)
    options = {"logit_scale": logit_scale, "softcap": softcap}
    found = evaluate(op, case, workspace=16000, **options)
    assert found[0].dtype is dtype
    assert_agree(found, truth(case, **options), TOLERANCE[dtype])


@both_ops
@pytest.mark.parametrize("offset", [-1e4, 1e4])
@pytest.mark.parametrize("through", ["bias", "product"])
def test_common_offset(op, offset, through, device, backend):
    """Logits that all lie near +-10000 must give what their differences say, to what float32 holds at 10000."""
    case = make(6, 16, 500, device=device)
    if through == "bias":
        case = case._replace(bias=case.bias + offset)
    else:
        case.hidden[:, 0], case.weight[:, 0] = 1e4, offset / 1e4
    assert_agree(evaluate(op, case, workspace=0), truth(case), 4e-3)


@both_ops
@pytest.mark.parametrize("workspace", [0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exact_common_offset_changes_nothing(op, dtype, workspace, device, backend):
    """A constant on all logits of a row drops out of the softmax: where adding it is exact, values and gradients keep every bit.

    Statistics that go through the rounded log of the sum lose as many bits as the offset has: at 65536, all but 7.
    """
    case = make(6, 16, 500, device=device)
    case = Case(*((t.clamp(-2, 2) * 8).round() / 8 for t in case[:3]), case.targets)  # so that products are exact too
    case = cast(case, dtype=dtype)
    case = case._replace(bias=case.bias.float())
    shifted = case._replace(bias=case.bias + 65536)
    found, wanted = evaluate(op, shifted, workspace=workspace), evaluate(op, case, workspace=workspace)
    if op is linear_log_likelihood and hopper.serves(case.hidden, case.weight):
        assert_agree(found, wanted, 4e-3)  # what is kept there is relative to 0, so it is rounded elsewhere
    else:
        assert_equal(found, wanted)


@both_ops
def test_certain_target(op, device, backend):
    """The gradient 1 - p of a nearly certain token must keep its digits, however large the logits."""
    vocabulary, gap = 50, 12.0
    weight = torch.zeros(vocabulary, 1)
    weight[7] = gap
    case = Case(torch.ones(1, 1), weight, torch.full((vocabulary,), 3000.0), torch.tensor([7]))
    wanted = truth(case, torch.ones(1))[3][7].item()
    assert wanted == pytest.approx(49 * math.exp(-gap), rel=1e-3)
    found = evaluate(op, cast(case, device=device), torch.ones(1))[3][7].item()
    assert found == pytest.approx(wanted, rel=1e-3)
    logits = case.weight[:, 0] + case.bias
    naive = 1 - (logits[7] - logits.logsumexp(0)).exp().item()
    assert naive != pytest.approx(wanted, rel=0.1)  # what the test is for


@both_ops
@pytest.mark.parametrize("workspace", [0, None])
def test_impossible_tokens(op, workspace, device, backend):
    """Tokens whose logit is -inf, whole blocks of them, have probability 0 and gradient 0, and disturb no other."""
    case = make(6, 8, 400, device=device)
    case.bias[:70], case.bias[128:256] = -torch.inf, -torch.inf
    case.targets.copy_(torch.tensor([70, 71, 100, 256, 399, 300]))
    assert_agree(evaluate(op, case, workspace=workspace), truth(case), 4e-6)
    case.targets[1] = 3
    assert op(*case[:2], case.targets, bias=case.bias)[1] == -torch.inf


@both_ops
def test_rows_are_apart(op, device, backend):
    """A NaN in one row must stay in that row, and what an ignored row holds must not matter at all."""
    case = make(6, 8, 200, device=device)
    wanted = truth(case._replace(targets=torch.tensor([1, 2, -100, 3, 4, 5])))
    case.hidden[2] = torch.nan
    found = op(*case[:2], case.targets, bias=case.bias)
    assert found.isnan().tolist() == [False, False, True, False, False, False]
    case.targets.copy_(torch.tensor([1, 2, -100, 3, 4, 5]))
    if op is linear_log_likelihood:
        assert_agree(evaluate(op, case), wanted, 4e-6)
    logits = (case.hidden @ case.weight.T).requires_grad_()
    assert torch.autograd.grad(log_likelihood(logits, case.targets).sum(), logits)[0].isfinite().all()


# ---------------------------------------------------------------- both ops: the edges


@both_ops
@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_scored(op, rows, device, backend):
    """No row, or none that counts: zeros, connected to the graph, with gradients of zero for everything."""
    case = make(rows, 8, 100, device=device, masked=1.0)
    values, *gradients = evaluate(op, case)
    assert values.shape == (rows,)
    assert not values.any()
    assert [g.shape for g in gradients] == [t.shape for t in case[:3]]
    assert not any(g.any() for g in gradients)


@both_ops
@pytest.mark.parametrize("workspace", [0, None])
def test_second_backward(op, workspace, device, backend):
    """Backward again and again over a retained graph must give the same gradients, asked for together or apart."""
    hidden, weight, bias, targets = make(7, 16, 300, device=device, masked=0.3)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    total = op(hidden, weight, targets, bias=bias, workspace=workspace).sum()
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    apart = [torch.autograd.grad(total, leaf, retain_graph=True)[0] for leaf in leaves]
    assert_equal(apart, first)
    assert_equal(torch.autograd.grad(3 * total, leaves, retain_graph=True), torch.autograd.grad(3 * total, leaves))


@both_ops
def test_saved_elsewhere(op, device, backend):
    """Checkpointing, and saved tensors kept elsewhere, must change no gradient."""
    case = make(7, 16, 300, device=device, masked=0.3)

    def checkpointed(*args, **options):
        return torch.utils.checkpoint.checkpoint(op, *args, use_reentrant=False, **options)

    wanted = evaluate(op, case)
    assert_equal(evaluate(checkpointed, case), wanted)
    with saved_elsewhere():
        assert_equal(evaluate(op, case), wanted)


@both_ops
def test_two_runs(op, device, backend):
    """The same inputs must give the same bits again."""
    case = make(65, 33, 1000, device=device, masked=0.3)
    assert_equal(evaluate(op, case, softcap=9.0), evaluate(op, case, softcap=9.0))


@both_ops
@pytest.mark.parametrize("wrong", [-1, 100, -101, 2**40])
def test_target_out_of_range(op, wrong, device, backend, monkeypatch):
    """A target outside the vocabulary is an error on the CPU; the kernels alone, as on a card, say NaN in its row."""
    case = make(4, 8, 100, device=device)
    case.targets[2] = wrong
    if device == "cpu":
        with pytest.raises(ArgumentError, match=rf"must lie in \[0, 100\) or be -100 \(ignored\), got {wrong}: "):
            op(*case[:2], case.targets)
        for module in (op_module, logits_module, _passes):
            monkeypatch.setattr(module, "check_targets", lambda *_: None)
    values, *gradients = evaluate(op, case, torch.tensor([1.0, 2.0, 0.0, 3.0]))
    assert values.isnan().tolist() == [False, False, True, False]
    assert all(g.isfinite().all() for g in gradients)


@both_ops
def test_ignore_index(op, device, backend):
    """Any number can mean "ignored", a token's own id too; then -100 is out of range."""
    case = make(6, 8, 50, device=device)
    case.targets[1] = 0
    assert_agree(evaluate(op, case, ignore_index=0), truth(case, ignore_index=0), 4e-6)
    if device == "cpu":
        with pytest.raises(ArgumentError, match=r"or be 0 \(ignored\), got -100"):
            op(*case[:2], case.targets.fill_(-100), ignore_index=0)


@both_ops
@pytest.mark.parametrize("shape", [(), (12,), (3, 4), (2, 3, 2), (2, 0)])
def test_leading_dimensions(op, shape, device, backend):
    """Targets of any shape come back in that shape, int32 ones too."""
    case = make(math.prod(shape), 8, 90, device=device)
    found = op(case.hidden.reshape(*shape, 8), case.weight, case.targets.reshape(shape).int())
    assert found.shape == shape
    assert_agree([found.flatten()], [truth(case._replace(bias=None))[0]], 4e-6)


@both_ops
def test_layouts(op, device, backend):
    """Transposed, sliced and expanded inputs must count as the numbers they show."""
    case = make(6, 8, 90, device=device)
    wide = torch.full((12,), 3, device=device)
    wide[::2] = case.targets
    sliced = torch.full((6, 16), torch.nan, device=device)
    sliced[:, ::2] = case.hidden
    shown = Case(sliced[:, ::2], case.weight.T.contiguous().T, case.bias.repeat_interleave(3)[::3], wide[::2])
    assert not any(t.is_contiguous() for t in shown)
    hidden, weight, bias = (t.detach().requires_grad_() for t in shown[:3])  # keeps the strides, which clone() mends
    values = op(hidden, weight, shown.targets, bias=bias)
    coefficients = torch.ones((), device=device).expand(6)
    found = [values.detach(), *torch.autograd.grad(values, (hidden, weight, bias), coefficients)]
    assert_agree(found, truth(case, torch.ones(6)), 4e-6)

    one = Case(case.hidden[:1].expand(6, 8), case.weight[:1].expand(90, 8), case.bias[:1].expand(90), case.targets)
    assert_agree([op(*one[:2], one.targets, bias=one.bias)], [truth(one)[0]], 4e-6)


@both_ops
def test_second_derivative(op):
    """A gradient of the gradient is refused in words, not given wrong."""
    case = make(3, 4, 10)
    hidden = case.hidden.requires_grad_()
    (gradient,) = torch.autograd.grad(op(hidden, case.weight, case.targets).sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="can be differentiated once, not twice"):
        gradient.sum().backward()


@both_ops
def test_no_graph_without_gradients(op):
    """Without an input that wants a gradient, or under no_grad, nothing is kept for one."""
    case = make(3, 4, 10)
    assert not op(*case[:2], case.targets).requires_grad
    with torch.no_grad():
        assert not op(case.hidden.requires_grad_(), case.weight, case.targets).requires_grad


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
    found = evaluate(linear_log_likelihood, case, softcap=softcap, workspace=workspace)
    assert_agree(found, evaluate(linear_log_likelihood, case, softcap=softcap), 3e-6)


# ---------------------------------------------------------------- both ops: PyTorch's own checks


@both_ops
@pytest.mark.parametrize("workspace", [0, None])
def test_gradcheck(op, workspace, device, backend):
    """The gradients must be those that finite differences find in float64, with bias, scale and softcap."""
    case = make(4, 3, 140, dtype=torch.float64, device=device, masked=0.2)
    options = {"logit_scale": 0.5, "softcap": 2.0, "workspace": workspace}

    def function(hidden, weight, bias):
        return op(hidden, weight, case.targets, bias=bias, **options)

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in case[:3]], fast_mode=True)


def test_opcheck(device):
    """torch.library must find schema, fake kernels and autograd of every op in order."""
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


@both_ops
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(op, dynamic, device):
    """torch.compile(fullgraph=True) must take it without a break and give the eager answer, at every shape."""
    torch._dynamo.reset()

    def function(hidden, weight, targets, bias):
        return op(hidden, weight, targets, bias=bias, softcap=4.0)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (6, 9) if dynamic else (6,):
        case = make(rows, 8, 200, device=device, masked=0.3)
        wanted = evaluate(function, case)
        assert_equal(evaluate(compiled, case), wanted)


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(252, 507, 123), (40, 64, 3001)])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("workspace", [0, None])
def test_no_worse_than_pytorch(dtype, shape, softcap, workspace, device, backend):
    """Against float64, values and gradients must be no further off than PyTorch's in the same dtype.

    Plus 2e-6 for values, which are float32 whatever the dtype. For gradients, plus half the dtype's epsilon, to which they
    are rounded, and 2e-6 for the order of float32 sums.
    """
    case = make(*shape, dtype=dtype, device=device, masked=0.3)
    wanted = truth(case, softcap=softcap)
    ours = evaluate(linear_log_likelihood, case, softcap=softcap, workspace=workspace)
    theirs = evaluate(plain, case, softcap=softcap)
    for at, (found, other, right) in enumerate(zip(ours, theirs, wanted, strict=True)):
        allowed = (torch.finfo(dtype).eps / 2 if at else 0) * right.abs().max().item() + 2e-6
        far = [(x.double().cpu() - right).abs().max().item() for x in (found, other)]
        assert far[0] <= far[1] + allowed, (at, far)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_are_never_rounded(dtype, device, backend):
    """From 16-bit inputs values must be good to float32: logits are not rounded on the way (which costs 1e-2)."""
    case = make(50, 256, 1000, dtype=dtype, device=device)
    found = linear_log_likelihood(*case[:2], case.targets, bias=case.bias)
    assert found.dtype is torch.float32
    assert_agree([found], [truth(case)[0]], 2e-6)


def test_mixed_dtypes(device, backend):
    """Hidden states, head and bias of different dtypes meet in the widest; each gradient comes back in its own."""
    case = make(9, 16, 200, device=device)
    mixed = Case(case.hidden.bfloat16(), case.weight, case.bias.half(), case.targets)
    found = evaluate(linear_log_likelihood, mixed)
    assert [g.dtype for g in found] == [torch.float32, torch.bfloat16, torch.float32, torch.float16]
    assert_agree(found, truth(mixed), 5e-3)
    assert error(found[0], truth(mixed)[0]) < 4e-6


def test_autocast(device, backend):
    """Under autocast the product takes 16-bit operands, and gradients come back in the parameters' own dtype."""
    case = make(9, 16, 200, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = evaluate(linear_log_likelihood, case)
        wide = evaluate(linear_log_likelihood, cast(case, dtype=torch.float64))
    rounded = Case(case.hidden.bfloat16(), case.weight.bfloat16(), case.bias, case.targets)
    assert [g.dtype for g in found] == [torch.float32] * 4
    assert error(found[0], truth(rounded)[0]) < 4e-6
    assert_agree(found, truth(rounded), 1e-2)
    assert wide[0].dtype is torch.float64
    assert_agree(wide, truth(case), 1e-12)


# ---------------------------------------------------------------- the head and the trunk


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("workspace", [0, None])
def test_frozen(trained, workspace, device, backend):
    """Hidden states, head and bias each get their gradient if they ask for it, whatever else is frozen."""
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("group", [64, 192])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_kept_or_recomputed(dtype, group, softcap, device, backend, monkeypatch):
    """Values and gradients must be the same, bit for bit, whether logits are kept, recomputed, or some of each."""
    case = make(16, 24, 500, dtype=dtype, device=device, masked=0.4)
    results = []
    for kept in (0, 8 * group, 16 * 300, 16 * 500):
        monkeypatch.setattr(op_module, "plan", lambda rows, v, *_, kept=kept: Plan(v, 64, group, kept))
        results.append(evaluate(linear_log_likelihood, case, softcap=softcap))
    for other in results[1:]:
        assert_equal(other, results[0])
    wanted = truth(case, softcap=softcap)
    assert error(results[0][0], wanted[0]) < 4e-6
    assert_agree(results[0], wanted, {2: 4 * torch.finfo(dtype).eps}.get(dtype.itemsize, 4e-6))


def test_any_large_workspace():
    """From 128 MiB on, the CPU's answer is the same bit for bit, kept or not."""
    case = make(640, 4, 65537, bias=False)  # 160 MiB of logits
    assert plan(640, 65537, torch.float32, "cpu", 128 * MIB, True).cached < len(
        plan(640, 65537, torch.float32, "cpu", None, True).groups()
    )
    results = [evaluate(linear_log_likelihood, case, workspace=w) for w in (128 * MIB, 144 * MIB, None, 1 << 50)]
    for other in results[1:]:
        assert_equal(other, results[0])


@pytest.mark.parametrize("workspace", [0, 1, 1000, 10**5, 10**6, None, 1 << 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_workspace(workspace, dtype, device, backend):
    """However few bytes are allowed, the answer is right; the first digits that move are the last ones."""
    case = make(30, 16, 1111, dtype=dtype, device=device, masked=0.3)
    found = evaluate(linear_log_likelihood, case, workspace=workspace)
    wanted = [t.cpu() for t in evaluate(linear_log_likelihood, case)]
    assert error(found[0], wanted[0]) < 2e-6
    assert_agree(found, wanted, 2 * torch.finfo(dtype).eps if dtype is torch.bfloat16 else 2e-6)


def test_masked_rows_take_no_workspace(device, backend, monkeypatch):
    """A workspace that holds the logits of the rows that count keeps all of them, whatever is masked beside them."""
    case = make(64, 20, 703, device=device, masked=0.7)
    live, workspace, kept, gradient = int((case.targets >= 0).sum()), 120_000, [], _backend.gradient
    plans = [plan(n, 703, torch.float32, device, workspace, True) for n in (live, 64)]
    assert [p.cached == len(p.groups()) for p in plans] == [True, False]
    monkeypatch.setattr(_backend, "gradient", lambda *a: kept.append(a[6]) or gradient(*a))
    assert_agree(evaluate(linear_log_likelihood, case, workspace=workspace), truth(case), 4e-6)
    assert kept
    assert all(kept)


sizes = st.integers(0, 1 << 14)


@given(
    rows=sizes,
    vocabulary=st.integers(1, 300_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    kind=st.sampled_from(["cpu", "cuda"]),
    workspace=st.none() | st.integers(0, 1 << 34),
)
def test_plan(rows, vocabulary, dtype, kind, workspace):
    """Groups and blocks cover the vocabulary once, in order, and what is kept fits in what was allocated for it."""
    p = plan(rows, vocabulary, dtype, kind, workspace, True)
    groups = p.groups()
    blocks = [block for first, end in groups for block in p.blocks_of(first, end)]
    assert [i for i, _, _ in blocks] == list(range(p.blocks))
    for spans in (groups, [(first, end) for _, first, end in blocks]):
        assert [end for _, end in spans] == [*(first for first, _ in spans[1:]), vocabulary]
        assert spans[0][0] == 0
    kept = sum(end - first for first, end in groups[: p.cached]) * rows * dtype.itemsize
    assert kept <= (workspace if workspace is not None else default_workspace(kind))
    if workspace == 1 << 34:
        assert p.cached == len(groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace", [MIB, 4 * MIB])
@pytest.mark.parametrize("trained", [True, False])
def test_memory(dtype, workspace, trained, device):
    """Beyond the gradients, a call must take its workspace and a few numbers a row, and never N * V of anything.

    Without gradients it takes one block of logits, a quarter of the workspace.
    """
    rows, width, vocabulary = 1024, 8, 8192  # 32 MiB of float32 logits
    case = make(rows, width, vocabulary, dtype=dtype, device=device)
    with Allocations() as used:
        hidden, weight, bias = (t.requires_grad_(trained) for t in case[:3])
        values = linear_log_likelihood(hidden, weight, case.targets, bias=bias, workspace=workspace)
        if trained:
            values.sum().backward()
    answers = sum(t.numel() * (t.element_size() + 4) for t in case[:3]) if trained else 0  # and the float32 behind them
    per_row = rows * 4 * (16 + (vocabulary // 64 if trained else 0) + width) + MIB // 4
    temporaries = (
        workspace if _backend.kernels_for(case.hidden) == "reference" else 0
    )  # plain torch makes copies of a block
    allowed = workspace if trained else workspace // 4
    assert workspace // 8 < used.peak <= allowed + temporaries + answers + per_row
    assert used.largest <= workspace


# ---------------------------------------------------------------- errors


def broken(**changes):
    """Valid arguments but for the changes."""
    case = make(3, 4, 10)
    return {"hidden": case.hidden, "weight": case.weight, "targets": case.targets} | changes


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden": ids(3, 4)}, r"hidden must be a float32, .*, got torch\.int64 of shape \(3, 4\)"),
        ({"hidden": [1.0]}, "hidden must be a float32, .*, got list"),
        ({"hidden": torch.tensor(1.0)}, r"of one dimension or more, got torch\.float32 of shape \(\)"),
        ({"hidden": torch.ones(3, 0)}, r"hidden must have at least one column, got shape \(3, 0\)"),
        ({"targets": torch.ones(3)}, r"targets must be an int64 tensor .*, got torch\.float32 .*: .* with \.long\(\)"),
        ({"targets": [1, 2, 3]}, "targets must be an int64 tensor of token ids, got list"),
        ({"targets": ids(4)}, r"one token id for each row of hidden, shape \(3,\), got \(4,\)"),
        ({"targets": ids(3, 1)}, r"one token id for each row of hidden, shape \(3,\), got \(3, 1\)"),
        ({"targets": ids(3, **elsewhere)}, "targets are on meta and hidden on cpu: move them to one device"),
        ({"weight": torch.ones(10, 5)}, r"weight must have shape \(V, 4\) to match hidden .*, got \(10, 5\)"),
        ({"weight": torch.ones(4)}, r"weight must have shape \(V, 4\) .*, got \(4,\)"),
        ({"weight": torch.ones(0, 4)}, r"weight must have shape \(V, 4\) .*, got \(0, 4\)"),
        ({"weight": ids(10, 4)}, r"weight must be a floating-point tensor of shape \(V, D\), got torch\.int64"),
        ({"weight": [[1.0]]}, "weight must be a floating-point tensor .*, got list"),
        ({"weight": torch.ones(10, 4, **elsewhere)}, "weight is on meta and hidden on cpu: move them to one device"),
        ({"bias": torch.ones(9)}, r"bias must have shape \(10,\), one number for each vocabulary entry, got \(9,\)"),
        ({"bias": ids(10)}, r"bias must be a floating-point tensor of shape \(V,\), got torch\.int64"),
        ({"bias": [1.0]}, "bias must be a floating-point tensor .*, got list"),
        ({"bias": torch.ones(10, **elsewhere)}, "bias is on meta and the rest on cpu: move them to one device"),
        ({"softcap": 0.0}, r"softcap must be positive, got 0\.0: leave it None for no cap"),
        ({"softcap": math.nan}, "softcap must be positive, got nan"),
        ({"workspace": -1}, "workspace must be a number of bytes, 0 or more, got -1"),
        ({"workspace": 1e6}, r"workspace must be a number of bytes, 0 or more, got 1000000\.0"),
    ],
)
def test_errors(changes, sentence):
    """Each wrong argument is named with what was wanted and what came."""
    with pytest.raises(ArgumentError, match=sentence):
        linear_log_likelihood(**broken(**changes))


def test_reference_is_the_definition():
    """pyunlearn.ops.reference must say what PyTorch's cross-entropy says."""
    case = make(9, 16, 70, dtype=torch.float64, masked=0.3)
    options = {"bias": case.bias, "logit_scale": 0.5, "softcap": 3.0}
    found = reference.linear_log_likelihood(*case[:2], case.targets, **options)
    assert_agree([found], [plain(*case[:2], case.targets, **options)], 1e-12)


# ---------------------------------------------------------------- on a card


@on_gpu
@both_ops
def test_cuda_graph(op, device, backend):
    """Forward and backward can be captured in a CUDA graph; a replay follows new inputs, masks and wrong targets."""
    case = make(64, 32, 5000, device=device, masked=0.5)
    leaves = [t.requires_grad_() for t in case[:3]]
    coefficients = torch.linspace(-1, 2, 64, device=device)

    def step():
        values = op(leaves[0], leaves[1], case.targets, bias=leaves[2])
        return [values.detach(), *torch.autograd.grad(values, leaves, coefficients)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for seed, masked in ((0, 0.5), (1, 0.0), (2, 1.0)):
        new = make(64, 32, 5000, device=device, masked=masked, seed=seed)
        with torch.no_grad():
            for static, fresh in zip((*leaves, case.targets), new, strict=True):
                static.copy_(fresh)
        graph.replay()
        assert_agree(found, truth(new), 4e-6)
    case.targets[3] = 10**9
    graph.replay()
    assert found[0].isnan().nonzero().flatten().tolist() == [3]


@on_gpu
@both_ops
def test_side_stream(op, device, backend):
    """Work goes to the stream that is current, so a call on a busy side stream sees what came before it there."""
    case = make(200, 64, 5000, device=device, masked=0.3)
    wanted = evaluate(op, case)
    late = torch.zeros_like(case.hidden)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # cycles, about 10 ms
        late.copy_(case.hidden)
        found = evaluate(op, case._replace(hidden=late))
    side.synchronize()
    assert_equal(found, wanted)


@on_gpu
def test_no_wait_for_the_card(device, backend):
    """Nothing waits for the card, forward or backward; but to drop rows linear_log_likelihood waits once, before anything else."""
    case = make(32, 16, 500, device=device, masked=0.3)
    hidden, weight = (t.clone().requires_grad_() for t in case[:2])
    live = case.targets >= 0
    rows, targets = hidden[live], case.targets[live]
    total = linear_log_likelihood(hidden, weight, case.targets).sum()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        total = total + from_logits(hidden, weight, case.targets).sum()
        (total + linear_log_likelihood(rows, weight, targets, ignore_index=None).sum()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert weight.grad.isfinite().all()


@on_gpu
def test_past_32_bits(device, backend):
    """Past 2^31 logits indices must not wrap: every row of 20000 x 128256 has the value that it has alone."""
    case = make(20000, 16, 128256, device=device, dtype=torch.bfloat16, bias=False)
    found = linear_log_likelihood(*case[:2], case.targets)
    some = torch.tensor([0, 1, 9999, 16743, 16744, 19998, 19999])  # 16744 * 128256 > 2^31
    few = cast(Case(case.hidden[some], case.weight, None, case.targets[some]), device="cpu")
    assert_agree([found[some]], [plain(*cast(few, dtype=torch.float64)[:2], few.targets)], 2e-6)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")
@both_ops
def test_another_card(op):
    """Tensors of the second card are served there while the first is current."""
    case = make(20, 16, 500, masked=0.3)
    with torch.cuda.device(0):
        assert_agree(evaluate(op, cast(case, device="cuda:1")), truth(case), 4e-6)
