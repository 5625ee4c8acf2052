"""Cases of token_statistics: the definition in float64, and what counts as right."""

import sys

import pytest
import torch
from heads import assert_agree, cast

from pyunlearn.ops import TokenStatistics, reference, token_statistics, token_statistics_from_logits

op_module = sys.modules["pyunlearn.ops.token_statistics"]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TOLERANCE = {torch.float64: 1e-11}  # for the others 4e-6: they are all computed in float32


def scored(case, **options):
    """Compute token_statistics of a case."""
    return token_statistics(*case[:2], case.targets, bias=case.bias, **options)


def from_logits(hidden, weight, targets, *, workspace=None, **options):
    """Call token_statistics_from_logits with the signature of token_statistics."""
    return token_statistics_from_logits(hidden @ weight.T, targets, **options)


def logits_of(case, logit_scale=1.0, softcap=None):
    """Return all logits, in the case's dtype."""
    z = case.hidden @ case.weight.T
    z = (z if case.bias is None else z + case.bias) * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def exact(case):
    """Return the case in float64 on the CPU."""
    return cast(case, dtype=torch.float64, device="cpu")


def definition(logits, targets):
    """Return the four fields, 0 in ignored rows."""
    masked = targets == -100
    return [x.masked_fill(masked, 0) for x in reference.token_statistics_of(logits, targets.masked_fill(masked, 0))]


def truth(case, **options):
    """Return what `scored` should return, computed by the definition in float64."""
    return definition(logits_of(exact(case), **options), exact(case).targets)


def assert_right(actual, case, **options):
    """Assert that every field agrees with the definition.

    rank: a logit larger by more than float32 rounding counts, and a logit that is not larger never does.
    """
    dtype = case.hidden.dtype
    real = dtype if dtype is torch.float64 else torch.float32
    assert isinstance(actual, TokenStatistics)
    assert [x.dtype for x in actual] == [real, torch.int64, real, real]
    wanted = truth(case, **options)
    assert_agree([actual[0], actual[2]], [wanted[0], wanted[2]], TOLERANCE.get(dtype, 4e-6))
    assert_agree([actual[3]], [wanted[3]], TOLERANCE.get(dtype, 1e-5))  # a difference of squares
    case, live = exact(case), (case.targets != -100).cpu()
    z = logits_of(case, **options)
    size = case.hidden.abs() @ case.weight.abs().T + (0 if case.bias is None else case.bias.abs())
    slack = 32 * torch.finfo(real).eps * abs(options.get("logit_scale", 1.0)) * size.amax(dim=1, keepdim=True)
    above = (z > z.gather(1, case.targets.clamp(0)[:, None]) + slack).sum(dim=1) * live
    assert ((above <= actual.rank.cpu()) & (actual.rank.cpu() <= wanted[1])).all()


OPS = {"linear": token_statistics, "logits": from_logits}
both_ops = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
