"""Shared settings of all tests: no network, hypothesis profile, which marked tests run, devices and backends."""

import gc
import importlib.util
import os
import signal
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # pytest -n: the processes share the cores
    share = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(share))

import pytest
from hypothesis import HealthCheck, settings

# torch is imported by the fixtures: it would delay the process that only distributes tests by five seconds

# longest first: each takes more than 10 s
LONG = [
    "real_model",
    "hopper_kernels",
    "portable_kernels",
    "hopper_dispatch",
    "study",
    "attacks_planted",
    "unlearning_robust",
    "unlearning_api",
    "unlearning_distributed",
    "methods_end_to_end",
    "methods_vocabulary_end_to_end",
    "methods_equal_steps",
    "unlearning_checkpoint",
    "unlearning_loop",
    "unlearning_token_weights",
    "ops_example_objective_gradients",
    "audit",
]

settings.register_profile(
    "pyunlearn",
    deadline=None,
    max_examples=25,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # ours stay the same from one example to the next
)
settings.load_profile("pyunlearn")


def pytest_configure(config):
    """Tell tests/coverings.py whether the run asks for whole grids."""
    os.environ["WHOLE_GRIDS"] = "1" if "full" in config.getoption("-m") else "0"


def _left_out(item, marks):
    """Return whether an item has one of the marks; of `full`, whether it is outside its grid's covering."""
    full = item.get_closest_marker("full")
    outside = "full" in marks and full is not None and not full.kwargs.get("covering")
    return outside or any(item.get_closest_marker(name) for name in marks - {"full"})


def pytest_collection_modifyitems(config, items):
    """Deselect what this run leaves out, and put the long files first, so that no process is left alone with one.

    Left out: cuda without a GPU; nvcc, real_model, emulator, sanitize and the cases of a grid outside its pairwise
    covering (tests/coverings.py), unless -m names them. Skipped: real_model without gguf.
    """
    import torch

    marks = {
        name for name in ("nvcc", "full", "real_model", "emulator", "sanitize") if name not in config.getoption("-m")
    }
    marks |= set() if torch.cuda.is_available() else {"cuda"}
    deselected = [item for item in items if _left_out(item, marks)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        away = set(deselected)
        items[:] = [item for item in items if item not in away]
    place = {f"test_{name}": at for at, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))
    if importlib.util.find_spec("gguf") is None:
        for item in items:
            if item.get_closest_marker("real_model"):
                item.add_marker(pytest.mark.skip(reason="needs gguf, which reads the demo's model"))


def pytest_collection_finish():
    """Keep what the imports made out of later garbage collections: a tenth of a run's time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def ctrl_c():
    """Let Ctrl-C work again after a test whose command was interrupted, which ends with Ctrl-C ignored."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """Each kind of device of this machine."""
    return request.param


@pytest.fixture(params=["compiled", "reference"])
def backend(request, device, monkeypatch):
    """The compiled kernels of `device`, then the PyTorch ones."""
    from pyunlearn.ops import _backend

    if request.param == "reference":
        chosen = _backend.Choice("reference", "chosen by the test")
        monkeypatch.setattr(_backend, "on_cpu", lambda: chosen)
        monkeypatch.setattr(_backend, "on_gpu", lambda index: chosen)
    else:
        chosen = _backend.on_cpu() if device == "cpu" else _backend.on_gpu(0)
        if chosen.kernels == "reference":
            pytest.skip(f"no compiled kernels here: {chosen.why}")
    return request.param


@pytest.fixture(scope="module")
def one_thread():
    """One CPU thread: tiny models run faster, and the same bits come out every time."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def own_accelerate(monkeypatch):
    """No state of accelerate, before and after: a Trainer leaves its precision there, and in the environment."""
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def story(one_thread):
    """A Llama trained on sentences, two of which it has memorized."""
    import tiny

    return tiny.storyteller()


@pytest.fixture(scope="module")
def answers(one_thread):
    """A GPT-2 trained on questions and answers, two of which it has memorized."""
    import tiny

    return tiny.answerer()


@pytest.fixture(scope="module")
def t5(one_thread):
    """A T5 trained on prompts and completions, two of which it has memorized."""
    import tiny

    return tiny.translator()


@pytest.fixture
def poisoned():
    """Fill uninitialized memory with NaN."""
    import torch

    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(scope="session")
def extension(tmp_path_factory):
    """The compiled extension for the emulator: (module, library)."""
    import emulated

    return emulated.load(tmp_path_factory)


@pytest.fixture(name="emulated")
def on_the_emulator(extension, monkeypatch, poisoned):
    """An emulated GPU, whose extension counts calls; memory that no kernel has filled reads NaN."""
    import emulated

    return emulated.on_emulator(extension, monkeypatch)


@pytest.fixture(params=["emulator", pytest.param("gpu", marks=pytest.mark.cuda)])
def watched(request, monkeypatch, poisoned):
    """The extension on the emulator, then on a GPU of compute capability 9.0."""
    import emulated

    if request.param == "emulator":
        return request.getfixturevalue("emulated")
    return emulated.on_hopper_gpu(monkeypatch)


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """call(*arguments) -> (exit code, standard output, standard error) of `pyunlearn ...`, run in an empty folder."""
    from pyunlearn.cli import main as cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pyunlearn", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return stopped.value.code, out, err

    return run
