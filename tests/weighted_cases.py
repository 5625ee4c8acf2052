"""Cases of weighted_log_likelihood: coefficients and the definition in PyTorch."""

import pytest
import torch
import torch.utils.checkpoint
from heads import (
    bytes_of,
    cast,
    plain,
)

from pyunlearn.ops import weighted_log_likelihood


def coefficients_of(case):
    """Return a coefficient for each row, of both signs."""
    return torch.linspace(-1, 2, case.targets.numel(), device=case.targets.device).view(case.targets.shape)


def definition(hidden, weight, targets, coefficients, **options):
    """Compute the definition in plain PyTorch."""
    return (coefficients * plain(hidden, weight, targets, **options)).sum()


def evaluate(function, case, coefficients=None, *, factor=1.0, **options):
    """Return [value, gradients of factor * value for hidden, weight and, if there is one, bias]."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in case[:3]]
    coefficients = coefficients_of(case) if coefficients is None else coefficients
    value = function(*leaves[:2], case.targets, coefficients, bias=leaves[2], **options)
    return [value.detach(), *torch.autograd.grad(factor * value, [leaf for leaf in leaves if leaf is not None])]


def truth(case, coefficients=None, **options):
    """Return what `evaluate` should return, computed by the definition in float64."""
    case = cast(case, dtype=torch.float64, device="cpu")
    return evaluate(definition, case, None if coefficients is None else coefficients.double().cpu(), **options)


def graph(case, trained=(0, 1, 2), **options):
    """Return the value, and hidden, weight and bias; the `trained` ones require a gradient."""
    leaves = [t.detach().clone().requires_grad_(i in trained) for i, t in enumerate(case[:3])]
    return weighted_log_likelihood(*leaves[:2], case.targets, coefficients_of(case), bias=leaves[2], **options), leaves


# the number of rows whose logits fit the workspace; None: the default, all of them; 0: none, so they are recomputed
CAPACITIES = [None, 5, 1, 0]
any_capacity = pytest.mark.parametrize("capacity", CAPACITIES)


def workspace_for(capacity, case):
    """Return the workspace in bytes that fits the logits of `capacity` rows."""
    return None if capacity is None else bytes_of(capacity, case) if capacity else 0


def expected_chunks(capacity, live):
    """The most rows in a chunk, and how many chunks."""
    if capacity is None or capacity == 0 or capacity >= live:
        return live, 1
    count = -(-live // capacity)
    return -(-live // count), count
