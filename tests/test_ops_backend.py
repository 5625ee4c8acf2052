"""Which kernels run where: settled for the CPU without a card, for each card by itself, and never in the middle of something that cannot hold it."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pyunlearn.ops import _backend, linear_log_likelihood


@pytest.fixture
def fresh(monkeypatch):
    """Nothing has been settled, and nothing that is settled here stays."""
    monkeypatch.delenv("PYUNLEARN_BACKEND", raising=False)
    for settled in (_backend.on_cpu, _backend.on_gpu):
        settled.cache_clear()
    yield
    for settled in (_backend.on_cpu, _backend.on_gpu):
        settled.cache_clear()


@pytest.fixture
def cards(fresh, monkeypatch):
    """An extension with kernels for 8.0, on a machine with a card of 9.0 and one of 7.5."""
    info = {"cuda_architectures": "80 90a", "cuda_problem": None}
    monkeypatch.setattr(_backend, "_C", SimpleNamespace(build_info=lambda: info))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((9, 0), (7, 5))[index])
    monkeypatch.setattr(_backend, "_self_test_problem", lambda device: None)


def test_a_tensor_on_the_cpu_asks_no_card(fresh, monkeypatch):
    """A card that is full, in another process's hands or lost by a fork is no business of the CPU's."""

    def touched(*_):
        raise AssertionError("a card was touched")

    for name in ("is_available", "current_device", "get_device_capability", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, touched)
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
    assert linear_log_likelihood(hidden, weight, torch.tensor([0, 1, -100])).shape == (3,)
    assert _backend.kernels_for(hidden) == _backend.on_cpu().kernels


def test_each_card_is_settled_by_itself(cards):
    """One that the kernels are too new for goes on with plain PyTorch, and one warning; its neighbour does not."""
    assert _backend.on_gpu(0) == ("cuda", "compiled kernels found")
    with pytest.warns(UserWarning, match=r"not used on cuda:1: the GPU has compute capability 7.5, .* need 8.0"):
        assert _backend.on_gpu(1).kernels == "reference"
    assert _backend.on_gpu(0).kernels == "cuda"


def test_kernels_are_tried_out_on_real_memory_even_in_the_middle_of_a_trace(cards, monkeypatch):
    """Fake tensors have no memory: a kernel would be given address 0."""
    seen = []
    monkeypatch.setattr(_backend, "_self_test_problem", lambda device: seen.append(type(torch.empty(1))))
    with FakeTensorMode():
        assert _backend.on_gpu(0).kernels == "cuda"
    assert seen == [torch.Tensor]


def test_nothing_is_tried_out_while_a_graph_is_captured(cards, monkeypatch):
    """One sentence says what to do, and nothing is settled."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call the op once before capturing"):
        _backend.on_gpu(0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert _backend.on_gpu(0).kernels == "cuda"


def test_a_card_that_fails_in_its_trial_is_a_sentence():
    """Memory that cannot be had there is one, as on a device that this torch has not."""
    assert _backend._self_test_problem(torch.device("mps")).startswith("they failed on this GPU: ")


@pytest.mark.parametrize(
    ("value", "message"), [("cuda", "PYUNLEARN_BACKEND=cuda, but they failed"), ("gpu", "got 'gpu'")]
)
def test_what_is_insisted_on_and_cannot_be_had_is_an_error(value, message, cards, monkeypatch):
    """For tensors on the CPU too, before anything runs."""
    monkeypatch.setenv("PYUNLEARN_BACKEND", value)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_backend, "_self_test_problem", lambda device: "they failed")
    with pytest.raises(ValueError, match=message):
        _backend.kernels_for(torch.empty(1))


def test_what_is_left_out_by_name_is_left_out(cards, monkeypatch):
    """reference: everywhere; cpu: on cards."""
    for value, cpu in (("reference", "reference"), ("cpu", "cpu")):
        monkeypatch.setenv("PYUNLEARN_BACKEND", value)
        for settled in (_backend.on_cpu, _backend.on_gpu):
            settled.cache_clear()
        assert _backend.on_cpu().kernels == cpu
        assert _backend.on_gpu(0) == ("reference", f"PYUNLEARN_BACKEND={value}")
