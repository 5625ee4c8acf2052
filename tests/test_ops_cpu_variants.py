"""PYUNLEARN_CPU picks a narrower instruction set, which must give the same answers in every dtype."""

import os
import subprocess
import sys

import pytest
import test_ops_kl_divergence as kl
import test_ops_linear_log_likelihood as likelihood
import test_ops_token_statistics as statistics
import torch
from heads import assert_agree, error

from pyunlearn.ops import TokenStatistics, _backend

EVALUATE = """
import sys, torch
from pyunlearn.ops import _backend, kl_divergence, linear_log_likelihood, token_statistics

def with_gradients(values, leaves):
    return [values.detach(), *torch.autograd.grad(values, leaves, torch.linspace(-1, 2, len(values)).to(values))]

results = {name: [] for name in ("likelihood", "statistics", "kl")}
for (hidden, weight, bias, targets), other, options in torch.load(sys.argv[1]):
    results["statistics"].append(tuple(token_statistics(hidden, weight, targets, bias=bias, **options)))
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    values = linear_log_likelihood(hidden, weight, targets, bias=bias, **options)
    results["likelihood"].append(with_gradients(values, leaves))
    options |= {"reference_bias": other[2], "target_shift": 2.0}
    values = kl_divergence(hidden, weight, *other[:2], targets, bias=bias, **options)
    results["kl"].append(with_gradients(values, leaves))
torch.save((_backend.build_info()["cpu_variant"], results), sys.argv[2])
"""

CASES = [
    (*kl.pair(7, (16, 8), 1203, dtype=dtype, masked=0.2), {"workspace": workspace, "softcap": softcap})
    for dtype in kl.DTYPES
    for workspace in (0, None)
    for softcap in (None, 3.0)
]


def variant(name):
    """Return a fixture parameter; by default the portable variant runs, and the process's own in all other tests."""
    return pytest.param(name, marks=pytest.mark.full(covering=name == "portable"))


@pytest.fixture(scope="module", params=[variant(name) for name in ("portable", "avx2", "avx512")])
def actual(request, tmp_path_factory):
    """Return {op: results of every case}, computed by a separate process with that instruction set."""
    if _backend.on_cpu().kernels != "cpu":
        pytest.skip("no compiled kernels here")
    folder = tmp_path_factory.mktemp("variant")
    torch.save([(tuple(model), tuple(other), options) for model, other, options in CASES], folder / "cases.pt")
    subprocess.run(
        [sys.executable, "-c", EVALUATE, folder / "cases.pt", folder / "results.pt"],
        env=os.environ | {"PYUNLEARN_CPU": request.param},
        cwd=folder,
        capture_output=True,
        check=True,
    )
    ran, results = torch.load(folder / "results.pt")
    if ran != request.param:
        pytest.skip(f"this machine runs {ran}, not {request.param}")
    return results


def test_log_likelihood(actual):
    """Values agree to float32 rounding, gradients to their own."""
    for (case, _, options), mine in zip(CASES, actual["likelihood"], strict=True):
        wanted = likelihood.truth(case, torch.linspace(-1, 2, 7), softcap=options["softcap"])
        assert error(mine[0], wanted[0]) < 4e-6
        assert_agree(mine, wanted, gradients_to(case))


def test_kl_divergence(actual):
    """Values agree to float32 rounding, gradients to their own."""
    for (case, other, options), mine in zip(CASES, actual["kl"], strict=True):
        wanted = kl.truth(case, other, target_shift=2.0, softcap=options["softcap"])
        assert error(mine[0], wanted[0]) < 4e-6
        assert_agree(mine, wanted, gradients_to(case))


def test_token_statistics(actual):
    """Every field is right."""
    for (case, _, options), mine in zip(CASES, actual["statistics"], strict=True):
        statistics.assert_right(TokenStatistics(*mine), case, softcap=options["softcap"])


def gradients_to(case):
    """Return a tolerance of four units in the last place of the case's dtype, 4e-6 at least."""
    return max(4 * torch.finfo(case.hidden.dtype).eps, 4e-6)
