"""The first use of the Hopper kernels: their self-test, what it sees, and what becomes of its outcome."""

import multiprocessing
import os
import stat
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from coverings import slow
from heads import Allocations

from pyunlearn.ops import _backend, reference
from pyunlearn.ops.hopper import dispatch, kernels, record, selftest, trial

CPU = torch.device("cpu")
TINY = ((300, 72, 1003),)


# ---------------------------------------------------------------- what the self-test sees


@pytest.mark.emulator
@pytest.mark.full
@pytest.mark.parametrize("shape", [*TINY, *slow(((40, 1544, 325),), ((1600, 16, 325),))])
def test_right_kernels_pass(shape, emulated):
    """Shapes like those of the short test, with fewer products: short and long k-steps, two groups of row pairs."""
    assert selftest.compare(CPU, (shape,), times=2) is None


@pytest.mark.emulator
@pytest.mark.full
@pytest.mark.parametrize("dtype", selftest.TOLERANCE)
def test_cut_sums_of_large_logits_pass(dtype, emulated):
    """Rows with logits of 700, cut as tensor cores cut them at a D of 2048, use half of the allowance at most."""
    case = selftest._case((140, 2048, 515), dtype, False, CPU)
    expected = selftest._definition(case)
    log_likelihood = selftest._statistics(case, None)[0]
    error = (log_likelihood.double() - expected.log_likelihood).abs()
    assert (error[case.far] <= 5e-6 * expected.largest[case.far]).all()
    assert selftest._statistics_right(selftest._statistics(case, None), case=case, expected=expected)


@pytest.mark.emulator
@pytest.mark.full
@pytest.mark.parametrize("kernel", ["hopper_gradient", "kept_scale_rows", "hopper_statistics"])
def test_a_wrong_kernel_is_seen(kernel, emulated, monkeypatch):
    """A kernel whose last output is a tenth too large fails the test."""
    right = kernels._run

    def wrong(name, *arguments):
        right(name, *arguments)
        if name == kernel:
            tensors = [a for a in arguments if isinstance(a, torch.Tensor) and a.is_floating_point()]
            tensors[3 if kernel == "hopper_statistics" else -1].mul_(1.1)

    monkeypatch.setattr(kernels, "_run", wrong)
    assert "wrong numbers" in selftest.compare(CPU, TINY)


@pytest.mark.emulator
@pytest.mark.full
def test_other_numbers_the_second_time_are_seen(emulated, monkeypatch):
    """Statistics that change by 1e-6 from run to run fail the test."""
    statistics, calls = selftest._statistics, []

    def drifting(case, threshold):
        calls.append(case)
        log_likelihood, *others = statistics(case, threshold)
        return [log_likelihood + 1e-6 * len(calls), *others]

    monkeypatch.setattr(selftest, "_statistics", drifting)
    assert "other numbers" in selftest.compare(CPU, TINY, times=2)


def defined_statistics(case, threshold):
    """What the statistics kernel should return."""
    log_likelihood, rank, *moments, positive, _, _ = selftest._definition(case)
    return [log_likelihood.float(), rank if threshold is None else positive, *(x.float() for x in moments)]


def defined_gradients(case, workspace):
    """What the gradient kernels should return, in the memory that they take."""
    (n, _), vocabulary = case.h.shape, case.head.weight.shape[0]
    cache = case.h.new_empty((n, vocabulary)) if workspace else case.h.new_empty((n, 16384))
    log_sum = selftest._definition(case).log_sum
    outputs = [torch.zeros(x.shape) for x in (case.h, case.head.weight)]
    bias = [] if case.head.bias is None else [torch.zeros(vocabulary)]
    for columns in selftest._slices(vocabulary, 512):
        z = selftest._logits(case, slice(None), columns)
        at = case.targets[:, None] == torch.arange(columns.start, columns.stop)
        g = (at.double() - (z - log_sum[:, None]).exp()) * case.coefficients[:, None] * case.head.logit_scale
        g = g * (1 - (z / case.head.softcap) ** 2) if case.head.softcap else g
        outputs[0] += g @ case.head.weight[columns].double()
        outputs[1][columns] = (g.T @ case.h.double()).float()
        for x in bias:
            x[columns] = g.sum(0).float()
    del cache
    return [selftest._definition(case).log_likelihood.float(), *outputs, *bias]


@pytest.fixture
def by_definition(monkeypatch):
    """Kernels that are right."""
    monkeypatch.setattr(selftest, "_statistics", defined_statistics)
    monkeypatch.setattr(selftest, "_gradients", defined_gradients)
    define, defined = selftest._definition, {}

    def once(case):
        if case.h not in defined:
            defined.clear()
            defined[case.h] = define(case)
        return defined[case.h]

    monkeypatch.setattr(selftest, "_definition", once)


def test_the_definition_in_parts_is_the_definition(by_definition):
    """Outputs by the definition pass, at a vocabulary of several parts."""
    assert selftest.compare(CPU, ((70, 24, 3000),), times=2) is None


def test_one_lost_column_is_seen(by_definition, monkeypatch):
    """A statistics kernel that leaves out one of 16,411 columns fails, for each dtype, with and without a softcap."""
    right = defined_statistics

    def lossy(case, threshold):
        z = selftest._logits(case, slice(None), slice(None))
        log_likelihood, *others = right(case, threshold)
        lost = -torch.log1p(-(z[:, 5000] - z.logsumexp(1)).exp())
        return [log_likelihood + lost.float(), *others]

    monkeypatch.setattr(selftest, "_statistics", lossy)
    for dtype in selftest.TOLERANCE:
        for capped in (True, False):
            monkeypatch.setattr(selftest, "TOLERANCE", {dtype: 1.0})
            monkeypatch.setattr(selftest, "product", lambda shapes, dtypes, _, c=capped: [(shapes[0], *dtypes, c)])
            assert "wrong numbers" in selftest.compare(CPU, ((64, 72, 16411),))


def test_rows_with_large_logits_do_not_fail_by_chance(by_definition, monkeypatch):
    """Logits of the far rows that are off by 5e-6 of the largest pass: entropy and variance hang on them."""

    def rounded(case, threshold):
        z = selftest._logits(case, slice(None), slice(None))
        noise = torch.rand(z.shape, generator=torch.Generator().manual_seed(1)).double() * 2 - 1
        z += noise * case.far[:, None] * z.abs().amax(1, keepdim=True) * 5e-6
        log_likelihood, _, *moments = reference.token_statistics_of(z, case.targets)
        return [log_likelihood.float(), defined_statistics(case, threshold)[1], *(x.float() for x in moments)]

    monkeypatch.setattr(selftest, "_statistics", rounded)
    for rows in range(60, 80):  # other rows are far, with other logits
        assert selftest.compare(CPU, ((rows, 72, 515),)) is None


@pytest.mark.full
@pytest.mark.parametrize("shape", [*selftest.WIDE[:2], *slow((selftest.WIDE[2],))])
def test_the_long_test_takes_less_than_300_mb(shape, by_definition, monkeypatch):
    """The peak of what is allocated, with gradients in the memory that kernels take."""
    monkeypatch.setattr(selftest, "product", lambda shapes, dtypes, _: [(shape, torch.bfloat16, True)])
    with Allocations() as allocations:
        assert selftest.compare(CPU, times=2) is None
    assert allocations.peak < 300e6


# ---------------------------------------------------------------- what becomes of its outcome


@pytest.mark.full
def test_a_subprocess_says_what_it_showed(tmp_path, monkeypatch):
    """A pass, its last line, a crash, a hang, and that it could not be tried, each on its own."""
    run = trial._run_in_subprocess
    assert run("sys.exit(None)") == ""
    assert run("sys.exit('they gave wrong numbers')") == "they gave wrong numbers"
    assert run("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)") == (
        "the process that tested them ended with -11"
    )
    assert run("sys.stderr.buffer.write(b'a \\xff b'); sys.exit(1)") == "a \ufffd b"
    assert run("while True: pass", seconds=0.2) == "their self-test did not finish within 0.2 s"
    assert run("import os; assert os.environ['PYUNLEARN_HOPPER'] == '0'") == ""
    assert run(f"sys.exit({trial._NOT_TRIED})") is None
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere"))
    assert run("pass") is None
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(trial.subprocess, "Popen", None)  # the application is not started again
    assert run("pass") is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("all devices are busy"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_no_failure(error, monkeypatch):
    """No memory for a second context or for the test, or exclusive mode: the process says that it was not tried."""

    def fails(*_, **options):
        raise error

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "zeros", fails)
    with pytest.raises(SystemExit) as ended:
        trial.trial(0)
    assert ended.value.code == trial._NOT_TRIED
    monkeypatch.undo()
    monkeypatch.setattr(selftest, "_definition", fails)
    if selftest.is_full(error):
        with pytest.raises(RuntimeError):
            selftest.compare(CPU, TINY)
    else:
        assert selftest.compare(CPU, TINY) == "they failed on this GPU: all devices are busy"


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """Names of GPUs, a cache folder, and an extension that is this file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    extension = SimpleNamespace(__file__=__file__, build_info=lambda: {"cuda_driver": 13000})
    monkeypatch.setattr(_backend, "_C", extension)
    return tmp_path / "cache" / "pyunlearn"


def outcomes(monkeypatch, *values):
    """Make the subprocess return these values in turn; return the list of statements that it ran."""
    statements, waiting = [], list(values)
    monkeypatch.setattr(trial, "_run_in_subprocess", lambda s: statements.append(s) or waiting.pop(0))
    return statements


def test_an_outcome_is_remembered(gpus, monkeypatch):
    """A pass for good, a failure for a day, each for one GPU; what could not be tried is tried again."""
    statements = outcomes(monkeypatch, "", "it hangs", "", None, None)
    assert trial.run_trial(0) is None
    assert trial.run_trial(0) is None
    assert statements == ["trial(0)"]
    assert trial.run_trial(1) == "it hangs"
    assert trial.run_trial(1) == "it hangs"
    assert len(statements) == 2
    path = record.record_of(1).path
    os.utime(path, times=(time.time() - 2 * record.DAY,) * 2)
    assert trial.run_trial(1) is None
    assert len(statements) == 3
    short = []
    monkeypatch.setattr(selftest, "compare", lambda device: short.append(device) or "they gave wrong numbers")
    for _ in range(2):
        assert trial.run_trial(2) == "they gave wrong numbers"
    assert short == [torch.device("cuda", 2)] * 2
    assert len(statements) == 5


@pytest.mark.parametrize("problem", ["file", "locked", "no home"])
def test_a_cache_folder_that_cannot_be_used_is_no_error(problem, gpus, tmp_path, monkeypatch):
    """Unreadable, a file, or no home at all: the kernels are tested in each process."""
    place = tmp_path / "cache"
    if problem == "file":
        place.write_text("")
    elif problem == "locked":
        place.mkdir(mode=0)
        if os.access(place, os.W_OK):  # root may do everything
            monkeypatch.setattr(record.Path, "read_text", lambda *_, **__: raise_(PermissionError(13, "denied")))
            monkeypatch.setattr(record.Path, "mkdir", lambda *_, **__: raise_(PermissionError(13, "denied")))
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(record.Path, "home", lambda: raise_(RuntimeError("no home")))
    statements = outcomes(monkeypatch, "", "")
    assert trial.run_trial(0) is None
    assert trial.run_trial(0) is None
    assert len(statements) == 2
    if problem == "locked":
        place.chmod(stat.S_IRWXU)


def raise_(error):
    """Raise an error in an expression."""
    raise error


def test_one_process_tests_and_the_others_wait(tmp_path):
    """Of four processes that begin at once, one runs the test."""
    context = multiprocessing.get_context("fork")
    count = context.Value("i", 0)

    def rank():
        one = record.Record(tmp_path / "record")
        with one.alone(30):
            if one.outcome() is None:
                with count.get_lock():
                    count.value += 1
                time.sleep(0.3)
                one.write("")

    ranks = [context.Process(target=rank) for _ in range(4)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert count.value == 1
    assert (tmp_path / "record").read_text() == "passed"
    (tmp_path / "record").write_text("")  # what a crash may leave
    assert record.Record(tmp_path / "record").outcome() is None
    with record.Record(tmp_path / "record").alone(30), record.Record(tmp_path / "record").alone(0.2):
        pass  # who waits too long tests for itself


# ---------------------------------------------------------------- what is said


@pytest.fixture
def gpu_0(monkeypatch):
    """A Hopper GPU as cuda:0, not tested yet."""
    extension = SimpleNamespace(hopper_unavailable=lambda: None, build_info=lambda: {"hopper": True})
    monkeypatch.setattr(_backend, "_C", extension)
    monkeypatch.setattr(torch.cuda, "device", lambda index: torch.no_grad())
    dispatch._usable.cache_clear()
    yield
    dispatch._usable.cache_clear()


@pytest.mark.parametrize("value", ["", "1"])
def test_a_failed_self_test_is_one_warning(value, gpu_0, monkeypatch):
    """Kernels that fail their self-test are turned off with one warning that names the variable."""
    monkeypatch.setenv("PYUNLEARN_HOPPER", value)
    place, name = (selftest, "compare") if value else (trial, "run_trial")
    monkeypatch.setattr(place, name, lambda device: "they gave wrong numbers")
    with pytest.warns(UserWarning, match="not used on cuda:0: they gave wrong numbers.*PYUNLEARN_HOPPER=0"):
        assert not dispatch._usable(0)
    assert not dispatch._usable(0)


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), torch.OutOfMemoryError("no memory"), RuntimeError()])
def test_no_error_of_the_test_leaves_an_op(error, gpu_0, monkeypatch):
    """An error in the test becomes the warning."""
    monkeypatch.delenv("PYUNLEARN_HOPPER", raising=False)
    monkeypatch.setattr(trial, "run_trial", lambda index: raise_(error))
    with pytest.warns(UserWarning, match="they could not be tested"):
        assert not dispatch._usable(0)


def test_other_gpus_and_builds(gpu_0, monkeypatch, recwarn):
    """A GPU without support causes no warning, except with PYUNLEARN_HOPPER=1; an H100 whose build lacks them does."""
    info = {"hopper": True}
    extension = SimpleNamespace(hopper_unavailable=lambda: "no such GPU", build_info=lambda: info)
    monkeypatch.setattr(_backend, "_C", extension)
    monkeypatch.delenv("PYUNLEARN_HOPPER", raising=False)
    assert not dispatch._usable(0)
    info["hopper"] = False
    dispatch._usable.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    assert not dispatch._usable(0)
    assert not recwarn
    dispatch._usable.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    with pytest.warns(UserWarning, match="not used on cuda:0: this build lacks them"):
        assert not dispatch._usable(0)
    info["hopper"] = True
    monkeypatch.setenv("PYUNLEARN_HOPPER", "1")
    dispatch._usable.cache_clear()
    with pytest.warns(UserWarning, match="not used on cuda:0: no such GPU"):
        assert not dispatch._usable(0)
