"""Cases of kl_divergence: pairs of heads and the definition in PyTorch."""

import sys

import torch
from heads import (
    assert_agree,
    cast,
    make,
)

from pyunlearn.ops import kl_divergence, reference

op_module = sys.modules["pyunlearn.ops.kl_divergence"]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def pair(rows, widths, vocabulary, *, theirs=None, **options):
    """Return (model, reference), cases of one vocabulary; `theirs` is the reference's dtype."""
    model = make(rows, widths[0], vocabulary, **options)
    other = make(rows, widths[1], vocabulary, **options | {"seed": options.get("seed", 0) + 1})
    return model, other if theirs is None else cast(other, dtype=theirs)


def logits_of(hidden, weight, bias, logit_scale, softcap):
    """Return all logits, in their own dtype."""
    z = hidden @ weight.T
    z = (z if bias is None else z + bias) * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def definition(
    hidden,
    weight,
    reference_hidden,
    reference_weight=None,
    targets=None,
    *,
    bias=None,
    reference_bias=None,
    logit_scale=1.0,
    softcap=None,
    target_shift=0.0,
    workspace=None,
):
    """Compute the definition in plain PyTorch, 16-bit logits in float32, as is common."""
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
    """Return a coefficient for each row, of both signs."""
    return torch.linspace(-1, 2, values.numel(), device=values.device).view(values.shape).to(values)


def graph(function, model, other, trained=(0, 1, 2), *, adapter=False, marked=True, **options):
    """Return the values, and hidden, weight and, if there is one, bias; the `trained` ones require a gradient."""
    leaves = [None if t is None else t.detach().clone().requires_grad_(i in trained) for i, t in enumerate(model[:3])]
    head = (None, None) if adapter else (other.weight, other.bias)
    values = function(
        *leaves[:2],
        other.hidden,
        head[0],
        model.targets if marked else None,
        bias=leaves[2],
        reference_bias=head[1],
        **options,
    )
    return values, [leaf for leaf in leaves if leaf is not None]


def evaluate(function, model, other, **options):
    """Return [values, gradients of their weighted sum for hidden, weight and, if there is one, bias]."""
    values, leaves = graph(function, model, other, **options)
    return [values.detach(), *torch.autograd.grad(values, leaves, coefficients_of(values))]


def truth(model, other, **options):
    """Return what `evaluate` should return, computed by the definition in float64."""
    return evaluate(definition, *(cast(c, dtype=torch.float64, device="cpu") for c in (model, other)), **options)


def assert_right(model, other, *, workspaces=(0, None), **options):
    """Assert that values agree with float64 to float32 rounding, and gradients to their own, in any workspace."""
    wanted = truth(model, other, **options)
    eps = torch.finfo(model.hidden.dtype).eps
    real = torch.float64 if model.hidden.dtype is torch.float64 else torch.float32
    for workspace in workspaces:
        actual = evaluate(kl_divergence, model, other, workspace=workspace, **options)
        assert [f.dtype for f in actual] == [real, *(t.dtype for t in model[:3] if t is not None)]
        assert_agree(actual[:1], wanted[:1], max(64 * torch.finfo(real).eps, 1e-11 if real is torch.float64 else 4e-6))
        assert_agree(actual, wanted, 4 * eps if eps > 1e-6 else 4e-6 if real is torch.float32 else 1e-11)
