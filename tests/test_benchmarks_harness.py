"""The benchmarks' clock on a GPU, on a simulated one; what is predicted, next to what was measured."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parent.parent))
from benchmarks import harness, predictions
from benchmarks.cases import CUDA_SHAPES


class SimulatedGpu:
    """A host and a GPU with a clock each, in milliseconds: what the host issues runs after what it issued before."""

    def __init__(self):
        self.host = self.free = 0.0
        self.slept, self.calls = [], 0

    def Event(self, enable_timing):
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", self.issue(0.0))
        event.elapsed_time = lambda end: end.at - event.at
        return event

    def issue(self, work):
        self.free = max(self.free, self.host) + work
        return self.free

    def synchronize(self):
        self.host = max(self.host, self.free)

    def _sleep(self, cycles):
        self.slept.append(cycles / 1.5e6)
        self.issue(cycles / 1.5e6)

    def call(self, host, work, *, waits=False):
        """Return a contender that takes so long on the host before its kernels are issued, and so long on the GPU."""

        def run():
            self.calls += 1
            self.host += host / 2
            if waits:
                self.synchronize()
            self.host += host / 2
            self.issue(work)

        return run


@pytest.fixture
def gpu(monkeypatch):
    """A simulated GPU in place of torch.cuda."""
    simulated = SimulatedGpu()
    monkeypatch.setattr(harness.torch, "cuda", simulated)
    monkeypatch.setattr(harness.time, "perf_counter", lambda: simulated.host / 1e3)
    harness._cycles_per_ms.cache_clear()
    yield simulated
    harness._cycles_per_ms.cache_clear()


@pytest.mark.parametrize(("host", "work"), [(0.15, 0.7), (0.15, 0.05), (0.01, 12.0), (0.4, 0.02)])
def test_queued_calls_show_the_kernels_alone(host, work, gpu):
    """Queued, a call costs its time on the GPU; from idle, the host's time before it too."""
    took = harness.medians({"one": gpu.call(host, work)}, 3, "cuda")["one"]
    assert took.ms == pytest.approx(work)
    assert took.from_idle == pytest.approx(host + work)


def test_a_call_that_waits_for_the_gpu_cannot_be_queued(gpu):
    """The host's time after a wait counts in both columns."""
    took = harness.medians({"one": gpu.call(0.2, 0.7, waits=True)}, 3, "cuda")["one"]
    assert took.from_idle == pytest.approx(0.9)
    assert took.ms >= 0.8


def test_short_calls_are_timed_several_at_once(gpu):
    """A queued sample takes at least 2 ms of calls, but no more than 20 calls, behind a sleep of bounded length."""
    harness.medians({"short": gpu.call(0.01, 0.7)}, 1, "cuda")
    assert gpu.calls == 3 * (1 + 3)
    gpu.calls = 0
    harness.medians({"shortest": gpu.call(0.0, 0.001)}, 1, "cuda")
    assert gpu.calls == 3 * (1 + 20)
    harness.medians({"slow host": gpu.call(50.0, 1.0)}, 1, "cuda")
    assert 2.0 <= min(gpu.slept[2:]) <= max(gpu.slept) <= harness.LONGEST_SLEEP_MS + 1e-3


def test_the_cpu_has_one_column():
    """On the CPU a call is timed from its begin to its end."""
    took = harness.medians({"one": lambda: None}, 1, "cpu")["one"]
    assert took.ms >= 0
    assert took.from_idle is None


def test_every_shape_has_a_prediction():
    """Each measure has one range, the lower end first, for each shape of the benchmarks on a GPU."""
    for measure in predictions.MEASURES.values():
        assert len(measure.predicted) == len(CUDA_SHAPES)
        assert all(0.5 < low <= high < 2 for low, high in measure.predicted)


def test_a_measured_line_shows_its_prediction(monkeypatch):
    """Multiples of the products, queued and from idle, are held against the prediction that is meant for them."""
    n, d, v = 8192, 576, 49152
    times = {"one product": harness.Timing(1.0, 1.1), "forward, kernel": harness.Timing(0.92, 1.2)}
    times |= {"forward, default": harness.Timing(1.0, 1.25), "full, all logits cached": harness.Timing(3.0, 4.0)}
    times |= {"full, in 512 MiB": harness.Timing(2.0, 2.2)}
    tensor = SimpleNamespace(nbytes=1 << 20)
    monkeypatch.setattr(predictions, "data", lambda *_: (tensor, tensor, None))
    monkeypatch.setattr(predictions, "one_product", lambda *_: None)
    monkeypatch.setattr(predictions, "_error", lambda *_: 5e-6)
    monkeypatch.setattr(predictions, "extra_mib", lambda *_: 10.0)
    monkeypatch.setattr(predictions, "medians", lambda *_: times)
    rows = {row["name"]: row for row in predictions.measure(n, d, v, "cuda", 1)}
    assert rows["forward, kernel"]["of_products"] == pytest.approx(0.92)
    assert rows["forward, default"]["from_idle_of_products"] == pytest.approx(1.25 / 1.1)
    assert [row["verdict"] for row in rows.values()] == ["as predicted", "as predicted", "slower", "faster"]
    line = predictions.line(rows["forward, default"])
    assert "idle x1.10-1.18" in line
    assert "x1.14" in line
    monkeypatch.setattr(predictions, "_error", lambda *_: float("nan"))
    with pytest.raises(SystemExit, match="a log-likelihood is off by nan"):
        predictions.measure(n, d, v, "cuda", 1)
