"""kl_divergence, value and gradients, against its definition in float64."""

import itertools
import math
import sys

import pytest
import torch
from heads import (
    Allocations,
    Case,
    assert_agree,
    assert_equal,
    cast,
    elsewhere,
    ids,
    make,
    on_gpu,
    products,
    saved_elsewhere,
)
from hypothesis import given
from hypothesis import strategies as st

from pyunlearn.errors import ArgumentError
from pyunlearn.ops import _backend, _passes, kl_divergence, linear_log_likelihood, reference
from pyunlearn.ops._check import NOTHING
from pyunlearn.ops._plan import MIB

pytestmark = pytest.mark.usefixtures("poisoned")
op_module = sys.modules["pyunlearn.ops.kl_divergence"]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def pair(rows, widths, vocabulary, *, theirs=None, **options):
    """(model, reference): cases of one vocabulary; the targets that count are the model's. theirs: the reference's dtype."""
    model = make(rows, widths[0], vocabulary, **options)
    other = make(rows, widths[1], vocabulary, **options | {"seed": options.get("seed", 0) + 1})
    return model, other if theirs is None else cast(other, dtype=theirs)


def logits_of(hidden, weight, bias, logit_scale, softcap):
    """The logits, in whole, in their own dtype."""
    z = hidden @ weight.T
    z = (z if bias is None else z + bias) * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def definition(
    hidden, weight, reference_hidden, reference_weight=None, targets=None, *, bias=None, reference_bias=None, logit_scale=1.0,
    softcap=None, target_shift=0.0, workspace=None,
):  # fmt: skip
    """The definition, in PyTorch alone; 16-bit logits are compared in float32, as everybody does."""
    if reference_weight is None:
        reference_weight, reference_bias = weight, bias if reference_bias is None else reference_bias
    z = logits_of(hidden, weight, bias, logit_scale, softcap)
    y = logits_of(reference_hidden, reference_weight, reference_bias, logit_scale, softcap).detach()
    z, y = (x if x.dtype.itemsize > 2 else x.float() for x in (z, y))
    if targets is None:
        return reference.kl_divergence_of(z, y)
    rows = (targets != -100).nonzero().squeeze(1)
    if target_shift:
        y[rows, targets[rows]] -= target_shift
    return z.new_zeros(len(z)).index_add(0, rows, reference.kl_divergence_of(z[rows], y[rows]))


def coefficients_of(values):
    """A coefficient for each row, of either sign."""
    return torch.linspace(-1, 2, values.numel(), device=values.device).view(values.shape).to(values)


def graph(function, model, other, trained=(0, 1, 2), *, adapter=False, marked=True, **options):
    """The values, and hidden, weight and, if there is one, bias, of which the trained ones want a gradient."""
    leaves = [None if t is None else t.detach().clone().requires_grad_(i in trained) for i, t in enumerate(model[:3])]
    head = (None, None) if adapter else (other.weight, other.bias)
    values = function(
        *leaves[:2], other.hidden, head[0], model.targets if marked else None, bias=leaves[2], reference_bias=head[1], **options
    )  # fmt: skip
    return values, [leaf for leaf in leaves if leaf is not None]


def evaluate(function, model, other, **options):
    """[values, gradient of a weighted sum of them for hidden, weight and, if there is one, bias]."""
    values, leaves = graph(function, model, other, **options)
    return [values.detach(), *torch.autograd.grad(values, leaves, coefficients_of(values))]


def truth(model, other, **options):
    """What `evaluate` should find, from float64."""
    return evaluate(definition, *(cast(c, dtype=torch.float64, device="cpu") for c in (model, other)), **options)


def assert_right(model, other, *, workspaces=(0, None), **options):
    """In any workspace, values are float64's to float32 and gradients to their own rounding."""
    wanted = truth(model, other, **options)
    eps = torch.finfo(model.hidden.dtype).eps
    real = torch.float64 if model.hidden.dtype is torch.float64 else torch.float32
    for workspace in workspaces:
        found = evaluate(kl_divergence, model, other, workspace=workspace, **options)
        assert [f.dtype for f in found] == [real, *(t.dtype for t in model[:3] if t is not None)]
        assert_agree(found[:1], wanted[:1], max(64 * torch.finfo(real).eps, 1e-11 if real is torch.float64 else 4e-6))
        assert_agree(found, wanted, 4 * eps if eps > 1e-6 else 4e-6 if real is torch.float32 else 1e-11)


# ---------------------------------------------------------------- the answer is right


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 2, 123, 3001])
def test_every_shape(dtype, vocabulary, device, backend):
    """Values and gradients must agree with float64 for any vocabulary and any two widths."""
    for widths in ((1, 1), (64, 20), (5, 123)):
        assert_right(*pair(5, widths, vocabulary, dtype=dtype, device=device))


def test_large_vocabulary(device, backend):
    """Hundreds of blocks must add up to what one gives."""
    assert_right(*pair(3, (8, 5), 50257, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("target_shift", [0.0, 2.0, math.inf])
def test_every_option(dtype, masked, target_shift, device, backend):
    """Values and gradients must agree with float64 for each mix of dtype, mask, shift, biases, scale and softcap; 0 in ignored rows."""
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
    """Without a head of its own, the reference has the model's, which it holds constant."""
    model, other = pair(7, (8, 8), 150, device=device, masked=0.3)
    assert_right(model, other, adapter=True, target_shift=2.0)
    found = kl_divergence(*model[:2], other.hidden, bias=model.bias, reference_bias=other.bias)
    assert_equal(
        [found], [kl_divergence(*model[:2], other.hidden, model.weight, bias=model.bias, reference_bias=other.bias)]
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
    found, wanted = (evaluate(kl_divergence, *both, target_shift=target_shift, workspace=w) for w in (workspace, None))
    assert_agree(found, [t.cpu() for t in wanted], 4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(252, 123), (40, 3001)])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_no_worse_than_pytorch(dtype, shape, softcap, device, backend):
    """Against float64, values must be no further off than PyTorch's in the same dtype plus 2e-6 and two float32 roundings of the largest.

    Gradients plus 2e-6 and half the dtype's epsilon of the largest, to which they are rounded.
    """
    both = pair(shape[0], (507, 64), shape[1], dtype=dtype, device=device, masked=0.3)
    wanted, theirs = truth(*both, softcap=softcap), evaluate(definition, *both, softcap=softcap)
    for workspace in (0, None):
        ours = evaluate(kl_divergence, *both, softcap=softcap, workspace=workspace)
        for at, (found, other, right) in enumerate(zip(ours, theirs, wanted, strict=True)):
            far = [(x.double().cpu() - right).abs().max().item() for x in (found, other)]
            eps = torch.finfo(dtype).eps / 2 if at else 2 * torch.finfo(torch.float32).eps
            allowed = 2e-6 + eps * right.abs().max().item()
            assert far[0] <= far[1] + allowed, (at, far)


def test_mixed_dtypes(device, backend):
    """Model and reference may differ in dtype; the answer is float32, or float64 where the model is."""
    for mine, theirs in itertools.permutations(DTYPES, 2):
        assert_right(*pair(9, (16, 8), 200, dtype=mine, theirs=theirs, device=device, masked=0.3), target_shift=1.0)
    model, other = pair(9, (16, 8), 200, device=device)
    mixed = Case(model.hidden.bfloat16(), model.weight, model.bias.half(), model.targets)
    found, wanted = evaluate(kl_divergence, mixed, other), truth(mixed, other)
    assert [f.dtype for f in found] == [torch.float32, torch.bfloat16, torch.float32, torch.float16]
    assert_agree(found[:1], wanted[:1], 4e-6)
    assert_agree(found, wanted, 1e-2)


def test_gradcheck(device, backend):
    """The gradients must be those that finite differences find in float64, with everything that can be given."""
    model, other = pair(4, (3, 5), 140, dtype=torch.float64, device=device, masked=0.2)
    for target_shift, workspace in itertools.product([0.0, 2.0, math.inf], [0, None]):

        def function(hidden, weight, bias, target_shift=target_shift, workspace=workspace):
            return kl_divergence(
                hidden, weight, other.hidden, other.weight, model.targets, bias=bias, reference_bias=other.bias, logit_scale=0.5,
                softcap=2.0, target_shift=target_shift, workspace=workspace,
            )  # fmt: skip

        assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in model[:3]], fast_mode=True)


def test_reference_is_the_definition():
    """pyunlearn.ops.reference must say what torch.distributions says."""
    model, other = pair(6, (8, 5), 40, dtype=torch.float64)
    z, y = (c.hidden @ c.weight.T for c in (model, other))
    p, q = (torch.distributions.Categorical(logits=x) for x in (z, y))
    assert_agree([reference.kl_divergence_of(z, y)], [torch.distributions.kl_divergence(q, p)], 1e-12)


# ---------------------------------------------------------------- what it means


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_nothing_between_equals(dtype, softcap, device, backend):
    """Of a model from itself: 0, with gradients of 0, in any workspace."""
    model, _ = pair(7, (16, 16), 500, dtype=dtype, device=device, masked=0.3)
    for workspace in (0, None):
        values, *gradients = evaluate(kl_divergence, model, model, softcap=softcap, workspace=workspace)
        assert values.abs().max() <= 1e-6
        assert all(g.abs().max() <= 1e-6 for g in gradients)


@pytest.mark.parametrize("workspace", [0, None])
def test_leaving_the_target_out(workspace, device, backend):
    """From the model itself without the target (CE-U): -log(1 - p[target]), with the gradient of that."""
    model, _ = pair(9, (16, 16), 300, device=device, masked=0.3)
    found = evaluate(kl_divergence, model, model, adapter=True, target_shift=math.inf, workspace=workspace)

    def wanted(hidden, weight, _hidden, _weight, targets, *, bias, reference_bias):
        values = linear_log_likelihood(hidden, weight, targets, bias=bias)
        return torch.where(targets == -100, 0, -torch.log1p(-torch.exp(values.clamp(max=-1e-9))))

    exact = cast(model, dtype=torch.float64, device="cpu")
    assert_agree(found, evaluate(wanted, exact, exact), 4e-6)


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
    """Tokens, whole blocks of them, that the reference rules out have no mass: neither NaN, nor infinity where the model rules them out too."""
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
    """Where the model rules out what the reference does not, KL is infinite, and the gradient finite."""
    model, other = pair(4, (8, 5), 500, device=device)
    model.bias[ruled_out] = -torch.inf
    found = evaluate(kl_divergence, model, other, workspace=workspace)
    assert (found[0] == torch.inf).all()
    assert_agree(found[1:], truth(model, other)[1:], 4e-6)


@pytest.mark.parametrize("workspace", [0, None])
@pytest.mark.parametrize("step", [300.0, 2000.0])
def test_mass_that_vanishes(workspace, step, device, backend):
    """What the model rules out and the reference first has mass on, but none beside a later token: never NaN."""
    weight, reference_weight, bias = torch.zeros(200, 1), torch.zeros(200, 1), torch.zeros(200)
    reference_weight[150], bias[3] = step, -torch.inf
    hidden = torch.ones(1, 1, device=device)
    found = kl_divergence(
        hidden, weight.to(device), hidden, reference_weight.to(device), bias=bias.to(device), workspace=workspace
    )
    assert not found.isnan().any()


def test_rows_are_apart(device, backend):
    """A NaN in a row of either side must stay in that row, and what an ignored row holds must not matter at all."""
    model, other = pair(6, (8, 5), 200, device=device)
    model.hidden[2], other.hidden[4] = torch.nan, torch.nan
    values, _ = graph(kl_divergence, model, other)
    assert values.isnan().tolist() == [False, False, True, False, True, False]
    model.targets[[2, 4]] = -100
    clean = [c._replace(hidden=c.hidden.nan_to_num(1.0)) for c in (model, other)]
    assert_agree(evaluate(kl_divergence, model, other), truth(*clean), 4e-6)


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
    found, wanted = evaluate(kl_divergence, *shaped), truth(model, other)
    assert (found[0].shape, found[1].shape) == (shape, (*shape, 8))
    assert_agree([found[0].flatten(), found[1].reshape(-1, 8), *found[2:]], wanted, 4e-6)


def test_ignore_index(device, backend):
    """Any number can mean "ignored", a token's own id too."""
    model, other = pair(6, (8, 5), 50, device=device)
    model.targets[1] = 0
    found = evaluate(kl_divergence, model, other, ignore_index=0)
    model.targets[model.targets == 0] = -100
    assert_agree(found, truth(model, other), 4e-6)


@pytest.mark.parametrize("workspace", [0, 30_000, None])
def test_second_backward(workspace, device, backend):
    """Backward again and again over a retained graph, and another run, must give the same bits, asked for together or apart."""
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
    """Saved tensors that come back from other memory must change no gradient, the model being its own reference too."""
    model, other = pair(11, (16, 8), 900, device=device, masked=0.3)

    def gradients():
        leaves = [t.clone().requires_grad_() for t in model[:3]]
        theirs = [t.detach() for t in leaves] if itself else other[:3]
        values = kl_divergence(
            *leaves[:2], *theirs[:2], model.targets, bias=leaves[2], reference_bias=theirs[2], target_shift=2.0, workspace=workspace
        )  # fmt: skip
        return torch.autograd.grad(values, leaves, coefficients_of(values))

    wanted = gradients()
    with saved_elsewhere():
        assert_equal(gradients(), wanted)


def test_second_derivative():
    """A gradient of the gradient is refused in words."""
    values, (hidden, *_) = graph(kl_divergence, *pair(3, (4, 5), 10))
    (gradient,) = torch.autograd.grad(values.sum(), hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="twice"):
        gradient.sum().backward()


def test_the_reference_is_constant(device, backend):
    """The reference never gets a gradient, and under no_grad, or if all else is constant, there is no graph."""
    model, other = pair(5, (8, 8), 90, device=device)
    theirs = [t.requires_grad_() for t in other[:3]]
    given = (theirs[0], theirs[1], model.targets)
    assert not kl_divergence(*model[:2], *given, reference_bias=theirs[2]).requires_grad
    assert not kl_divergence(*model[:2], theirs[0]).requires_grad
    hidden = model.hidden.clone().requires_grad_()
    kl_divergence(hidden, model.weight, *given, reference_bias=theirs[2]).sum().backward()
    assert hidden.grad is not None
    assert all(t.grad is None for t in theirs)
    with torch.no_grad():
        assert not kl_divergence(hidden, model.weight, *given).requires_grad


# ---------------------------------------------------------------- what it costs, and PyTorch's own checks


def watched():
    """Allocations that see into kl_divergence."""
    used, ops = Allocations(), torch.ops.pyunlearn
    used.inside[ops.kl_divergence.default] = op_module._forward
    used.inside[ops.kl_divergence_backward.default] = op_module._backward
    return used


@pytest.mark.parametrize(("trained", "wanted"), [((0, 1, 2), 2), ((0,), 1), ((1,), 1), ((2,), 0)])
def test_products(trained, wanted, device, backend):
    """Two products forward, one backward for each of hidden states and head that is trained, and two more where nothing was kept."""
    model, other = pair(90, (8, 8), 203, device=device, masked=0.3)
    full = evaluate(kl_divergence, model, other)[1:]
    for workspace, again in ((None, 0), (0, 2)):

        def run(workspace=workspace):
            with watched():
                values, leaves = graph(kl_divergence, model, other, trained, workspace=workspace)
                values.backward(coefficients_of(values))
            assert_agree([leaves[i].grad for i in trained], [full[i].cpu() for i in trained], 4e-6)
            assert [i for i in range(3) if leaves[i].grad is not None] == list(trained)

        assert products(model, run) == 2 + wanted + again
    assert products(model, lambda: graph_without(model, other)) == 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [0.0, 0.3])
def test_itself_as_reference_is_one_product(dtype, masked, device, backend):
    """The model's own tensors as the reference: the same bits as a copy of them, in one product less forward, and one less where nothing was kept."""
    model, _ = pair(90, (8, 8), 203, dtype=dtype, device=device, masked=masked)

    def run(reference, workspace):
        hidden, weight = model.hidden.clone().requires_grad_(), model.weight.clone().requires_grad_()
        other = [x.detach() if reference == "itself" else x.detach().clone() for x in (hidden, weight)]
        with watched():
            values = kl_divergence(
                hidden, weight, *other, model.targets, bias=model.bias, target_shift=2.0, workspace=workspace
            )
            values.backward(coefficients_of(values))
        return values.detach(), hidden.grad, weight.grad

    for workspace, again in ((None, 0), (0, 1)):
        assert_equal(run("itself", workspace), run("a copy", workspace))
        if dtype is not torch.float16 and dtype is not torch.bfloat16:
            assert products(model, lambda w=workspace: run("itself", w)) == 3 + again


@pytest.mark.parametrize("reference", ["itself", "another"])
def test_masked_rows_take_no_workspace(reference, device, backend):
    """A workspace that holds both logits of the rows that count keeps all of them, whatever is masked beside them; nothing is multiplied twice."""
    model, other = pair(64, (20, 8), 703, device=device, masked=0.7)
    other = model if reference == "itself" else other
    live, workspace = int((model.targets >= 0).sum()), 240_000
    plans = [
        op_module._plan(model.hidden.new_empty(n, 20), model.weight, workspace, True, False)
        for n in (live, len(model.hidden))
    ]
    assert [p.cached == len(p.groups()) for p in plans] == [True, False]

    def run():
        hidden = model.hidden.clone().requires_grad_()
        theirs = (hidden.detach(), model.weight) if reference == "itself" else other[:2]
        with watched():
            kl_divergence(hidden, model.weight, *theirs, model.targets, workspace=workspace).sum().backward()

    shares = 1 if reference == "itself" else 1 + 8 / 20
    assert products(model, run) == pytest.approx(shares + 1)
    assert_right(model, other, workspaces=(workspace,))


@pytest.mark.parametrize("ignore_index", [None, -100])
def test_backward_never_asks(ignore_index, device, backend, monkeypatch):
    """Which rows count is asked once, in forward, and not at all with ignore_index=None: on a card every question stops the queue."""
    model, other = pair(40, (8, 5), 203, device=device, masked=0.0 if ignore_index is None else 0.4)
    asked, original = [], op_module.live_rows

    def live_rows(targets, ignore_index):
        if ignore_index != NOTHING:
            asked.append(len(targets))
        return original(targets, ignore_index)

    for module in (op_module, _passes):
        monkeypatch.setattr(module, "live_rows", live_rows)
    values, leaves = graph(kl_divergence, model, other, ignore_index=ignore_index)
    assert asked == ([] if ignore_index is None else [40])
    torch.autograd.grad(values.sum(), leaves)
    assert len(asked) == (ignore_index is not None)


@on_gpu
def test_backward_never_waits(device, backend):
    """Once the values are there, nothing waits for the card, with or without ignored rows."""
    for masked in (0.4, 0.0):
        model, other = pair(40, (8, 5), 203, device=device, masked=masked)
        values, leaves = graph(kl_divergence, model, other)
        total = values.sum()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = torch.autograd.grad(total, leaves)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(g.isfinite().all() for g in found)


def graph_without(model, other):
    """The values alone."""
    with watched():
        graph(kl_divergence, model, other, ())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace", [MIB, 4 * MIB])
@pytest.mark.parametrize("trained", [True, False])
def test_memory(dtype, workspace, trained, device):
    """Beyond the gradients, a call must take its workspace and a few numbers a row, and never N * V of anything."""
    rows, width, vocabulary = 1024, 8, 8192  # 32 MiB of float32 logits, twice
    model, other = pair(rows, (width, 4), vocabulary, dtype=dtype, device=device)
    with watched() as used:
        values, _ = graph(kl_divergence, model, other, (0, 1, 2) if trained else (), workspace=workspace)
        if trained:
            values.sum().backward()
    leaves = sum(t.numel() * t.element_size() for t in model[:3])
    answers = leaves + (sum(t.numel() * (t.element_size() + 4) for t in model[:3]) if trained else 0)
    per_row = rows * 4 * (24 + 2 * width) + MIB // 4
    copies = (
        4 * workspace if _backend.kernels_for(model.hidden) == "reference" else 0
    )  # plain torch makes them of a block
    assert workspace // 8 < used.peak <= workspace + copies + answers + per_row
    assert used.largest <= workspace


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace", [17, 20, 24, 32, 128, 132, 144])
def test_memory_of_what_is_kept(dtype, workspace, device):
    """However many groups are kept, of one block or of several, they and a group's gradient fit the workspace, which is put to use."""
    rows, width, vocabulary = (
        1024,
        8,
        2048 if workspace < 64 else 16384,
    )  # 16 or 128 MiB of float32 logits, twice included
    model, other = pair(rows, (width, 4), vocabulary, dtype=dtype, device=device, bias=False)
    p = op_module._plan(model.hidden, model.weight, workspace * MIB, True, False)
    assert p.group == p.block * (1 if workspace < 64 or device != "cpu" else 4)
    assert p.cached == len(p.groups()) or p.cached >= (workspace / 2) // (2 * rows * p.group * 4 / MIB)
    with watched() as used:
        values, _ = graph(kl_divergence, model, other, (0, 1), workspace=workspace * MIB)
        values.sum().backward()
    answers = sum(t.numel() * (2 * t.element_size() + 4) for t in model[:2])
    outside = answers + rows * 4 * (24 + 2 * width) + MIB // 4
    copies = (
        4 * 8 * MIB if _backend.kernels_for(model.hidden) == "reference" else 0
    )  # plain torch makes them of a block
    assert used.peak <= workspace * MIB + outside + copies, (used.peak, p)


def test_products_of_whole_groups(device, backend, monkeypatch):
    """The gradient's products are made of a group of blocks at a time, so the hidden one is a sum of few."""
    model, other = pair(3, (8, 5), 50257, device=device, bias=False)  # blocks of 8192 columns, groups of four or eight
    sums, add_product = [], op_module.add_product
    monkeypatch.setattr(op_module, "add_product", lambda out, a, b: sums.append(a.shape[1]) or add_product(out, a, b))
    evaluate(kl_divergence, model, other)
    group = op_module._plan(model.hidden, model.weight, None, True, False).group
    assert sums == [min(group, 50257 - first) for first in range(0, 50257, group)]
    assert group >= 4 * 8192


def test_opcheck(device):
    """torch.library must find schema, fake kernels and autograd of both ops in order."""
    op, back = torch.ops.pyunlearn.kl_divergence.default, torch.ops.pyunlearn.kl_divergence_backward.default
    model, other = pair(4, (8, 5), 90, device=device)
    leaves = [t.clone().requires_grad_() for t in model[:3]]
    torch.library.opcheck(op, (*leaves, *other[:3], model.targets, 0.5, 3.0, 2.0, False, -100, None, True))
    torch.library.opcheck(op, (*leaves, *model[:3], model.targets, 0.5, 3.0, 2.0, True, -100, None, True))
    torch.library.opcheck(op, (*model[:2], None, *other[:2], None, model.targets, 1.0, 0.0, 0.0, False, -100, 0, False))
    static = ("test_schema", "test_faketensor")  # it has no gradient of its own
    for needs, itself in (([True, True, True], False), ([True, False, False], True), ([False, True, False], False)):
        rest = (*model[:3], *(model if itself else other)[:3], model.targets, 0.5, 3.0, 2.0, itself, -100, 20000)
        kl, maximum, total, kept = op(*rest, True)
        torch.library.opcheck(back, (torch.ones_like(kl), maximum, total, kept, *rest, needs), test_utils=static)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic, device):
    """torch.compile(fullgraph=True) must take it without a break and give the eager answer, at every shape."""
    torch._dynamo.reset()

    def function(*args, **options):
        return kl_divergence(*args, **options, softcap=4.0, target_shift=2.0)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (6, 9) if dynamic else (6,):
        both = pair(rows, (8, 5), 200, device=device, masked=0.3)
        assert_equal(evaluate(compiled, *both), evaluate(function, *both))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"target_shift": 1.0}, "target_shift must be 0 or more and goes with targets, got 1.0 and targets=None"),
        ({"target_shift": -1.0, "targets": ids(3)}, "target_shift must be 0 or more"),
        ({"target_shift": math.nan, "targets": ids(3)}, "target_shift must be 0 or more"),
        ({"targets": torch.tensor([0, -100, 10])}, r"targets must lie in \[0, 10\) or be -100 \(ignored\), got 10: "),
        ({"targets": ids(4)}, r"one token id for each row of hidden, shape \(3,\), got \(4,\)"),
        ({"hidden": ids(3, 4)}, r"hidden must be a float32, .*, got torch\.int64"),
        ({"reference_hidden": ids(3, 5)}, r"reference_hidden must be a floating-point tensor, got torch\.int64"),
        ({"reference_hidden": torch.ones(4, 5)}, r"must have the rows of hidden, shape \(3, 'D'\) on cpu, got \(4, 5\)"),
        ({"reference_hidden": torch.ones(3, 5, **elsewhere)}, r"must have the rows of hidden, .* got \(3, 5\) on meta"),
        ({"reference_hidden": torch.ones(3, 6)}, r"the reference's weight must have shape \(V, 6\)"),
        ({"reference_weight": torch.ones(11, 5)}, "must have one vocabulary, got 10 and 11 entries"),
        ({"reference_weight": None}, r"the reference's weight must have shape \(V, 5\) .*, got \(10, 4\)"),
        ({"reference_weight": torch.ones(10, 5, **elsewhere)}, "the reference's weight is on meta and hidden on cpu"),
        ({"reference_bias": torch.ones(9)}, r"the reference's bias must have shape \(10,\), .*, got \(9,\)"),
        ({"reference_bias": torch.ones(10, 2)}, r"bias must .*got .*\(10, 2\)"),
        ({"reference_bias": ids(10)}, r"bias must be a floating-point tensor .*, got torch\.int64"),
        ({"reference_bias": torch.ones(10, **elsewhere)}, "bias is on meta and .* on cpu"),
        ({"bias": torch.ones(10, **elsewhere)}, "bias is on meta and the rest on cpu: move them to one device"),
        ({"softcap": 0.0}, r"softcap must be positive, got 0\.0"),
        ({"workspace": -1}, "workspace must be a number of bytes, 0 or more, got -1"),
    ],
)  # fmt: skip
def test_errors(changes, sentence):
    """Each wrong argument is named with what was wanted and what came."""
    model, other = pair(3, (4, 5), 10)
    valid = {"hidden": model.hidden, "weight": model.weight, "reference_hidden": other.hidden}
    with pytest.raises(ArgumentError, match=sentence):
        kl_divergence(**valid | {"reference_weight": other.weight} | changes)
