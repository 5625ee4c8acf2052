"""The choice of kernels: for the CPU without touching a GPU, for each GPU separately, never during a graph capture."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pyunlearn.ops import _backend, linear_log_likelihood


@pytest.fixture
def fresh(monkeypatch):
    """Clear the cached choices of kernels before and after the test."""
    monkeypatch.delenv("PYUNLEARN_BACKEND", raising=False)
    for settled in (_backend.on_cpu, _backend.on_gpu):
        settled.cache_clear()
    yield
    for settled in (_backend.on_cpu, _backend.on_gpu):
        settled.cache_clear()


@pytest.fixture
def gpus(fresh, monkeypatch):
    """Simulate an extension built for 8.0 on a machine with a GPU of 9.0 and one of 7.5."""
    info = {"cuda_architectures": "80 90a", "cuda_problem": None}
    monkeypatch.setattr(_backend, "_C", SimpleNamespace(build_info=lambda: info))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((9, 0), (7, 5))[index])
    monkeypatch.setattr(_backend, "_self_test_problem", lambda device: None)


def test_a_tensor_on_the_cpu_touches_no_gpu(fresh, monkeypatch):
    """A tensor on the CPU never touches a GPU, which may be full, used by another process or lost by a fork."""

    def touched(*_):
        raise AssertionError("a GPU was touched")

    for name in ("is_available", "current_device", "get_device_capability", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, touched)
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
    assert linear_log_likelihood(hidden, weight, torch.tensor([0, 1, -100])).shape == (3,)
    assert _backend.kernels_for(hidden) == _backend.on_cpu().kernels


def test_each_gpu_is_chosen_for_separately(gpus):
    """A GPU too old for the kernels gets plain PyTorch with one warning; the other GPU still gets the kernels."""
    assert _backend.on_gpu(0) == ("cuda", "compiled kernels found")
    with pytest.warns(UserWarning, match=r"not used on cuda:1: the GPU has compute capability 7.5, .* need 8.0"):
        assert _backend.on_gpu(1).kernels == "reference"
    assert _backend.on_gpu(0).kernels == "cuda"


def test_trial_uses_real_memory_during_a_trace(gpus, monkeypatch):
    """The trial of the kernels allocates real tensors under FakeTensorMode, since fake ones have no memory."""
    seen = []
    monkeypatch.setattr(_backend, "_self_test_problem", lambda device: seen.append(type(torch.empty(1))))
    with FakeTensorMode():
        assert _backend.on_gpu(0).kernels == "cuda"
    assert seen == [torch.Tensor]


def test_no_trial_during_graph_capture(gpus, monkeypatch):
    """A first call during graph capture raises an error that names the remedy, and caches no choice."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call the op once before capturing"):
        _backend.on_gpu(0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert _backend.on_gpu(0).kernels == "cuda"


def test_a_failed_trial_is_a_sentence():
    """A trial that raises, here on a device that this torch lacks, is reported as one sentence."""
    assert _backend._self_test_problem(torch.device("mps")).startswith("they failed on this GPU: ")


@pytest.mark.parametrize(
    ("value", "message"), [("cuda", "PYUNLEARN_BACKEND=cuda, but they failed"), ("gpu", "got 'gpu'")]
)
def test_a_named_backend_that_cannot_run_is_an_error(value, message, gpus, monkeypatch):
    """A backend named in the environment that cannot run is an error, for tensors on the CPU too."""
    monkeypatch.setenv("PYUNLEARN_BACKEND", value)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_backend, "_self_test_problem", lambda device: "they failed")
    with pytest.raises(ValueError, match=message):
        _backend.kernels_for(torch.empty(1))


def test_excluded_kernels_do_not_run(gpus, monkeypatch):
    """PYUNLEARN_BACKEND=reference excludes compiled kernels everywhere, cpu excludes them on GPUs."""
    for value, cpu in (("reference", "reference"), ("cpu", "cpu")):
        monkeypatch.setenv("PYUNLEARN_BACKEND", value)
        for settled in (_backend.on_cpu, _backend.on_gpu):
            settled.cache_clear()
        assert _backend.on_cpu().kernels == cpu
        assert _backend.on_gpu(0) == ("reference", f"PYUNLEARN_BACKEND={value}")
