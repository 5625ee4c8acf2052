"""The kernels for compute capability 9.0, on an emulator and a GPU, through the ops, against float64."""

import pytest
import torch
from coverings import slow
from emulated import PLACE, assert_right, evaluate, head, truth, unit
from heads import Case, assert_agree, assert_equal, cast, op_module, statistics_module

from pyunlearn.ops import _passes, linear_log_likelihood, reference, token_statistics
from pyunlearn.ops._types import Head
from pyunlearn.ops.hopper import kernels

pytestmark = pytest.mark.emulator


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.5, "softcap": 3.0}])
@pytest.mark.parametrize("workspace", [0, None])
@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(1, 8, 1), (5, 72, 1003), (300, 40, 515), (130, 1544, 259)])
def test_values_and_gradients(rows, width, vocabulary, workspace, options, dtype, watched):
    """Values and gradients agree with float64 at every width and vocabulary, cached or recomputed."""
    case = head(rows, width, vocabulary, dtype=dtype, bias=bool(options), masked=0.3 * (rows > 1))
    actual = evaluate(linear_log_likelihood, case, unit(rows), workspace=workspace, **options)
    assert_right(actual, truth(case, unit(rows), **options), dtype)
    cached = workspace is None and dtype is torch.bfloat16
    assert watched.calls["hopper_statistics_kept"] == cached
    assert watched.calls["hopper_statistics"] == (not cached)
    assert (watched.calls["hopper_gradient"] > 0) == (not cached)
    assert (watched.calls["kept_scale_rows"] > 0) == cached
    assert not watched.calls["statistics"] + watched.calls["gradient"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("processors", [2, 6, 14])
def test_any_order_gives_the_same_bits(processors, seed, emulated, extension):
    """Results repeat bit for bit in any order of execution, for each number of clusters."""
    case = head(270, 48, 520)
    extension[1].set_machine(processors, 100)
    expected = evaluate(linear_log_likelihood, case, unit(270))
    extension[1].set_machine(processors, seed)
    assert_equal(evaluate(linear_log_likelihood, case, unit(270)), expected)


@pytest.mark.parametrize("offset", [-1e4, -160.0, 160.0, 1e4])
@pytest.mark.parametrize("workspace", [0, None])
def test_common_offset(offset, workspace, watched):
    """A constant added to all logits costs no accuracy in values or gradients."""
    case = head(6, 16, 500, dtype=torch.float32)
    case = cast(Case(*((t.clamp(-2, 2) * 8).round() / 8 for t in case[:3]), case.targets), dtype=torch.bfloat16)
    case = case._replace(bias=case.bias.float())
    shifted = case._replace(bias=case.bias + offset)
    actual = evaluate(linear_log_likelihood, shifted, unit(6), workspace=workspace)
    assert_right(actual, truth(case, unit(6)), torch.bfloat16)


@pytest.mark.parametrize("workspace", [0, None])
def test_rows_out_of_range(workspace, watched):
    """Rows whose exponentials leave the range, a NaN and an impossible target change no other row."""
    case = head(300, 16, 576)  # whole steps of 32: for a rest, oneDNN's AMX products read a NaN of the next row
    case.hidden[7] *= 200
    case.hidden[260] *= -100
    assert_right(
        evaluate(linear_log_likelihood, case, unit(300), workspace=workspace), truth(case, unit(300)), torch.bfloat16
    )
    case.hidden[9, 3] = torch.nan
    case.bias[5], case.targets[11] = -torch.inf, 5
    others = torch.tensor([i for i in range(300) if i not in (9, 11)], device=PLACE["device"])
    actual = linear_log_likelihood(*case[:2], case.targets, bias=case.bias, workspace=workspace)
    assert actual[9].isnan()
    assert actual[11] == -torch.inf
    clean = Case(case.hidden[others], case.weight, case.bias, case.targets[others])
    assert_agree([actual[others]], truth(clean, unit(298))[:1], 1e-5)
    weights = unit(300)
    weights[[9, 11]] = 0
    actual = evaluate(linear_log_likelihood, case, weights, workspace=workspace)
    expected = truth(clean, weights[others])
    assert_right([actual[0][others], actual[1][others]], expected[:2], torch.bfloat16)
    assert not actual[1][9].any()


def test_targets_outside_the_vocabulary(watched, monkeypatch):
    """A target outside the vocabulary gives NaN and rank -1, and changes no other row."""
    case = head(40, 24, 300)
    expected = truth(case, unit(40))[0]
    for module in (op_module, statistics_module, _passes):
        monkeypatch.setattr(module, "check_targets", lambda *_: True)
    case.targets[3], case.targets[4], case.targets[5] = 300, -1, 1 << 40
    actual = token_statistics(*case[:2], case.targets, bias=case.bias)
    assert actual.log_likelihood[3:6].isnan().all()
    assert (actual.rank[3:6] == -1).all()
    assert_agree([actual.log_likelihood[6:]], [expected[6:]], 1e-5)
    assert linear_log_likelihood(*case[:2], case.targets, bias=case.bias)[3:6].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0}])
@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(1, 8, 2), (70, 72, 1003), (300, 1544, 300)])
def test_token_statistics(rows, width, vocabulary, options, dtype, watched):
    """All four fields agree with float64; tokens equal to the target or impossible do not rank before it."""
    case = head(rows, width, vocabulary, dtype=dtype, masked=0.2 * (rows > 1))
    case.weight[1], case.bias[1] = case.weight[0], case.bias[0]
    case.targets[0] = 0
    actual = token_statistics(*case[:2], case.targets, bias=case.bias, **options)
    z = case.hidden.double() @ case.weight.double().T + case.bias.double()
    z = 4 * torch.tanh(z / 4) if options else z
    live = case.targets != -100
    expected = reference.token_statistics_of(z[live], case.targets[live])
    assert_agree([x[live] for i, x in enumerate(actual) if i != 1], [expected[0], *expected[2:]], 2e-5)
    z, at = z[live], case.targets[live][:, None]
    surely = (z > z.gather(1, at) + 1e-3).sum(1)
    assert ((actual.rank[live] <= expected[1]) & (actual.rank[live] >= surely)).all()
    assert actual.rank[0] <= expected[1][0]
    assert not any(x[~live].any() for x in actual)
    assert watched.calls["hopper_statistics"] == 1
    assert not watched.calls["token_statistics"]


def test_rank_of_an_impossible_target(watched):
    """Every possible token ranks before an impossible target, and nothing else does."""
    case = head(4, 8, 300)
    case.bias[100:200], case.targets[2] = -torch.inf, 150
    actual = token_statistics(*case[:2], case.targets.clamp(max=99), bias=case.bias)
    assert actual.rank.max() < 200
    case.targets[:] = 150
    actual = token_statistics(*case[:2], case.targets, bias=case.bias)
    assert actual.rank.tolist() == [200] * 4
    assert actual.entropy.isfinite().all()
    assert actual.variance.isfinite().all()


@pytest.mark.parametrize("kernel", ["hopper_statistics", "hopper_statistics_kept", "hopper_gradient"])
def test_wrong_arguments_are_refused_before_a_launch(kernel, emulated):
    """Unsupported memory, strides and sizes raise RuntimeError, and nothing is written."""
    case = head(40, 16, 300, bias=False)
    scratch, memory, rank = torch.empty(5, 40), torch.empty(1 << 16), torch.empty(40, dtype=torch.int64)
    cached = torch.empty(40, 304, dtype=torch.bfloat16)
    arguments = {
        "hidden": case.hidden,
        "weight": case.weight,
        "dtype": 1,
        "n": 40,
        "d": 16,
        "v": 300,
        "hidden_stride": 16,
        "weight_stride": 16,
    }
    arguments |= {"bias": None, "bias_dtype": 0, "scale": 1.0, "softcap": 3.0, "targets": case.targets}
    if kernel == "hopper_gradient":
        arguments |= {"first_column": 0, "coefficients": unit(40)}
    arguments |= {"log_likelihood": scratch[0], "maximum": scratch[1], "total": scratch[2]}
    if kernel == "hopper_statistics":
        arguments |= {
            "entropy": scratch[3],
            "variance": scratch[4],
            "rank": rank,
            "threshold": None,
            "workspace": memory,
        }
    elif kernel == "hopper_statistics_kept":
        arguments |= {"kept": cached, "kept_stride": 304, "factor": scratch[3], "workspace": memory}
    else:
        arguments |= {"result": cached, "kept_stride": 304}
    changes = [
        ("d", 12),
        ("d", 1 << 26),
        ("v", 0),
        ("dtype", 0),
        ("weight", case.weight.flatten()[1:]),
        ("hidden_stride", 20),
    ]
    changes += [("kept_stride", 296), ("kept_stride", 301), ("workspace", memory[1:])]
    for tensor in (scratch, memory, rank, cached):
        tensor.fill_(7)
    for name, value in changes:
        if name in arguments:
            with pytest.raises(RuntimeError):
                kernels._run(kernel, *(arguments | {name: value}).values())
        assert all((tensor == 7).all() for tensor in (scratch, memory, rank, cached)), name
    kernels._run(kernel, *arguments.values())
    assert not (cached == 7).all() or not (rank == 7).all()


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (0.5, 20.0)])
def test_cached_exponentials(scale, softcap, watched):
    """Factor times cached is -d log p / d logit rounded once, at the target too, in both sweeps; 0 in a NaN row."""
    case = head(300, 24, 515, bias=False)
    case.hidden[:8] = case.weight[case.targets[:8]] * 4  # likely targets
    case.hidden[260] *= -100  # its pair of row blocks is swept twice
    case.hidden[261, 0] = torch.nan
    buffer, factor = case.hidden.new_empty(300 * 520), torch.empty(1, 300, device=PLACE["device"])
    value = kernels.score(case.hidden, Head(case.weight, None, scale, softcap), case.targets, [buffer], factor)[0]
    assert value[:8].exp().max() > 0.9
    own = case.targets[:, None]
    z = reference.logits_of(case.hidden.double() @ case.weight.double().T, None, scale, softcap)
    expected = z.softmax(1).scatter(1, own, torch.expm1(z.log_softmax(1)).gather(1, own))
    expected *= 1 - (z / softcap) ** 2 if softcap else 1
    cached = buffer.view(300, 520)[:, :515]
    error = (factor[0, :, None] * cached.double() - expected).abs()
    finite = torch.arange(300, device=own.device) != 261
    assert (error <= 2**-8 * expected.abs() + 2e-6)[finite].all()
    assert factor[0, 261].isnan()
    assert not cached[261].any()


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 300, *slow(8192)])
@pytest.mark.parametrize("equal", [True, False])
def test_rows_of_equal_targets(rows, equal, watched):
    """One target in all rows, or in runs of them, gets the sum of its rows, with the same bits each time."""
    case = head(rows, 16, 300)
    case.targets[:] = 7 if equal else torch.arange(rows, device=PLACE["device"]) // 130
    actual = evaluate(linear_log_likelihood, case, 1 + unit(rows))
    assert_right(actual, truth(case, 1 + unit(rows)), torch.bfloat16)
    assert_equal(evaluate(linear_log_likelihood, case, 1 + unit(rows)), actual)


@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "offset"), [(1, 0), (72, 0), (75, 0), (72, 1), (1544, 0)])
def test_scaled_rows(width, offset, dtype, to, watched):
    """Each row is multiplied by its factor and rounded once; coefficient 0 gives zeros, of NaN too."""
    where = torch.device(PLACE["device"])
    x = torch.randn(13, width + 8, device=where).to(dtype)[:, offset : offset + width]
    out = torch.full((13, width + 8), 7.0, dtype=to, device=where)
    coefficients, factor = unit(13), 1 + torch.rand(13, device=where)
    coefficients[6], x[6] = 0, torch.nan
    matrices = (*kernels._matrix(x), *kernels._matrix(out[:, offset : offset + width]))
    kernels._run("kept_scale_rows", 13, width, 0.5, coefficients, factor, *matrices)
    expected = (-0.5 * coefficients * factor)[:, None].double() * x.double().nan_to_num()
    assert_agree([out[:, offset : offset + width]], [expected], torch.finfo(to).eps)
    assert (out[:, :offset] == 7).all()
    assert (out[:, offset + width :] == 7).all()
