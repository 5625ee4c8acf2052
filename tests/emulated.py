"""Shared by the tests of the CUDA kernels: the sources on an emulator, or a GPU, through the ops, against float64."""

import ctypes
import fcntl
import importlib.util
import os
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from heads import assert_agree, make, plain

from pyunlearn.ops import _backend
from pyunlearn.ops.hopper import dispatch

EMULATOR = Path(__file__).parent / "emulator"
PLACE = {"device": "cpu"}  # the device of a test's cases


class CallCounter:
    """An extension that counts the calls of each function and records the arguments of the last call."""

    def __init__(self, module):
        self.module, self.calls, self.last = module, Counter(), {}

    def __getattr__(self, name):
        def call(*arguments):
            self.calls[name] += 1
            self.last[name] = arguments
            return getattr(self.module, name)(*arguments)

        return call


def load(tmp_path_factory):
    """Build csrc/bindings.cpp with the CUDA kernels for the emulator, once for all processes; (module, library)."""
    if _backend.on_cpu().kernels == "reference":
        pytest.skip("the reference backend calls no kernels")
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
        pytest.skip("the emulator is written for x86-64 and Linux")
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "emulator"
    folder.mkdir(exist_ok=True)
    path = folder / "_C.so"
    sys.path.insert(0, str(EMULATOR))
    try:
        from build import build

        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                build(folder)
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


def on_emulator(extension, monkeypatch):
    """Make the ops run on an emulated GPU of 4 multiprocessors, whose tensors are on the CPU."""
    module, library = extension
    library.set_machine(4, 0)
    counted = CallCounter(module)
    monkeypatch.setattr(_backend, "_C", counted)
    monkeypatch.setattr(dispatch, "run_on", lambda device: True)
    monkeypatch.setitem(PLACE, "device", "cpu")
    return counted


def on_hopper_gpu(monkeypatch):
    """Make the cases lie on a GPU of compute capability 9.0, whose calls are counted."""
    if not dispatch.run_on(torch.device("cuda")):
        pytest.skip(f"the Hopper kernels do not run here: {dispatch.status()}")
    counted = CallCounter(_backend.extension())
    monkeypatch.setattr(_backend, "_C", counted)
    monkeypatch.setitem(PLACE, "device", "cuda")
    return counted


def head(rows, width, vocabulary, *, dtype=torch.bfloat16, **options):
    """A case that the Hopper kernels serve."""
    return make(rows, width, vocabulary, dtype=dtype, device=PLACE["device"], **options)


def truth(case, coefficients, **options):
    """Compute log-likelihoods and gradients by the definition in float64."""
    hidden, weight, bias = (None if t is None else t.double().requires_grad_() for t in case[:3])
    value = plain(hidden, weight, case.targets, bias=bias, **options)
    value.backward(torch.where(case.targets == -100, 0, coefficients.double()))
    return [value.detach(), *(t.grad for t in (hidden, weight, bias) if t is not None)]


def evaluate(op, case, coefficients, *, times=1, **options):
    """Compute log-likelihoods and gradients by the op, the gradients by the last of `times` backward passes."""
    hidden, weight, bias = (None if t is None else t.clone().requires_grad_() for t in case[:3])
    value = op(hidden, weight, case.targets, bias=bias, **options)
    for _ in range(times):
        for t in (hidden, weight, bias):
            if t is not None:
                t.grad = None
        value.backward(coefficients if value.dim() else None, retain_graph=True)
    return [value.detach(), *(t.grad for t in (hidden, weight, bias) if t is not None)]


def assert_right(actual, expected, dtype):
    """Values agree to float32 accuracy, gradients to 16 bits."""
    assert_agree(actual[:1], expected[:1], 1e-5)
    assert_agree(actual[1:], expected[1:], 1.5e-2 if dtype is torch.bfloat16 else 2e-3)


def unit(rows):
    """Coefficients (rows,) from -1 to 1."""
    return torch.linspace(-1, 1, rows, device=PLACE["device"])
