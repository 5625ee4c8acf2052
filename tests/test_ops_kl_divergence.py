"""kl_divergence, value and gradients, against its definition in float64."""

import itertools
import math

import pytest
import torch
from coverings import BACKENDS, grid
from heads import (
    Case,
    assert_agree,
    assert_equal,
    cast,
    saved_elsewhere,
)
from hypothesis import given
from hypothesis import strategies as st
from kl_cases import (
    DTYPES,
    assert_right,
    coefficients_of,
    definition,
    evaluate,
    graph,
    pair,
    truth,
)

from pyunlearn.ops import kl_divergence, linear_log_likelihood, reference

pytestmark = pytest.mark.usefixtures("poisoned")


# ---------------------------------------------------------------- values and gradients


@grid(dtype=DTYPES, vocabulary=[1, 2, 123, 3001], backend=BACKENDS)
def test_every_shape(dtype, vocabulary, device, backend):
    """Values and gradients must agree with float64 for any vocabulary and any two widths."""
    for widths in ((1, 1), (64, 20), (5, 123)):
        assert_right(*pair(5, widths, vocabulary, dtype=dtype, device=device))


def test_large_vocabulary(device, backend):
    """Hundreds of blocks must add up to the result of one."""
    assert_right(*pair(3, (8, 5), 50257, device=device))


@grid(
    {"dtype": torch.bfloat16, "masked": 0.6, "target_shift": math.inf, "backend": "compiled"},
    dtype=DTYPES,
    masked=[0.0, 0.6, 1.0],
    target_shift=[0.0, 2.0, math.inf],
    backend=BACKENDS,
)
def test_every_option(dtype, masked, target_shift, device, backend):
    """Values, 0 in ignored rows, and gradients must agree with float64 for each mix of options."""
    model, other = pair(13, (20, 7), 203, dtype=dtype, device=device, masked=masked)
    for mine, theirs, logit_scale, softcap in itertools.product([0, 1], [0, 1], [1.0, 0.0625], [None, 2.5]):
        both = model._replace(bias=model.bias if mine else None), other._replace(bias=other.bias if theirs else None)
        options = {"logit_scale": logit_scale, "softcap": softcap, "target_shift": target_shift}
        assert_right(*both, workspaces=(9000,), **options)


def test_without_targets(device, backend):
    """Without targets every row counts."""
    model, other = pair(7, (8, 5), 150, device=device, masked=0.5)
    assert_right(model, other, marked=False)


def test_adapter(device, backend):
    """Without a head of its own, the reference uses the model's, as a constant."""
    model, other = pair(7, (8, 8), 150, device=device, masked=0.3)
    assert_right(model, other, adapter=True, target_shift=2.0)
    actual = kl_divergence(*model[:2], other.hidden, bias=model.bias, reference_bias=other.bias)
    assert_equal(
        [actual], [kl_divergence(*model[:2], other.hidden, model.weight, bias=model.bias, reference_bias=other.bias)]
    )


@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 400), st.integers(0, 2**31)),
    workspace=st.integers(0, 40_000),
    target_shift=st.sampled_from([0.0, 3.0]),
)
def test_workspace_changes_nothing(shape, workspace, target_shift, device, backend):
    """Values and gradients are the same for any number of bytes allowed."""
    rows, width, vocabulary, seed = shape
    both = pair(rows, (width, 4), vocabulary, device=device, masked=0.2, seed=seed)
    actual, wanted = (evaluate(kl_divergence, *both, target_shift=target_shift, workspace=w) for w in (workspace, None))
    assert_agree(actual, [t.cpu() for t in wanted], 4e-6)


@grid(
    {"dtype": torch.bfloat16, "shape": (40, 3001), "softcap": 5.0, "backend": "compiled"},
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    shape=[(252, 123), (40, 3001)],
    softcap=[None, 5.0],
    backend=BACKENDS,
)
def test_no_worse_than_pytorch(dtype, shape, softcap, device, backend):
    """Against float64, values and gradients must be no further off than PyTorch's in the same dtype.

    Added to the tolerance: 2e-6, and of the largest number two float32 roundings for values, and half the dtype's
    epsilon, to which they are rounded, for gradients.
    """
    both = pair(shape[0], (507, 64), shape[1], dtype=dtype, device=device, masked=0.3)
    wanted, theirs = truth(*both, softcap=softcap), evaluate(definition, *both, softcap=softcap)
    for workspace in (0, None):
        ours = evaluate(kl_divergence, *both, softcap=softcap, workspace=workspace)
        for at, (actual, other, right) in enumerate(zip(ours, theirs, wanted, strict=True)):
            far = [(x.double().cpu() - right).abs().max().item() for x in (actual, other)]
            eps = torch.finfo(dtype).eps / 2 if at else 2 * torch.finfo(torch.float32).eps
            allowed = 2e-6 + eps * right.abs().max().item()
            assert far[0] <= far[1] + allowed, (at, far)


def test_mixed_dtypes(device, backend):
    """Model and reference may differ in dtype; the answer is float32, or float64 where the model is."""
    for mine, theirs in itertools.permutations(DTYPES, 2):
        assert_right(*pair(9, (16, 8), 200, dtype=mine, theirs=theirs, device=device, masked=0.3), target_shift=1.0)
    model, other = pair(9, (16, 8), 200, device=device)
    mixed = Case(model.hidden.bfloat16(), model.weight, model.bias.half(), model.targets)
    actual, wanted = evaluate(kl_divergence, mixed, other), truth(mixed, other)
    assert [f.dtype for f in actual] == [torch.float32, torch.bfloat16, torch.float32, torch.float16]
    assert_agree(actual[:1], wanted[:1], 4e-6)
    assert_agree(actual, wanted, 1e-2)


def test_gradcheck(device, backend):
    """The gradients must agree with finite differences in float64, with every option."""
    model, other = pair(4, (3, 5), 140, dtype=torch.float64, device=device, masked=0.2)
    for target_shift, workspace in itertools.product([0.0, 2.0, math.inf], [0, None]):

        def function(hidden, weight, bias, target_shift=target_shift, workspace=workspace):
            return kl_divergence(
                hidden,
                weight,
                other.hidden,
                other.weight,
                model.targets,
                bias=bias,
                reference_bias=other.bias,
                logit_scale=0.5,
                softcap=2.0,
                target_shift=target_shift,
                workspace=workspace,
            )

        assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in model[:3]], fast_mode=True)


def test_reference_is_the_definition():
    """pyunlearn.ops.reference must agree with torch.distributions."""
    model, other = pair(6, (8, 5), 40, dtype=torch.float64)
    z, y = (c.hidden @ c.weight.T for c in (model, other))
    p, q = (torch.distributions.Categorical(logits=x) for x in (z, y))
    assert_agree([reference.kl_divergence_of(z, y)], [torch.distributions.kl_divergence(q, p)], 1e-12)


# ---------------------------------------------------------------- meaning


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_nothing_between_equals(dtype, softcap, device, backend):
    """The divergence of a model from itself is 0, with gradients of 0, in any workspace."""
    model, _ = pair(7, (16, 16), 500, dtype=dtype, device=device, masked=0.3)
    for workspace in (0, None):
        values, *gradients = evaluate(kl_divergence, model, model, softcap=softcap, workspace=workspace)
        assert values.abs().max() <= 1e-6
        assert all(g.abs().max() <= 1e-6 for g in gradients)


@pytest.mark.parametrize("workspace", [0, None])
def test_leaving_the_target_out(workspace, device, backend):
    """The divergence from the model itself without the target (CE-U) is -log(1 - p[target]), gradients included."""
    model, _ = pair(9, (16, 16), 300, device=device, masked=0.3)
    actual = evaluate(kl_divergence, model, model, adapter=True, target_shift=math.inf, workspace=workspace)

    def wanted(hidden, weight, _hidden, _weight, targets, *, bias, reference_bias):
        values = linear_log_likelihood(hidden, weight, targets, bias=bias)
        return torch.where(targets == -100, 0, -torch.log1p(-torch.exp(values.clamp(max=-1e-9))))

    exact = cast(model, dtype=torch.float64, device="cpu")
    assert_agree(actual, evaluate(wanted, exact, exact), 4e-6)


@pytest.mark.parametrize("offsets", [(1e4, 1e4), (-1e4, 1e4), (0.0, -1e4)])
@pytest.mark.parametrize("workspace", [0, None])
def test_common_offset(offsets, workspace, device, backend):
    """A constant on all logits of either side, where adding it is exact, changes no bit."""
    both = [
        Case(*((t.clamp(-2, 2) * 8).round() / 8 for t in c[:3]), c.targets)  # so that products are exact too
        for c in pair(6, (16, 8), 500, device=device)
    ]
    wanted = evaluate(kl_divergence, *both, target_shift=1.0, workspace=workspace)
    moved = [c._replace(bias=c.bias + offset) for c, offset in zip(both, offsets, strict=True)]
    assert_equal(evaluate(kl_divergence, *moved, target_shift=1.0, workspace=workspace), wanted)


@pytest.mark.parametrize("workspace", [0, None])
@pytest.mark.parametrize("adapter", [False, True])
def test_impossible_tokens(workspace, adapter, device, backend):
    """Tokens and whole blocks that the reference rules out add 0: no NaN, no infinity where the model does so too."""
    model, other = pair(6, (8, 8), 500, device=device, masked=0.2)
    bias = other.bias
    bias[:130], bias[200:330], bias[499] = -torch.inf, -torch.inf, -torch.inf
    model.bias[20:70], model.bias[256:320] = -torch.inf, -torch.inf
    if adapter:
        other, model = other._replace(bias=None), model._replace(bias=bias)
    assert_right(model, other, adapter=adapter, workspaces=(workspace,))


@pytest.mark.parametrize("workspace", [0, None])
@pytest.mark.parametrize("ruled_out", [slice(3, 4), slice(0, 128), slice(440, 500)])
def test_infinite(workspace, ruled_out, device, backend):
    """A token that the model rules out and the reference does not makes KL infinite, with a finite gradient."""
    model, other = pair(4, (8, 5), 500, device=device)
    model.bias[ruled_out] = -torch.inf
    actual = evaluate(kl_divergence, model, other, workspace=workspace)
    assert (actual[0] == torch.inf).all()
    assert_agree(actual[1:], truth(model, other)[1:], 4e-6)


@pytest.mark.parametrize("workspace", [0, None])
@pytest.mark.parametrize("step", [300.0, 2000.0])
def test_mass_that_vanishes(workspace, step, device, backend):
    """A ruled-out token whose reference mass vanishes next to a later token gives no NaN."""
    weight, reference_weight, bias = torch.zeros(200, 1), torch.zeros(200, 1), torch.zeros(200)
    reference_weight[150], bias[3] = step, -torch.inf
    hidden = torch.ones(1, 1, device=device)
    actual = kl_divergence(
        hidden, weight.to(device), hidden, reference_weight.to(device), bias=bias.to(device), workspace=workspace
    )
    assert not actual.isnan().any()


def test_rows_are_apart(device, backend):
    """A NaN in a row of either side must stay in that row, and the contents of ignored rows must not matter."""
    model, other = pair(6, (8, 5), 200, device=device)
    model.hidden[2], other.hidden[4] = torch.nan, torch.nan
    values, _ = graph(kl_divergence, model, other)
    assert values.isnan().tolist() == [False, False, True, False, True, False]
    model.targets[[2, 4]] = -100
    clean = [c._replace(hidden=c.hidden.nan_to_num(1.0)) for c in (model, other)]
    assert_agree(evaluate(kl_divergence, model, other), truth(*clean), 4e-6)


@pytest.mark.parametrize("workspace", [0, None])
def test_a_row_without_a_coefficient_leaves_no_nan_in_the_gradients(device, backend, workspace):
    """With any numbers on either side: 0 * NaN would be NaN in the weight's gradient, for all."""
    model, other = pair(6, (8, 5), 200, device=device)
    coefficients = torch.tensor([0.5, -1.0, 0.0, 2.0, 0.0, 1.0], device=device)
    wanted = torch.autograd.grad(*graph(kl_divergence, model, other, workspace=workspace), coefficients)
    model.hidden[2], other.hidden[4] = torch.nan, torch.nan
    actual = torch.autograd.grad(*graph(kl_divergence, model, other, workspace=workspace), coefficients)
    assert_agree(actual, wanted, 1e-6)


# ---------------------------------------------------------------- the edges


@pytest.mark.parametrize("shape", [(), (12,), (3, 4), (2, 3, 2), (2, 0), (0,)])
def test_leading_dimensions(shape, device, backend):
    """Rows of any shape, none at all too, come back in that shape, and gradients in theirs."""
    model, other = pair(math.prod(shape), (8, 5), 90, device=device, masked=0.2)
    shaped = [
        c._replace(hidden=c.hidden.reshape(*shape, -1 if math.prod(shape) else c.hidden.shape[1]))
        for c in (model, other)
    ]
    shaped[0] = shaped[0]._replace(targets=model.targets.reshape(shape).int())
    actual, wanted = evaluate(kl_divergence, *shaped), truth(model, other)
    assert (actual[0].shape, actual[1].shape) == (shape, (*shape, 8))
    assert_agree([actual[0].flatten(), actual[1].reshape(-1, 8), *actual[2:]], wanted, 4e-6)


def test_ignore_index(device, backend):
    """Any number can mean "ignored", a token's own id too."""
    model, other = pair(6, (8, 5), 50, device=device)
    model.targets[1] = 0
    actual = evaluate(kl_divergence, model, other, ignore_index=0)
    model.targets[model.targets == 0] = -100
    assert_agree(actual, truth(model, other), 4e-6)


@pytest.mark.parametrize("workspace", [0, 30_000, None])
def test_second_backward(workspace, device, backend):
    """Repeated backward passes of a retained graph, and another run, give the same bits, for all leaves or for one."""
    both = pair(11, (16, 8), 900, device=device, masked=0.3)
    values, leaves = graph(kl_divergence, *both, target_shift=2.0, workspace=workspace)
    first = torch.autograd.grad(values.sum(), leaves, retain_graph=True)
    copies = [g.clone() for g in first]
    apart = [torch.autograd.grad(values.sum(), leaf, retain_graph=True)[0] for leaf in leaves]
    assert_equal(apart, copies)
    assert_equal(torch.autograd.grad(2 * values.sum(), leaves), [2 * g for g in copies])
    assert_equal(first, copies)
    values, leaves = graph(kl_divergence, *both, target_shift=2.0, workspace=workspace)
    assert_equal(torch.autograd.grad(values.sum(), leaves), copies)


@pytest.mark.parametrize("workspace", [0, 30_000, None])
@pytest.mark.parametrize("itself", [False, True])
def test_saved_elsewhere(itself, workspace, device, backend):
    """Saved tensors stored in other memory must change no gradient, also where the model is its own reference."""
    model, other = pair(11, (16, 8), 900, device=device, masked=0.3)

    def gradients():
        leaves = [t.clone().requires_grad_() for t in model[:3]]
        theirs = [t.detach() for t in leaves] if itself else other[:3]
        values = kl_divergence(
            *leaves[:2],
            *theirs[:2],
            model.targets,
            bias=leaves[2],
            reference_bias=theirs[2],
            target_shift=2.0,
            workspace=workspace,
        )
        return torch.autograd.grad(values, leaves, coefficients_of(values))

    wanted = gradients()
    with saved_elsewhere():
        assert_equal(gradients(), wanted)


def test_second_derivative():
    """A gradient of the gradient raises a clear error."""
    values, (hidden, *_) = graph(kl_divergence, *pair(3, (4, 5), 10))
    (gradient,) = torch.autograd.grad(values.sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="twice"):
        gradient.sum().backward()


def test_the_reference_is_constant(device, backend):
    """The reference never gets a gradient, and under no_grad, or if the model is constant, there is no graph."""
    model, other = pair(5, (8, 8), 90, device=device)
    theirs = [t.requires_grad_() for t in other[:3]]
    task = (theirs[0], theirs[1], model.targets)
    assert not kl_divergence(*model[:2], *task, reference_bias=theirs[2]).requires_grad
    assert not kl_divergence(*model[:2], theirs[0]).requires_grad
    hidden = model.hidden.clone().requires_grad_()
    kl_divergence(hidden, model.weight, *task, reference_bias=theirs[2]).sum().backward()
    assert hidden.grad is not None
    assert all(t.grad is None for t in theirs)
    with torch.no_grad():
        assert not kl_divergence(hidden, model.weight, *task).requires_grad
