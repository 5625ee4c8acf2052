"""linear_log_likelihood, and with it log_likelihood where one claim holds for both, against PyTorch in float64."""

import math

import pytest
import torch
import torch.utils.checkpoint
from coverings import BACKENDS, grid
from heads import (
    TOLERANCE,
    Case,
    assert_agree,
    assert_equal,
    cast,
    elsewhere,
    error,
    ids,
    logits_module,
    make,
    op_module,
    plain,
    saved_elsewhere,
)
from linear_cases import OPS, both_ops, evaluate, truth

from pyunlearn.errors import ArgumentError
from pyunlearn.ops import _passes, hopper, linear_log_likelihood, log_likelihood, reference

# ---------------------------------------------------------------- both ops: values and gradients


@both_ops
@pytest.mark.parametrize("width", [1, 64, 123, 896, 2304])
def test_every_width(op, width, device, backend):
    """Values and gradients must agree with float64 for any hidden size, with the bias counted once."""
    case = make(5, width, 300, device=device)
    assert_agree(evaluate(op, case, workspace=0), truth(case), 4e-6)


@grid(
    {"vocabulary": 128256, "softcap": 3.0, "backend": "compiled"},
    op=OPS,
    vocabulary=[1, 2, 123, 50257, 65537, 128256],
    softcap=[None, 3.0],
    backend=BACKENDS,
)
def test_every_vocabulary(op, vocabulary, softcap, device, backend):
    """Values and gradients must agree with float64 for any vocabulary, whole blocks or not, padding never counted.

    PyTorch's own error is added to the tolerance: over this many columns the accuracy of a float32 sum depends on the
    machine's product.
    """
    case = make(3, 4, vocabulary, device=device)
    wanted = truth(case, softcap=softcap)
    theirs = max(error(f, w) for f, w in zip(evaluate(plain, case, softcap=softcap), wanted, strict=True))
    assert_agree(evaluate(op, case, softcap=softcap), wanted, 4e-6 + theirs)


@grid(
    {"dtype": torch.float32, "masked": 1.0, "softcap": 2.5, "backend": "compiled"},
    op=OPS,
    dtype=[torch.float32, torch.float64],
    masked=[0.0, 0.6, 1.0],
    bias=[False, True],
    logit_scale=[1.0, 0.0625],
    softcap=[None, 2.5],
    backend=BACKENDS,
)
def test_every_option(op, dtype, masked, bias, logit_scale, softcap, device, backend):
    """Values and gradients must agree with float64 for each mix of dtype, mask, bias, scale and softcap."""
    case = make(13, 20, 203, dtype=dtype, device=device, bias=bias, masked=masked)
    options = {"logit_scale": logit_scale, "softcap": softcap}
    actual = evaluate(op, case, workspace=16000, **options)
    assert actual[0].dtype is dtype
    assert_agree(actual, truth(case, **options), TOLERANCE[dtype])


@both_ops
@pytest.mark.parametrize("offset", [-1e4, 1e4])
@pytest.mark.parametrize("through", ["bias", "product"])
def test_common_offset(op, offset, through, device, backend):
    """Logits that all lie near +-10000 give the result of their differences, to float32's spacing at 10000."""
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
    """A constant on all logits of a row, where adding it is exact, changes no bit of values and gradients.

    Statistics that go through the rounded log of the sum lose as many bits as the offset has: at 65536, all but 7.
    """
    case = make(6, 16, 500, device=device)
    case = Case(*((t.clamp(-2, 2) * 8).round() / 8 for t in case[:3]), case.targets)  # so that products are exact too
    case = cast(case, dtype=dtype)
    case = case._replace(bias=case.bias.float())
    shifted = case._replace(bias=case.bias + 65536)
    actual, wanted = evaluate(op, shifted, workspace=workspace), evaluate(op, case, workspace=workspace)
    if op is linear_log_likelihood and hopper.serves(case.hidden, case.weight):
        assert_agree(actual, wanted, 4e-3)  # stored relative to 0 there, so rounding differs
    else:
        assert_equal(actual, wanted)


@both_ops
def test_certain_target(op, device, backend):
    """The gradient 1 - p of a nearly certain token must have full relative precision, for large logits too."""
    vocabulary, gap = 50, 12.0
    weight = torch.zeros(vocabulary, 1)
    weight[7] = gap
    case = Case(torch.ones(1, 1), weight, torch.full((vocabulary,), 3000.0), torch.tensor([7]))
    wanted = truth(case, torch.ones(1))[3][7].item()
    assert wanted == pytest.approx(49 * math.exp(-gap), rel=1e-3)
    actual = evaluate(op, cast(case, device=device), torch.ones(1))[3][7].item()
    assert actual == pytest.approx(wanted, rel=1e-3)
    logits = case.weight[:, 0] + case.bias
    naive = 1 - (logits[7] - logits.logsumexp(0)).exp().item()
    assert naive != pytest.approx(wanted, rel=0.1)  # the naive formula fails here


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
    """A NaN in one row must stay in that row, and the contents of an ignored row must not matter."""
    case = make(6, 8, 200, device=device)
    wanted = truth(case._replace(targets=torch.tensor([1, 2, -100, 3, 4, 5])))
    case.hidden[2] = torch.nan
    actual = op(*case[:2], case.targets, bias=case.bias)
    assert actual.isnan().tolist() == [False, False, True, False, False, False]
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
    """Repeated backward passes of a retained graph give the same gradients, for all leaves or for one."""
    hidden, weight, bias, targets = make(7, 16, 300, device=device, masked=0.3)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    total = op(hidden, weight, targets, bias=bias, workspace=workspace).sum()
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    apart = [torch.autograd.grad(total, leaf, retain_graph=True)[0] for leaf in leaves]
    assert_equal(apart, first)
    assert_equal(torch.autograd.grad(3 * total, leaves, retain_graph=True), torch.autograd.grad(3 * total, leaves))


@both_ops
def test_saved_elsewhere(op, device, backend):
    """Checkpointing, and saved tensors stored in other memory, must change no gradient."""
    case = make(7, 16, 300, device=device, masked=0.3)

    def checkpointed(*args, **options):
        return torch.utils.checkpoint.checkpoint(op, *args, use_reentrant=False, **options)

    wanted = evaluate(op, case)
    assert_equal(evaluate(checkpointed, case), wanted)
    with saved_elsewhere():
        assert_equal(evaluate(op, case), wanted)


@both_ops
def test_two_runs(op, device, backend):
    """Two calls with the same inputs must give the same bits."""
    case = make(65, 33, 1000, device=device, masked=0.3)
    assert_equal(evaluate(op, case, softcap=9.0), evaluate(op, case, softcap=9.0))


@both_ops
@pytest.mark.parametrize("wrong", [-1, 100, -101, 2**40])
def test_target_out_of_range(op, wrong, device, backend, monkeypatch):
    """A target outside the vocabulary is an error on the CPU; the kernels, as on a GPU, give NaN in its row."""
    case = make(4, 8, 100, device=device)
    case.targets[2] = wrong
    if device == "cpu":
        with pytest.raises(ArgumentError, match=rf"must lie in \[0, 100\) or be -100 \(ignored\), got {wrong}: "):
            op(*case[:2], case.targets)
        for module in (op_module, logits_module, _passes):
            monkeypatch.setattr(module, "check_targets", lambda *_: True)
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
    actual = op(case.hidden.reshape(*shape, 8), case.weight, case.targets.reshape(shape).int())
    assert actual.shape == shape
    assert_agree([actual.flatten()], [truth(case._replace(bias=None))[0]], 4e-6)


@both_ops
def test_layouts(op, device, backend):
    """Transposed, sliced and expanded inputs must give the result of contiguous copies."""
    case = make(6, 8, 90, device=device)
    wide = torch.full((12,), 3, device=device)
    wide[::2] = case.targets
    sliced = torch.full((6, 16), torch.nan, device=device)
    sliced[:, ::2] = case.hidden
    shown = Case(sliced[:, ::2], case.weight.T.contiguous().T, case.bias.repeat_interleave(3)[::3], wide[::2])
    assert not any(t.is_contiguous() for t in shown)
    hidden, weight, bias = (
        t.detach().requires_grad_() for t in shown[:3]
    )  # preserves the strides, which clone() would not
    values = op(hidden, weight, shown.targets, bias=bias)
    coefficients = torch.ones((), device=device).expand(6)
    actual = [values.detach(), *torch.autograd.grad(values, (hidden, weight, bias), coefficients)]
    assert_agree(actual, truth(case, torch.ones(6)), 4e-6)

    one = Case(case.hidden[:1].expand(6, 8), case.weight[:1].expand(90, 8), case.bias[:1].expand(90), case.targets)
    assert_agree([op(*one[:2], one.targets, bias=one.bias)], [truth(one)[0]], 4e-6)


@both_ops
def test_second_derivative(op):
    """A gradient of the gradient raises a clear error, instead of being wrong."""
    case = make(3, 4, 10)
    hidden = case.hidden.requires_grad_()
    (gradient,) = torch.autograd.grad(op(hidden, case.weight, case.targets).sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="can be differentiated once, not twice"):
        gradient.sum().backward()


@both_ops
def test_no_graph_without_gradients(op):
    """Without an input that requires a gradient, or under no_grad, the result has no graph."""
    case = make(3, 4, 10)
    assert not op(*case[:2], case.targets).requires_grad
    with torch.no_grad():
        assert not op(case.hidden.requires_grad_(), case.weight, case.targets).requires_grad


# ---------------------------------------------------------------- errors


def broken(**changes):
    """Return valid arguments, overridden by the changes."""
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
    """Each wrong argument raises an error that names it, the requirement and the value."""
    with pytest.raises(ArgumentError, match=sentence):
        linear_log_likelihood(**broken(**changes))


def test_reference_is_the_definition():
    """pyunlearn.ops.reference must agree with PyTorch's cross-entropy."""
    case = make(9, 16, 70, dtype=torch.float64, masked=0.3)
    options = {"bias": case.bias, "logit_scale": 0.5, "softcap": 3.0}
    actual = reference.linear_log_likelihood(*case[:2], case.targets, **options)
    assert_agree([actual], [plain(*case[:2], case.targets, **options)], 1e-12)
