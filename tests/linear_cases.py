"""Cases of linear_log_likelihood and log_likelihood: the definition, and values with gradients."""

import pytest
import torch
import torch.utils.checkpoint
from heads import (
    cast,
    plain,
)

from pyunlearn.ops import linear_log_likelihood, log_likelihood


def from_logits(hidden, weight, targets, *, workspace=None, **options):
    """Call log_likelihood with the signature of linear_log_likelihood."""
    return log_likelihood(hidden @ weight.T, targets, **options)


def evaluate(function, case, coefficients=None, **options):
    """Return [values, gradients of sum(coefficients * values) for hidden, weight and, if there is one, bias]."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in case[:3]]
    values = function(leaves[0], leaves[1], case.targets, bias=leaves[2], **options)
    coefficients = torch.linspace(-1, 2, len(values)) if coefficients is None else coefficients
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [values.detach(), *torch.autograd.grad(values, wanted, coefficients.to(values))]


def truth(case, coefficients=None, **options):
    """Return what `evaluate` should return, computed by the definition in float64."""
    return evaluate(plain, cast(case, dtype=torch.float64, device="cpu"), coefficients, **options)


OPS = {"linear": linear_log_likelihood, "logits": from_logits}
both_ops = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
