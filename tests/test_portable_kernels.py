"""The portable CUDA kernels on the emulator, against float64."""

import ctypes
from types import SimpleNamespace

import pytest
import torch
from emulated import assert_right, evaluate, head, truth, unit
from heads import assert_agree, assert_equal, plain_from_logits

from pyunlearn.ops import _backend, _kernels, linear_log_likelihood, log_likelihood, reference, token_statistics
from pyunlearn.ops.hopper import dispatch

pytestmark = pytest.mark.emulator


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.5, "softcap": 3.0}])
@pytest.mark.parametrize("workspace", [0, None])
@pytest.mark.parametrize(("rows", "vocabulary"), [(3, 1), (9, 1003), (3, 2500), (2, 9001)])
def test_portable_kernels(rows, vocabulary, workspace, options, dtype, emulated, monkeypatch):
    """Values, gradients and statistics agree with float64 for narrow and wide rows of any alignment."""
    monkeypatch.setattr(dispatch, "run_on", lambda device: False)
    case = head(rows, 12, vocabulary, dtype=dtype, bias=bool(options))
    expected = truth(case, unit(rows), **options)
    actual = evaluate(linear_log_likelihood, case, unit(rows), workspace=workspace, **options)
    assert_right(actual, expected, dtype)
    z = case.hidden.double() @ case.weight.double().T
    z = reference.logits_of(z, case.bias, options.get("logit_scale", 1.0), options.get("softcap", 0.0))
    statistics = token_statistics(*case[:2], case.targets, bias=case.bias, workspace=workspace, **options)
    right_ones = reference.token_statistics_of(z, case.targets)
    assert_agree([statistics[i] for i in (0, 2, 3)], [right_ones[i] for i in (0, 2, 3)], 2e-5)
    assert (statistics.rank == right_ones[1]).all()
    assert emulated.calls["statistics"] * emulated.calls["gradient"] * emulated.calls["token_statistics"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0.0, 2.0, torch.inf])
@pytest.mark.parametrize(("offset", "other_offset"), [(0, 0), (1, 1), (0, 3)])
@pytest.mark.parametrize(("rows", "columns"), [(3, 1), (9, 1003), (3, 2500), (2, 9001)])
def test_portable_kl_kernels(rows, columns, offset, other_offset, shift, dtype, emulated):
    """Sums and gradients agree with float64 and repeat bit for bit, for any alignment and with impossible tokens."""
    x, y = torch.randn(2, rows, columns + 8)
    x, y = x[:, offset : offset + columns], y[:, other_offset : other_offset + columns]
    if columns > 1:
        y[:, 5], x[:, 7], y[:, 7], y[1, columns - 2] = -torch.inf, -torch.inf, -torch.inf, -torch.inf
    x[rows - 1, columns // 2] = torch.nan
    biases = torch.randn(columns), torch.randn(columns)
    targets = torch.arange(rows) * (columns // rows)
    rest = (0.7, 3.0, targets, shift)

    def outputs(run, x, y, biases, out):
        maximum, total = x.new_full((2, rows), -torch.inf), x.new_zeros(2, rows)
        cross = x.new_zeros(rows)
        for begin, end in ((0, columns // 3), (columns // 3, columns)) if columns > 3 else ((0, columns),):
            parts = [t[:, begin:end] for t in (x, y)], [t[begin:end] for t in biases]
            _kernels.kl_statistics(run, *parts[0], begin, parts[1], *rest, maximum, total, cross)
        _kernels.kl_gradient(run, x, y, 0, biases, *rest, maximum, total, unit(rows).to(x.dtype), out)
        return [maximum[:, :-1], total[:, :-1], (cross / total[1])[:-1], out[:-1]], [maximum, total, cross, out]

    wide = [t.double() for t in (x, y, *biases)]
    expected = outputs(reference, *wide[:2], wide[2:], torch.empty(rows, columns, dtype=torch.float64))[0]
    twice = [outputs(emulated.module, x, y, biases, torch.empty(rows, columns, dtype=dtype)) for _ in range(2)]
    assert_equal(*([t.nan_to_num(nan=7) for t in each[1]] for each in twice))
    assert twice[0][1][1][0, -1].isnan()
    if columns > 1 or shift != torch.inf:  # otherwise the reference has no mass at all
        assert all(
            torch.allclose(f.double(), w, rtol=2e-5, atol=2e-5)
            for f, w in zip(twice[0][0][:3], expected[:3], strict=True)
        )
        assert_agree(twice[0][0][3:], expected[3:], 1e-5 if dtype is torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float64_bias(dtype, emulated):
    """With narrower rows a float64 bias is read as float32; its gradient is float64."""
    case = head(9, 16, 1003, dtype=dtype)._replace(bias=torch.randn(1003, dtype=torch.float64))
    actual = evaluate(linear_log_likelihood, case, unit(9))
    assert_right(actual, truth(case, unit(9)), dtype)
    assert actual[3].dtype is torch.float64
    logits = case.hidden @ case.weight.T
    expected = plain_from_logits(logits.double(), case.targets, bias=case.bias)
    assert_agree([log_likelihood(logits, case.targets, bias=case.bias.detach())], [expected], 1e-5)


@pytest.mark.full
def test_the_portable_self_test_passes_and_can_fail(emulated, monkeypatch):
    """The self-test runs every kernel at every width, and detects one wrong number in a wide row."""
    assert _backend._self_test_problem(torch.device("cpu")) is None
    statistics = emulated.module.statistics

    def wrong_where_wide(*arguments):
        statistics(*arguments)
        if arguments[5] == 9001:  # columns; then targets at 11, maximum at 12, sum at 13
            (ctypes.c_float * 5).from_address(arguments[13])[3] *= 1.01

    names = ("gradient", "token_statistics", "target_products", "kl_statistics", "kl_gradient")
    others = {name: getattr(emulated.module, name) for name in names}
    monkeypatch.setattr(_backend, "_C", SimpleNamespace(**others, statistics=wrong_where_wide))
    assert "wrong numbers" in _backend._self_test_problem(torch.device("cpu"))
