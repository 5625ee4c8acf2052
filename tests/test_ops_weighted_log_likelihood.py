"""weighted_log_likelihood, value and gradients out of one pass, against PyTorch in float64."""

import math
import sys

import pytest
import torch
import torch.utils.checkpoint
from heads import (
    TOLERANCE,
    Allocations,
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
    products,
    saved_elsewhere,
    watch_chunks,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pyunlearn.errors import ArgumentError
from pyunlearn.ops import _backend, linear_log_likelihood, reference, weighted_log_likelihood
from pyunlearn.ops._plan import MIB

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def chunks(monkeypatch):
    """Small cases take chunks too; the list says which."""
    return watch_chunks(monkeypatch, sys.modules["pyunlearn.ops.weighted_log_likelihood"])


def coefficients_of(case):
    """A coefficient for each row, of either sign."""
    return torch.linspace(-1, 2, case.targets.numel(), device=case.targets.device).view(case.targets.shape)


def definition(hidden, weight, targets, coefficients, **options):
    """The definition, in PyTorch alone."""
    return (coefficients * plain(hidden, weight, targets, **options)).sum()


def evaluate(function, case, coefficients=None, *, factor=1.0, **options):
    """[value, gradient of factor * value for hidden, weight and, if there is one, bias]."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in case[:3]]
    coefficients = coefficients_of(case) if coefficients is None else coefficients
    value = function(*leaves[:2], case.targets, coefficients, bias=leaves[2], **options)
    return [value.detach(), *torch.autograd.grad(factor * value, [leaf for leaf in leaves if leaf is not None])]


def truth(case, coefficients=None, **options):
    """What `evaluate` should find, from float64."""
    case = cast(case, dtype=torch.float64, device="cpu")
    return evaluate(definition, case, None if coefficients is None else coefficients.double().cpu(), **options)


def graph(case, trained=(0, 1, 2), **options):
    """The value, and hidden, weight and bias, of which the trained ones want a gradient."""
    leaves = [t.detach().clone().requires_grad_(i in trained) for i, t in enumerate(case[:3])]
    return weighted_log_likelihood(*leaves[:2], case.targets, coefficients_of(case), bias=leaves[2], **options), leaves


# how many rows' logits the workspace holds; None: the default, all of them; 0: none, so that they are made again
HELD = [None, 5, 1, 0]
any_workspace = pytest.mark.parametrize("held", HELD)


def held_by(held, case):
    """The workspace in bytes."""
    return None if held is None else bytes_of(held, case) if held else 0


def expected_chunks(held, live):
    """The most rows in a chunk, and how many chunks."""
    if held is None or held == 0 or held >= live:
        return live, 1
    count = -(-live // held)
    return -(-live // count), count


# ---------------------------------------------------------------- the answer is right


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("logit_scale", [1.0, 0.0625])
@pytest.mark.parametrize("softcap", [None, 2.5])
def test_every_option(dtype, masked, bias, logit_scale, softcap, device, backend, chunks):
    """Value and gradients must agree with float64 for each mix of dtype, mask, bias, scale and softcap, in any number of chunks."""
    case = make(13, 20, 203, dtype=dtype, device=device, bias=bias, masked=masked)
    options = {"logit_scale": logit_scale, "softcap": softcap}
    wanted, live = truth(case, **options), int((case.targets != -100).sum())
    for held in HELD:
        found = evaluate(weighted_log_likelihood, case, workspace=held_by(held, case), **options)
        assert [f.dtype for f in found] == [dtype] * len(wanted)
        assert_agree(found, wanted, TOLERANCE[dtype])
    assert [(max(sizes), len(sizes)) for sizes in chunks] == [expected_chunks(held, live) for held in HELD]


@any_workspace
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(held, dtype, device, backend, chunks):
    """From 16-bit inputs the value must be good to float32 and gradients to their own rounding, in any number of chunks."""
    case = make(60, 4, 3001, dtype=dtype, device=device, masked=0.3)
    found, wanted = evaluate(weighted_log_likelihood, case, workspace=held_by(held, case)), truth(case)
    assert found[0].dtype is torch.float32
    assert [g.dtype for g in found[1:]] == [dtype] * 3
    assert error(found[0], wanted[0]) < 4e-6
    assert_agree(found, wanted, 2 * torch.finfo(dtype).eps)
    # float16 waits for the loss scale
    assert [len(sizes) > 1 for sizes in chunks] == ([bool(held)] if dtype is torch.bfloat16 else [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(252, 507, 123), (40, 64, 3001)])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("held", [0, 7, None])
def test_no_worse_than_pytorch(dtype, shape, softcap, held, device, backend, chunks):
    """Against float64, value and gradients must be no further off than PyTorch's in the same dtype.

    Plus 2e-6 of the summands for the value, which is float32 whatever the dtype. For gradients, plus half the dtype's epsilon, to
    which they are rounded, and 4e-6 for the order of float32 sums, which a product of few rows takes in its own.
    """
    case = make(*shape, dtype=dtype, device=device, masked=0.3)
    coefficients = coefficients_of(case)
    wanted = truth(case, softcap=softcap)
    ours = evaluate(weighted_log_likelihood, case, softcap=softcap, workspace=held_by(held, case))
    theirs = evaluate(definition, case, softcap=softcap)
    summands = (coefficients * plain(case.hidden, case.weight, case.targets, bias=case.bias)).abs().sum().item()
    for at, (found, other, right) in enumerate(zip(ours, theirs, wanted, strict=True)):
        allowed = 4e-6 + torch.finfo(dtype).eps / 2 * right.abs().max().item() if at else 2e-6 * summands
        far = [(x.double().cpu() - right).abs().max().item() for x in (found, other)]
        assert far[0] <= far[1] + allowed, (at, far)


def test_sums_over_chunks_are_not_rounded(device, backend, chunks):
    """bfloat16 gradients summed over 600 chunks must be as good as those of one; sums of 600 like numbers that are rounded each time are not."""
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
    found = evaluate(weighted_log_likelihood, case, softcap=softcap, workspace=workspace)
    wanted = [t.cpu() for t in evaluate(weighted_log_likelihood, case, softcap=softcap)]
    assert_agree(found, wanted, 4e-6)


@any_workspace
def test_gradcheck(held, device, backend, chunks):
    """The gradients must be those that finite differences find in float64, with bias, scale and softcap."""
    case = make(6, 3, 140, dtype=torch.float64, device=device, masked=0.2)
    options = {"logit_scale": 0.5, "softcap": 2.0, "workspace": held_by(held, case)}

    def function(hidden, weight, bias):
        return weighted_log_likelihood(hidden, weight, case.targets, coefficients_of(case), bias=bias, **options)

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in case[:3]], fast_mode=True)


def test_reference_is_the_definition():
    """pyunlearn.ops.reference must say what PyTorch's cross-entropy says."""
    case = make(9, 16, 70, dtype=torch.float64, masked=0.3)
    options = {"logit_scale": 0.5, "softcap": 3.0}
    assert_agree(evaluate(reference.weighted_log_likelihood, case, **options), truth(case, **options), 1e-12)


# ---------------------------------------------------------------- the edges


@any_workspace
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 9])
def test_nothing_scored(held, dtype, rows, device, backend, chunks):
    """No row, or none that counts: 0, connected to the graph, with gradients of zero for everything."""
    case = make(rows, 8, 100, dtype=dtype, device=device, masked=1.0)
    value, *gradients = evaluate(weighted_log_likelihood, case, workspace=held_by(held, case))
    assert value.shape == ()
    assert value == 0
    assert [g.shape for g in gradients] == [t.shape for t in case[:3]]
    assert not any(g.any() for g in gradients)


@any_workspace
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_an_ignored_row_holds(held, dtype, device, backend, chunks):
    """NaN and infinity in ignored rows, hidden states and coefficients alike, must not matter, and their gradient is 0."""
    case = make(12, 8, 200, dtype=dtype, device=device)
    case.targets[[0, 2, 5, 11]] = -100
    wanted = truth(case)
    coefficients = coefficients_of(case)
    case.hidden[[0, 2]], case.hidden[[5, 11]] = torch.nan, torch.inf
    coefficients[[0, 5]], coefficients[[2, 11]] = torch.nan, torch.inf
    found = evaluate(weighted_log_likelihood, case, coefficients, workspace=held_by(held, case))
    assert_agree(found, wanted, TOLERANCE.get(dtype, 2 * torch.finfo(dtype).eps))


@pytest.mark.parametrize("shape", [(), (12,), (3, 4), (2, 3, 2), (2, 0)])
@pytest.mark.parametrize("held", [0, 2])
def test_leading_dimensions(shape, held, device, backend, chunks):
    """Hidden states, targets (int32 ones too) and coefficients of any leading shape must count row by row."""
    case = make(math.prod(shape), 8, 90, device=device, masked=0.2)
    shaped = Case(case.hidden.reshape(*shape, 8), *case[1:3], case.targets.reshape(shape).int())
    found = evaluate(weighted_log_likelihood, shaped, workspace=held_by(held, case))
    assert found[1].shape == (*shape, 8)
    found[1] = found[1].reshape(-1, 8)
    assert_agree(found, truth(case), 4e-6)


def test_layouts(device, backend, chunks):
    """Transposed, sliced and expanded inputs must count as the numbers they show."""
    case = make(6, 8, 90, device=device)
    sliced = torch.full((6, 16), torch.nan, device=device)
    sliced[:, ::2] = case.hidden
    targets = case.targets.repeat_interleave(2)[::2]
    shown = (sliced[:, ::2], case.weight.T.contiguous().T, case.bias.repeat_interleave(3)[::3])
    leaves = [t.detach().requires_grad_() for t in shown]  # keeps the strides, which clone() mends
    assert not any(t.is_contiguous() for t in (*leaves, targets))
    coefficients = torch.ones((), device=device).expand(6)
    for workspace in (0, bytes_of(2, case)):
        value = weighted_log_likelihood(*leaves[:2], targets, coefficients, bias=leaves[2], workspace=workspace)
        found = [value.detach(), *torch.autograd.grad(value, leaves)]
        assert_agree(found, truth(case, torch.ones(6)), 4e-6)
    assert [len(sizes) for sizes in chunks] == [1, 3]


def test_ignore_index(device, backend):
    """Any number can mean "ignored", a token's own id too; then -100 is out of range."""
    case = make(6, 8, 50, device=device)
    case.targets[1] = 0
    found = evaluate(weighted_log_likelihood, case, ignore_index=0)
    assert_agree(found, truth(case, ignore_index=0), 4e-6)
    if device == "cpu":
        with pytest.raises(ArgumentError, match=r"or be 0 \(ignored\), got -100"):
            weighted_log_likelihood(*case[:2], case.targets.fill_(-100), coefficients_of(case), ignore_index=0)


@any_workspace
def test_two_runs(held, device, backend, chunks):
    """The same inputs must give the same bits again."""
    case = make(65, 33, 1000, device=device, masked=0.3)
    first, second = (evaluate(weighted_log_likelihood, case, workspace=held_by(held, case)) for _ in range(2))
    assert_equal(second, first)


def test_mixed_dtypes(device, backend, chunks):
    """Hidden states, head, bias and coefficients of different dtypes meet in the widest; each gradient comes back in its own."""
    case = make(9, 16, 200, device=device)
    mixed = Case(case.hidden.bfloat16(), case.weight, case.bias.half(), case.targets)
    coefficients = coefficients_of(case).bfloat16()
    for workspace in (None, bytes_of(2, case)):
        found = evaluate(weighted_log_likelihood, mixed, coefficients, workspace=workspace)
        assert [g.dtype for g in found] == [torch.float32, torch.bfloat16, torch.float32, torch.float16]
        assert_agree(found, truth(mixed, coefficients), 5e-3)
        assert error(found[0], truth(mixed, coefficients)[0]) < 4e-6
    assert [len(sizes) for sizes in chunks] == [1, 5]


def test_autocast(device, backend):
    """Under autocast the product takes 16-bit operands, and gradients come back in the parameters' own dtype."""
    case = make(9, 16, 200, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = evaluate(weighted_log_likelihood, case)
        wide = evaluate(weighted_log_likelihood, cast(case, dtype=torch.float64))
    rounded = Case(case.hidden.bfloat16(), case.weight.bfloat16(), case.bias, case.targets)
    assert [g.dtype for g in found] == [torch.float32] * 4
    assert error(found[0], truth(rounded)[0]) < 4e-6
    assert_agree(found, truth(rounded), 1e-2)
    assert wide[0].dtype is torch.float64
    assert_agree(wide, truth(case), 1e-12)


# ---------------------------------------------------------------- forward and backward


@any_workspace
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_second_backward(held, dtype, device, backend, chunks):
    """Backward again and again over a retained graph must give the same bits, whatever factor came before, asked for together or apart."""
    case = make(11, 16, 3001, dtype=dtype, device=device, masked=0.3)
    value, leaves = graph(case, workspace=held_by(held, case))
    first = torch.autograd.grad(4 * value, leaves, retain_graph=True)
    for _ in range(2):
        assert_equal(torch.autograd.grad(4 * value, leaves, retain_graph=True), first)
    one = torch.autograd.grad(value, leaves, retain_graph=True)
    apart = [torch.autograd.grad(value, leaf, retain_graph=True)[0] for leaf in leaves]
    assert_equal(apart, one)
    if dtype is not torch.float16:  # whose smallest gradients lose digits that four times as large ones keep
        assert_equal([4 * g for g in one], first)


@any_workspace
def test_gradients_are_given_away(held, device, backend, chunks):
    """A later backward pass of the same graph must not write into the gradients of an earlier one."""
    case = make(11, 16, 300, device=device, masked=0.3)
    value, leaves = graph(case, workspace=held_by(held, case))
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    copies = [g.clone() for g in first]
    second = torch.autograd.grad(-7 * value, leaves)
    assert_equal(first, copies)
    assert not {g.data_ptr() for g in first} & {g.data_ptr() for g in second}


@any_workspace
def test_accumulation(held, device, backend, chunks):
    """.grad must add up over backward passes of one graph, and over graphs."""
    case = make(11, 16, 300, device=device, masked=0.3)
    wanted = truth(case)[1:]
    value, leaves = graph(case, workspace=held_by(held, case))
    value.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves]
    value.backward()
    assert_equal([leaf.grad for leaf in leaves], [g + g for g in once])
    again = weighted_log_likelihood(
        *leaves[:2], case.targets, coefficients_of(case), bias=leaves[2], workspace=held_by(held, case)
    )
    again.backward()
    assert_agree([leaf.grad for leaf in leaves], [3 * g for g in wanted], 4e-6)


@any_workspace
@pytest.mark.parametrize("factor", [0.0, -0.5, 3.0])
def test_upstream_factor(held, factor, device, backend, chunks):
    """What the value is multiplied with must multiply the gradient, and leave the value."""
    case = make(11, 16, 300, device=device, masked=0.3)
    found = evaluate(weighted_log_likelihood, case, factor=factor, workspace=held_by(held, case))
    value, *gradients = truth(case)
    assert_agree(found, [value, *(factor * g for g in gradients)], 4e-6)


@pytest.mark.parametrize(("factor", "wanted"), [(1.0, 0), (2.0, 1)])
def test_a_factor_of_1_moves_nothing(factor, wanted):
    """loss.backward() takes the gradients as they lie, without another read and write of the weight's."""
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


@any_workspace
@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_frozen(held, trained, device, backend, chunks):
    """Hidden states, head and bias each get their gradient if they ask for it, whatever else is frozen."""
    case = make(7, 16, 300, device=device, masked=0.3)
    wanted = truth(case)[1:]
    value, leaves = graph(case, trained, workspace=held_by(held, case))
    value.backward()
    assert [i for i, leaf in enumerate(leaves) if leaf.grad is not None] == list(trained)
    assert_agree([leaves[i].grad for i in trained], [wanted[i] for i in trained], 4e-6)


def test_saved_elsewhere(device, backend, chunks):
    """Checkpointing, and saved tensors kept elsewhere, must change no gradient."""
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
    """A head changed in place between forward and backward is refused, as everywhere in PyTorch."""
    value, (_, weight, _) = graph(make(3, 4, 10))
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_second_derivative():
    """A gradient of the gradient is refused in words, not left out of a sum."""
    value, (hidden, _, _) = graph(make(3, 4, 10))
    (gradient,) = torch.autograd.grad(value, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        (gradient.square().sum() + hidden.square().sum()).backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@any_workspace
def test_no_graph_without_gradients(mode, held, device, backend, chunks):
    """Without an input that wants a gradient, or where none is recorded, the value has no graph and costs one product."""
    case = make(8, 4, 300, device=device, masked=0.3)
    wanted, found = truth(case)[:1], []

    def constant():
        found.append(
            weighted_log_likelihood(
                *case[:2], case.targets, coefficients_of(case), bias=case.bias, workspace=held_by(held, case)
            )
        )

    def unrecorded():
        with mode():
            found.append(graph(case, workspace=held_by(held, case))[0])

    assert [products(case, constant), products(case, unrecorded)] == [1, 1]
    assert not any(value.requires_grad for value in found)
    for value in found:
        assert_agree([value], wanted, 4e-6)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic, device):
    """torch.compile(fullgraph=True) must take it without a break and give the eager answer to rounding, at every shape."""
    torch._dynamo.reset()

    def function(hidden, weight, targets, coefficients, bias):
        return weighted_log_likelihood(hidden, weight, targets, coefficients, bias=bias, softcap=4.0)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (6, 9) if dynamic else (6,):
        case = make(rows, 8, 200, device=device, masked=0.3)
        assert_agree(evaluate(compiled, case), [t.cpu() for t in evaluate(function, case)], 4e-6)


# ---------------------------------------------------------------- what it costs


@pytest.mark.parametrize(("dtype", "vocabulary"), [(torch.float32, 203), (torch.bfloat16, 1501)])
@pytest.mark.parametrize(("trained", "wanted"), [((0, 1, 2), 3), ((1,), 2), ((0, 2), 2), ((2,), 1)])
def test_products(dtype, vocabulary, trained, wanted, device, backend, chunks):
    """Three products are enough, two without the head's gradient or the trunk's, in a workspace of few rows as in a large one.

    In one of none, there is one more.
    """
    case = make(90, 4, vocabulary, dtype=dtype, device=device, masked=0.3)
    found = [
        products(case, lambda workspace=workspace: graph(case, trained, workspace=workspace)[0].backward())
        for workspace in (None, bytes_of(3, case), 0)
    ]
    assert found == [wanted, wanted, wanted + 1]
    assert [len(sizes) > 1 for sizes in chunks] == [False, True, False]


def test_chunks_where_they_pay(device, backend, monkeypatch):
    """Unprompted, rows are cut into chunks where a few hundred fit, and made again where only a few do."""
    seen = []
    module = sys.modules["pyunlearn.ops.weighted_log_likelihood"]
    original = module.one_pass
    monkeypatch.setattr(module, "one_pass", lambda work, *head: seen.append(len(work.chunks)) or original(work, *head))
    case = make(4096, 4, 256, device=device, bias=False)
    wanted = truth(case)
    for held in (1024, 8):
        found = evaluate(weighted_log_likelihood, case, workspace=bytes_of(held, case))
        assert_agree(found, wanted, 1e-5)
    assert seen == [4, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace", [MIB, 4 * MIB])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("cut", [True, False])
def test_memory(dtype, workspace, trained, cut, device, request):
    """Beyond the gradients, a call must take its workspace and a few numbers a row, and never N * V of anything.

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
    answers = sum(t.numel() * (t.element_size() + 4) for t in case[:3]) if trained else 0  # and the float32 behind them
    per_row = rows * 4 * (16 + (vocabulary // 64 if trained else 0) + width) + MIB // 4
    temporaries = (
        workspace if _backend.kernels_for(case.hidden) == "reference" else 0
    )  # plain torch makes copies of a block
    allowed = workspace if trained else workspace // 4
    assert workspace // 8 < used.peak <= allowed + temporaries + answers + per_row
    assert used.largest <= workspace
    assert (len(chunks[0]) > 1) == cut


# ---------------------------------------------------------------- errors


def broken(**changes):
    """Valid arguments but for the changes."""
    case = make(3, 4, 10)
    valid = {"hidden": case.hidden, "weight": case.weight, "targets": case.targets, "coefficients": torch.ones(3)}
    return valid | changes


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"coefficients": torch.ones(3, requires_grad=True)},
            r"coefficients must be constants here, .*: pass coefficients\.detach\(\), or multiply linear_log_likelihood",
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
    """Each wrong argument is named with what was wanted and what came, on both ways through."""
    given = broken(**changes)
    if given["hidden"].is_floating_point():
        given |= {"hidden": given["hidden"].to(dtype), "weight": given["weight"].to(dtype)}
    with pytest.raises(ArgumentError, match=sentence):
        weighted_log_likelihood(**given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_as_the_rows_of_linear_log_likelihood(dtype, device, backend, chunks):
    """One row with coefficient 1 must have the value that linear_log_likelihood gives it."""
    case = make(5, 16, 300, dtype=dtype, device=device, masked=0.3)
    rows = linear_log_likelihood(*case[:2], case.targets, bias=case.bias)
    for n in range(5):
        coefficients = torch.zeros(5, device=device).index_fill(0, torch.tensor(n, device=device), 1.0)
        value = weighted_log_likelihood(*case[:2], case.targets, coefficients, bias=case.bias, workspace=3000)
        assert_agree([value], [rows[n].cpu()], 2e-6)
