"""The kernels for compute capability 9.0, and the portable ones: the CUDA sources themselves on an emulator, through the ops, against float64."""

import ctypes
import importlib.util
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from heads import Case, assert_agree, assert_equal, cast, make, op_module, plain, plain_from_logits, statistics_module
from torch.utils.flop_counter import FlopCounterMode

from pyunlearn.ops import (
    _backend,
    _kernels,
    _passes,
    _plan,
    example_objective,
    linear_log_likelihood,
    log_likelihood,
    reference,
    token_statistics,
    weighted_log_likelihood,
)
from pyunlearn.ops.hopper import dispatch, kernels, selftest

EMULATOR = Path(__file__).parent / "emulator"


class Watched:
    """An extension that counts the calls of each function, and keeps the arguments of the last."""

    def __init__(self, module):
        self.module, self.calls, self.last = module, Counter(), {}

    def __getattr__(self, name):
        def call(*arguments):
            self.calls[name] += 1
            self.last[name] = arguments
            return getattr(self.module, name)(*arguments)

        return call


@pytest.fixture(scope="session")
def extension(tmp_path_factory):
    """csrc/bindings.cpp with the CUDA kernels, built for the emulator."""
    if _backend.on_cpu().kernels == "reference":
        pytest.skip("the reference backend calls no kernels")
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
        pytest.skip("the emulator is written for x86-64 and Linux")
    sys.path.insert(0, str(EMULATOR))
    try:
        from build import build

        path = build(tmp_path_factory.mktemp("emulator"))
    except FileNotFoundError:
        pytest.skip("no g++ here")
    except subprocess.CalledProcessError as error:
        pytest.fail(error.stderr.decode()[-3000:])
    finally:
        sys.path.remove(str(EMULATOR))
    spec = importlib.util.spec_from_file_location("_C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, ctypes.CDLL(str(path))


@pytest.fixture
def emulated(extension, monkeypatch, poisoned):
    """A machine of 4 multiprocessors, which runs CPU tensors; memory that no kernel has filled reads NaN."""
    module, library = extension
    library.set_machine(4, 0)
    watched = Watched(module)
    monkeypatch.setattr(_backend, "_C", watched)
    monkeypatch.setattr(dispatch, "run_on", lambda device: True)
    monkeypatch.setitem(PLACE, "device", "cpu")
    return watched


@pytest.fixture(params=["emulator", pytest.param("gpu", marks=pytest.mark.cuda)])
def watched(request, monkeypatch, poisoned):
    """The extension on the emulator, then on a GPU of compute capability 9.0."""
    if request.param == "emulator":
        return request.getfixturevalue("emulated")
    if not dispatch.run_on(torch.device("cuda")):
        pytest.skip(f"the Hopper kernels do not run here: {dispatch.status()}")
    watched = Watched(_backend.extension())
    monkeypatch.setattr(_backend, "_C", watched)
    monkeypatch.setitem(PLACE, "device", "cuda")
    return watched


PLACE = {"device": "cpu"}  # where the cases of a test lie


def head(rows, width, vocabulary, *, dtype=torch.bfloat16, **options):
    """A case that these kernels serve."""
    return make(rows, width, vocabulary, dtype=dtype, device=PLACE["device"], **options)


def truth(case, coefficients, **options):
    """Log-likelihoods and gradients, by the definition in float64."""
    hidden, weight, bias = (None if t is None else t.double().requires_grad_() for t in case[:3])
    value = plain(hidden, weight, case.targets, bias=bias, **options)
    value.backward(torch.where(case.targets == -100, 0, coefficients.double()))
    return [value.detach(), *(t.grad for t in (hidden, weight, bias) if t is not None)]


def evaluate(op, case, coefficients, *, times=1, **options):
    """The same by the op."""
    hidden, weight, bias = (None if t is None else t.clone().requires_grad_() for t in case[:3])
    value = op(hidden, weight, case.targets, bias=bias, **options)
    for _ in range(times):
        for t in (hidden, weight, bias):
            if t is not None:
                t.grad = None
        value.backward(coefficients if value.dim() else None, retain_graph=True)
    return [value.detach(), *(t.grad for t in (hidden, weight, bias) if t is not None)]


def right(found, wanted, dtype):
    """Values to what float32 sums hold, gradients to what 16 bits hold."""
    assert_agree(found[:1], wanted[:1], 1e-5)
    assert_agree(found[1:], wanted[1:], 1.5e-2 if dtype is torch.bfloat16 else 2e-3)


def unit(rows):
    """Coefficients."""
    return torch.linspace(-1, 1, rows, device=PLACE["device"])


# ---------------------------------------------------------------- the kernels, through the ops


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.5, "softcap": 3.0}])
@pytest.mark.parametrize("workspace", [0, None])
@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(1, 8, 1), (5, 72, 1003), (300, 40, 515), (130, 1544, 259)])
def test_values_and_gradients(rows, width, vocabulary, workspace, options, dtype, watched):
    """Of every width and vocabulary, kept and recomputed, agree with float64; the portable kernels have no part in it."""
    case = head(rows, width, vocabulary, dtype=dtype, bias=bool(options), masked=0.3 * (rows > 1))
    found = evaluate(linear_log_likelihood, case, unit(rows), workspace=workspace, **options)
    right(found, truth(case, unit(rows), **options), dtype)
    kept = workspace is None and dtype is torch.bfloat16
    assert watched.calls["hopper_statistics_kept"] == kept
    assert watched.calls["hopper_statistics"] == (not kept)
    assert (watched.calls["hopper_gradient"] > 0) == (not kept)
    assert (watched.calls["kept_hidden_gradient"] > 0) == kept
    assert not watched.calls["statistics"] + watched.calls["gradient"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("processors", [2, 6, 14])
def test_any_order_gives_the_same_bits(processors, seed, emulated, extension):
    """Whatever runs first, and however many clusters share the work, each count of them repeats bit for bit."""
    case = head(270, 48, 520)
    extension[1].set_machine(processors, 100)
    wanted = evaluate(linear_log_likelihood, case, unit(270))
    extension[1].set_machine(processors, seed)
    assert_equal(evaluate(linear_log_likelihood, case, unit(270)), wanted)


@pytest.mark.parametrize("offset", [-1e4, -160.0, 160.0, 1e4])
@pytest.mark.parametrize("workspace", [0, None])
def test_common_offset(offset, workspace, watched):
    """A constant on all logits costs neither values nor gradients a digit that float32 products have."""
    case = head(6, 16, 500, dtype=torch.float32)
    case = cast(Case(*((t.clamp(-2, 2) * 8).round() / 8 for t in case[:3]), case.targets), dtype=torch.bfloat16)
    case = case._replace(bias=case.bias.float())
    shifted = case._replace(bias=case.bias + offset)
    found = evaluate(linear_log_likelihood, shifted, unit(6), workspace=workspace)
    right(found, truth(case, unit(6)), torch.bfloat16)


@pytest.mark.parametrize("workspace", [0, None])
def test_rows_out_of_range(workspace, watched):
    """Rows so surprising that their exponentials leave the range, a NaN and an impossible target spoil no other row."""
    case = head(300, 16, 576)  # whole steps of 32: for a rest, oneDNN's AMX products read a NaN of the next row
    case.hidden[7] *= 200
    case.hidden[260] *= -100
    right(evaluate(linear_log_likelihood, case, unit(300), workspace=workspace), truth(case, unit(300)), torch.bfloat16)
    case.hidden[9, 3] = torch.nan
    case.bias[5], case.targets[11] = -torch.inf, 5
    others = torch.tensor([i for i in range(300) if i not in (9, 11)], device=PLACE["device"])
    found = linear_log_likelihood(*case[:2], case.targets, bias=case.bias, workspace=workspace)
    assert found[9].isnan()
    assert found[11] == -torch.inf
    clean = Case(case.hidden[others], case.weight, case.bias, case.targets[others])
    assert_agree([found[others]], truth(clean, unit(298))[:1], 1e-5)
    weights = unit(300)
    weights[[9, 11]] = 0
    found = evaluate(linear_log_likelihood, case, weights, workspace=workspace)
    wanted = truth(clean, weights[others])
    right([found[0][others], found[1][others]], wanted[:2], torch.bfloat16)
    assert not found[1][9].any()


def test_targets_outside_the_vocabulary(watched, monkeypatch):
    """Get NaN and rank -1, as on any GPU, and disturb no other row."""
    case = head(40, 24, 300)
    wanted = truth(case, unit(40))[0]
    for module in (op_module, statistics_module, _passes):
        monkeypatch.setattr(module, "check_targets", lambda *_: None)
    case.targets[3], case.targets[4], case.targets[5] = 300, -1, 1 << 40
    found = token_statistics(*case[:2], case.targets, bias=case.bias)
    assert found.log_likelihood[3:6].isnan().all()
    assert (found.rank[3:6] == -1).all()
    assert_agree([found.log_likelihood[6:]], [wanted[6:]], 1e-5)
    assert linear_log_likelihood(*case[:2], case.targets, bias=case.bias)[3:6].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0}])
@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(1, 8, 2), (70, 72, 1003), (300, 1544, 300)])
def test_token_statistics(rows, width, vocabulary, options, dtype, watched):
    """All four fields agree with float64; equal tokens do not stand before the target, impossible ones before nothing."""
    case = head(rows, width, vocabulary, dtype=dtype, masked=0.2 * (rows > 1))
    case.weight[1], case.bias[1] = case.weight[0], case.bias[0]
    case.targets[0] = 0
    found = token_statistics(*case[:2], case.targets, bias=case.bias, **options)
    z = case.hidden.double() @ case.weight.double().T + case.bias.double()
    z = 4 * torch.tanh(z / 4) if options else z
    live = case.targets != -100
    wanted = reference.token_statistics_of(z[live], case.targets[live])
    assert_agree([x[live] for i, x in enumerate(found) if i != 1], [wanted[0], *wanted[2:]], 2e-5)
    z, at = z[live], case.targets[live][:, None]
    surely = (z > z.gather(1, at) + 1e-3).sum(1)
    assert ((found.rank[live] <= wanted[1]) & (found.rank[live] >= surely)).all()
    assert found.rank[0] <= wanted[1][0]
    assert not any(x[~live].any() for x in found)
    assert watched.calls["hopper_statistics"] == 1
    assert not watched.calls["token_statistics"]


def test_rank_of_an_impossible_target(watched):
    """Every possible token stands before it, and nothing else does."""
    case = head(4, 8, 300)
    case.bias[100:200], case.targets[2] = -torch.inf, 150
    found = token_statistics(*case[:2], case.targets.clamp(max=99), bias=case.bias)
    assert found.rank.max() < 200
    case.targets[:] = 150
    found = token_statistics(*case[:2], case.targets, bias=case.bias)
    assert found.rank.tolist() == [200] * 4
    assert found.entropy.isfinite().all()
    assert found.variance.isfinite().all()


@pytest.mark.parametrize("kernel", ["hopper_statistics", "hopper_statistics_kept", "hopper_gradient"])
def test_what_is_refused_is_refused_before_anything_is_launched(kernel, emulated):
    """Memory, strides and sizes that they do not take are a sentence, and nothing was written; they are all looked at first."""
    case = head(40, 16, 300, bias=False)
    room, memory, rank = torch.empty(5, 40), torch.empty(1 << 16), torch.empty(40, dtype=torch.int64)
    kept = torch.empty(40, 304, dtype=torch.bfloat16)
    given = {
        "hidden": case.hidden,
        "weight": case.weight,
        "dtype": 1,
        "n": 40,
        "d": 16,
        "v": 300,
        "hidden_stride": 16,
        "weight_stride": 16,
    }
    given |= {"bias": None, "bias_dtype": 0, "scale": 1.0, "softcap": 3.0, "targets": case.targets}
    if kernel == "hopper_gradient":
        given |= {"first_column": 0, "coefficients": unit(40)}
    given |= {"log_likelihood": room[0], "maximum": room[1], "total": room[2]}
    if kernel == "hopper_statistics":
        given |= {"entropy": room[3], "variance": room[4], "rank": rank, "threshold": None, "workspace": memory}
    elif kernel == "hopper_statistics_kept":
        given |= {"kept": kept, "kept_stride": 304, "factor": room[3], "workspace": memory}
    else:
        given |= {"result": kept, "kept_stride": 304}
    changes = [
        ("d", 12),
        ("d", 1 << 26),
        ("v", 0),
        ("dtype", 0),
        ("weight", case.weight.flatten()[1:]),
        ("hidden_stride", 20),
    ]
    changes += [("kept_stride", 296), ("kept_stride", 301), ("workspace", memory[1:])]
    for tensor in (room, memory, rank, kept):
        tensor.fill_(7)
    for name, value in changes:
        if name in given:
            with pytest.raises(RuntimeError):
                kernels._run(kernel, *(given | {name: value}).values())
        assert all((tensor == 7).all() for tensor in (room, memory, rank, kept)), name
    kernels._run(kernel, *given.values())
    assert not (kept == 7).all() or not (rank == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize(("width", "offset"), [(1, 0), (72, 0), (75, 0), (72, 1)])
def test_rows_of_equal_targets(width, offset, softcap, dtype, watched):
    """Targets that occur once, 16, 128 and 300 times get the sum of their rows; a row with coefficient 0 is not read; other targets change nothing."""
    where = torch.device(PLACE["device"])
    times = {2: 1, 3: 16, 5: 128, 8: 300, -100: 7, 11: 2, -1: 1}
    targets = torch.tensor([t for t, n in times.items() for _ in range(n)], device=where)
    targets = targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(0)).to(where)]
    n = len(targets)
    room = torch.randn(n, width + 8, device=where).to(dtype)
    hidden, d_weight = room[:, offset : offset + width], torch.randn(11, width, device=where)
    coefficients, value = unit(n), -torch.rand(n, device=where)
    unread = (targets == 8).nonzero()[::7, 0]
    coefficients[unread], hidden[unread] = 0, torch.nan
    maximum, total = torch.randn(n, device=where), 1 + torch.rand(n, device=where)
    slope = (1 - ((value + total.log() + maximum) / 4).double() ** 2).clamp(min=0) if softcap else 1
    b = coefficients.double() * 0.5 * -torch.expm1(value.double()) * slope
    inside = (targets >= 0) & (targets < 11) & (coefficients != 0)
    wanted = d_weight.double().index_add(0, targets[inside], b[inside, None] * hidden[inside].double())
    rows = (n, width, 11, 0.5, softcap, targets, coefficients, coefficients, value, maximum, total)
    matrices = (*kernels._matrix(hidden), *torch.sort(targets, stable=True), *kernels._matrix(d_weight))
    kernels._run("kept_add_targets", *rows, *matrices)
    assert_agree([d_weight], [wanted], 2e-6)


# ---------------------------------------------------------------- how the ops use them


@pytest.mark.parametrize("trained", ["hidden", "weight", "both"])
@pytest.mark.parametrize("workspace", [0, None])
def test_frozen_parts(trained, workspace, watched):
    """What wants no gradient costs no product, and torch makes none but those of the gradients."""
    case = head(64, 32, 600, bias=False)
    hidden, weight = case.hidden.clone(), case.weight.clone()
    hidden.requires_grad_(trained != "weight"), weight.requires_grad_(trained != "hidden")
    with FlopCounterMode(display=False) as counter:
        weighted_log_likelihood(hidden, weight, case.targets, unit(64), workspace=workspace).backward()
    wanted = truth(case, unit(64))
    found = [t.grad for t in (hidden, weight) if t.requires_grad]
    assert_agree(found, [w for w, t in zip(wanted[1:], (hidden, weight), strict=True) if t.requires_grad], 1.5e-2)
    assert counter.get_total_flops() == 2 * 64 * 32 * 600 * len(found)
    assert watched.calls["kept_add_targets"] == (workspace is None and trained != "hidden")


def test_backward_twice(watched):
    """A graph that is kept gives the same gradients again; under `release` the second time from the logits once more."""
    case = head(64, 32, 600)
    wanted = truth(case, unit(64))
    right(evaluate(linear_log_likelihood, case, unit(64), times=2), wanted, torch.bfloat16)
    assert watched.calls["hopper_gradient"] == 1


@pytest.mark.parametrize(
    "workspace", [None, _plan.bytes_of_sum(600, 32, torch.bfloat16) + 15 * (1200 + _plan._FUSED_SCRATCH)]
)
@pytest.mark.parametrize("masked", [0.0, 0.5])
def test_one_pass(workspace, masked, watched, monkeypatch):
    """Where coefficients are known, rows go in chunks that are kept whole, and nothing is multiplied twice."""
    monkeypatch.setattr(_plan, "balance", lambda *_: 0)
    case = head(100, 32, 600, masked=masked)
    wanted = truth(case, unit(100))
    value = (wanted[0] * unit(100)).sum()[None]
    found = evaluate(
        lambda h, w, t, **options: weighted_log_likelihood(h, w, t, unit(100), **options),
        case,
        None,
        workspace=workspace,
    )
    right([found[0][None], *found[1:]], [value, *wanted[1:]], torch.bfloat16)
    live = int((case.targets >= 0).sum())
    assert watched.calls["hopper_statistics_kept"] == (1 if workspace is None else -(-live // 15))
    assert not watched.calls["hopper_gradient"]
    assert not watched.calls["statistics"]


def test_example_objective(watched):
    """A function of each example's sum, differentiated on the sums that these kernels made."""
    case = head(60, 32, 600)
    index = torch.arange(60, device=PLACE["device"]) // 12
    hidden, weight = (t.clone().requires_grad_() for t in case[:2])

    def function(sums, counts):
        return torch.nn.functional.softplus(sums / counts)

    found = example_objective(hidden, weight, case.targets, index, function, bias=case.bias)
    found.loss.backward()
    h, w = (t.double().requires_grad_() for t in case[:2])
    sums = plain(h, w, case.targets, bias=case.bias.double()).view(5, 12).sum(1)
    function(sums, 12).sum().backward()
    assert_agree([found.log_likelihood], [sums], 1e-5)
    assert_agree([hidden.grad, weight.grad], [h.grad, w.grad], 1.5e-2)
    assert watched.calls["hopper_statistics_kept"] == 1


@pytest.mark.parametrize("change", ["float32", "width", "stride", "offset", "transposed"])
def test_what_they_do_not_serve(change, watched):
    """Other types, widths and alignments run on the portable kernels, and say the same."""
    case = head(10, 16, 200, bias=False)
    wanted = truth(case, unit(10))[0]
    hidden, weight = case.hidden, case.weight
    if change == "float32":
        hidden, weight = hidden.float(), weight.float()
    elif change == "width":
        hidden, weight = hidden[:, :12], weight[:, :12]
        wanted = plain(hidden.double(), weight.double(), case.targets)
    elif change == "stride":
        weight = weight.new_zeros(200, 20)[:, :16].copy_(weight)
    elif change == "offset":
        weight = weight.new_zeros(200, 24)[:, 4:20].copy_(weight)
    else:
        weight = weight.T.contiguous().T
    assert not dispatch.serves(hidden, weight)
    assert_agree([linear_log_likelihood(hidden, weight, case.targets)], [wanted], 1e-5)
    assert watched.calls["statistics"]
    assert not watched.calls["hopper_statistics"]


def test_strided_weight_and_memory_from_elsewhere(emulated):
    """Rows that begin at 16 bytes are taken as they lie; memory that does not is copied first."""
    case = head(10, 16, 200, bias=False)
    wanted = truth(case, unit(10))
    strided = case._replace(weight=torch.zeros(200, 32, dtype=torch.bfloat16)[:, 8:24].copy_(case.weight))
    assert dispatch.serves(strided.hidden, strided.weight)
    assert_agree([linear_log_likelihood(*strided[:2], case.targets)], wanted[:1], 1e-5)
    assert emulated.last["hopper_statistics"][1] == strided.weight.data_ptr()
    store = bytearray(200 * 16 * 2 + 16)
    odd = next(
        t
        for t in (torch.frombuffer(store, dtype=torch.bfloat16, offset=o, count=3200) for o in (2, 4))
        if t.data_ptr() % 16
    )
    odd = odd.view(200, 16).copy_(case.weight)
    assert_agree([linear_log_likelihood(case.hidden, odd, case.targets)], wanted[:1], 1e-5)


def test_the_self_test_passes_and_can_fail(emulated, monkeypatch):
    """The first-use check accepts these kernels, twice in a row, and says so when one is wrong, or gives other numbers the second time."""
    assert selftest.compare(torch.device("cpu"), times=2) is None
    good, broken = kernels._run, []

    def bad(kernel, *arguments):
        good(kernel, *arguments)
        if kernel == broken[-1]:
            found = [a for a in arguments if isinstance(a, torch.Tensor) and a.is_floating_point()]
            found[3 if kernel == "hopper_statistics" else -1].mul_(1.1)

    monkeypatch.setattr(kernels, "_run", bad)
    for kernel in ("hopper_gradient", "kept_scale_hidden", "kept_hidden_gradient", "kept_add_targets"):
        broken.append(kernel)
        assert "wrong gradients" in selftest.compare(torch.device("cpu"))
    broken.append("hopper_statistics")
    assert "wrong numbers" in selftest.compare(torch.device("cpu"))
    broken.append(None)
    found, calls = selftest._kernel_outputs, []

    def drifting(case):
        statistics, gradients = found(case)
        calls.append(case)
        return [statistics[0] + 1e-6 * len(calls), *statistics[1:]], gradients

    monkeypatch.setattr(selftest, "_kernel_outputs", drifting)
    assert "other numbers" in selftest.compare(torch.device("cpu"), times=2)


def test_they_are_tried_out_unless_left_out_by_name(monkeypatch):
    """PYUNLEARN_HOPPER=0 leaves them out, 1 does without the trial; another value is an error that says what is wanted."""
    for value in ("", "0", "1"):
        monkeypatch.setenv("PYUNLEARN_HOPPER", value)
        assert dispatch.requested() == value
    monkeypatch.setenv("PYUNLEARN_HOPPER", "0")
    assert not dispatch.run_on(torch.device("cuda", 0))
    monkeypatch.setenv("PYUNLEARN_HOPPER", "yes")
    with pytest.raises(ValueError, match="PYUNLEARN_HOPPER must be 1 or 0, got 'yes'"):
        dispatch.requested()


@pytest.mark.parametrize("value", ["", "1"])
def test_a_kernel_that_is_wrong_is_left_out_with_one_warning(value, gpu_0, monkeypatch):
    """And the portable ones run."""
    monkeypatch.setenv("PYUNLEARN_HOPPER", value)
    monkeypatch.setattr(selftest, "compare" if value else "run_trial", lambda device: "they gave wrong numbers")
    with pytest.warns(UserWarning, match="Hopper kernels are not used on cuda:0: they gave wrong numbers"):
        assert not dispatch._usable(0)
    assert not dispatch._usable(0)


def test_other_gpus_and_builds_hear_nothing_unless_they_asked(gpu_0, monkeypatch, recwarn):
    """A GPU that they are not for goes on in silence; with PYUNLEARN_HOPPER=1 it is told why."""
    monkeypatch.setattr(_backend, "_C", SimpleNamespace(hopper_unavailable=lambda: "no such GPU"))
    monkeypatch.delenv("PYUNLEARN_HOPPER", raising=False)
    assert not dispatch._usable(0)
    assert not recwarn
    monkeypatch.setenv("PYUNLEARN_HOPPER", "1")
    dispatch._usable.cache_clear()
    with pytest.warns(UserWarning, match="not used on cuda:0: no such GPU"):
        assert not dispatch._usable(0)


@pytest.fixture
def gpu_0(emulated, monkeypatch):
    """The emulator taken for a GPU, of which nothing is known yet."""
    monkeypatch.setattr(torch.cuda, "device", lambda index: torch.no_grad())
    dispatch._usable.cache_clear()
    yield
    dispatch._usable.cache_clear()


def test_a_trial_is_a_process_of_its_own(gpu_0, tmp_path, monkeypatch):
    """It sees what this process sees; what it says in the end, a fault that kills it and one that hangs are sentences; a pass is remembered, a failure not."""
    run = selftest._run_in_subprocess
    assert run("sys.exit(None)") is None
    assert (
        run("sys.exit('they gave wrong numbers for ' + str(WIDE[0]))")
        == f"they gave wrong numbers for {selftest.WIDE[0]}"
    )
    assert (
        run("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)") == "the process that tested them ended with -11"
    )
    assert "did not finish within 0.2 s (PYUNLEARN_HOPPER=0 skips it)" in run("while True: pass", seconds=0.2)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere"))
    assert "no process could be started" in run("pass")

    asked = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(_backend, "_C", SimpleNamespace(__file__=__file__, build_info=lambda: {"cuda_driver": 13000}))
    for problem in ("it hangs", None):
        monkeypatch.setattr(
            selftest, "_run_in_subprocess", lambda statement, problem=problem: asked.append(statement) or problem
        )
        assert selftest.run_trial(0) == problem
    assert selftest.run_trial(0) is None
    assert len(asked) == 2
    compile(asked[0], "the statement", "exec")
    assert selftest.run_trial(1) is None  # another GPU is tried for itself
    assert len(asked) == 3


# ---------------------------------------------------------------- the portable CUDA kernels, on the same emulator


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.5, "softcap": 3.0}])
@pytest.mark.parametrize("workspace", [0, None])
@pytest.mark.parametrize(("rows", "vocabulary"), [(3, 1), (9, 1003), (3, 2500), (2, 9001)])
def test_portable_kernels(rows, vocabulary, workspace, options, dtype, emulated, monkeypatch):
    """Narrow and wide rows, any alignment: values, gradients and statistics agree with float64."""
    monkeypatch.setattr(dispatch, "run_on", lambda device: False)
    case = head(rows, 12, vocabulary, dtype=dtype, bias=bool(options))
    wanted = truth(case, unit(rows), **options)
    found = evaluate(linear_log_likelihood, case, unit(rows), workspace=workspace, **options)
    right(found, wanted, dtype)
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
    """Narrow and wide rows, of one alignment or two, impossible tokens on either side: sums and gradients agree with float64, twice to the bit."""
    x, y = torch.randn(2, rows, columns + 8)
    x, y = x[:, offset : offset + columns], y[:, other_offset : other_offset + columns]
    if columns > 1:
        y[:, 5], x[:, 7], y[:, 7], y[1, columns - 2] = -torch.inf, -torch.inf, -torch.inf, -torch.inf
    x[rows - 1, columns // 2] = torch.nan
    biases = torch.randn(columns), torch.randn(columns)
    targets = torch.arange(rows) * (columns // rows)
    rest = (0.7, 3.0, targets, shift)

    def found(run, x, y, biases, out):
        maximum, total = x.new_full((2, rows), -torch.inf), x.new_zeros(2, rows)
        cross = x.new_zeros(rows)
        for begin, end in ((0, columns // 3), (columns // 3, columns)) if columns > 3 else ((0, columns),):
            parts = [t[:, begin:end] for t in (x, y)], [t[begin:end] for t in biases]
            _kernels.kl_statistics(run, *parts[0], begin, parts[1], *rest, maximum, total, cross)
        _kernels.kl_gradient(run, x, y, 0, biases, *rest, maximum, total, unit(rows).to(x.dtype), out)
        return [maximum[:, :-1], total[:, :-1], (cross / total[1])[:-1], out[:-1]], [maximum, total, cross, out]

    wide = [t.double() for t in (x, y, *biases)]
    wanted = found(reference, *wide[:2], wide[2:], torch.empty(rows, columns, dtype=torch.float64))[0]
    twice = [found(emulated.module, x, y, biases, torch.empty(rows, columns, dtype=dtype)) for _ in range(2)]
    assert_equal(*([t.nan_to_num(nan=7) for t in each[1]] for each in twice))
    assert twice[0][1][1][0, -1].isnan()
    if columns > 1 or shift != torch.inf:  # otherwise the reference has no mass at all
        assert all(
            torch.allclose(f.double(), w, rtol=2e-5, atol=2e-5)
            for f, w in zip(twice[0][0][:3], wanted[:3], strict=True)
        )
        assert_agree(twice[0][0][3:], wanted[3:], 1e-5 if dtype is torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float64_bias(dtype, emulated):
    """Beside narrower rows it is taken as float32, on a GPU as on the CPU; its gradient is float64 again."""
    case = head(9, 16, 1003, dtype=dtype)._replace(bias=torch.randn(1003, dtype=torch.float64))
    found = evaluate(linear_log_likelihood, case, unit(9))
    right(found, truth(case, unit(9)), dtype)
    assert found[3].dtype is torch.float64
    logits = case.hidden @ case.weight.T
    wanted = plain_from_logits(logits.double(), case.targets, bias=case.bias)
    assert_agree([log_likelihood(logits, case.targets, bias=case.bias.detach())], [wanted], 1e-5)


def test_the_portable_self_test_passes_and_can_fail(emulated, monkeypatch):
    """Every kernel of every width runs in it, and one wrong number in a wide row is seen."""
    assert _backend._self_test_problem(torch.device("cpu")) is None
    statistics = emulated.module.statistics

    def wrong_where_wide(*arguments):
        statistics(*arguments)
        if arguments[5] == 9001:  # columns; then targets at 11, maximum at 12, sum at 13
            (ctypes.c_float * 5).from_address(arguments[13])[3] *= 1.01

    monkeypatch.setattr(_backend, "_C", SimpleNamespace(**{n: getattr(emulated.module, n) for n in ("gradient", "token_statistics", "target_products", "kl_statistics", "kl_gradient")}, statistics=wrong_where_wide))  # fmt: skip
    assert "wrong numbers" in _backend._self_test_problem(torch.device("cpu"))
