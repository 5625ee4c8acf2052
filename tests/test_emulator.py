"""The emulator itself: the arithmetic of its products, a whole GPU's processors, and that it sees what is left out."""

import ctypes
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from coverings import slow
from emulated import EMULATOR, assert_right, evaluate, head, truth, unit
from heads import assert_equal

from pyunlearn.ops import linear_log_likelihood

pytestmark = pytest.mark.emulator


def dot(library, a, b):
    """Return a (D,) times b (D, 8) as the emulated tensor cores sum it, sixteen products at a time."""
    total = torch.zeros(8)
    for k in range(0, len(a), 16):
        x, y = a[k : k + 16].float().contiguous(), b[k : k + 16].float().contiguous()
        library.add_products_of_8(*(ctypes.c_void_p(t.data_ptr()) for t in (total, x, y)))
    return total


def test_products_are_cut_as_tensor_cores_cut_them(extension):
    """What lies below 25 bits of the largest term is cut, toward zero; NaN and infinity stay."""
    one, rest = torch.ones(16), torch.full((16, 8), 2.0**-25)
    rest[0] = 1.0
    assert dot(extension[1], one, rest).tolist() == [1.0] * 8  # each of the fifteen is cut
    assert dot(extension[1], -one, rest).tolist() == [-1.0] * 8
    rest[1:] = 2.0**-24  # these are not, but the sum is cut to 24 bits
    assert dot(extension[1], one, rest).tolist() == [1.0 + 14 * 2.0**-24] * 8
    rest[1, 0], rest[1, 1] = torch.nan, torch.inf
    values = dot(extension[1], one, rest)
    assert values[0].isnan()
    assert values[1] == torch.inf


@pytest.mark.parametrize(("width", "measured"), [(2304, 1.1e-5), (4096, 2.1e-5)])
def test_long_sums_lose_what_was_measured(width, measured, extension):
    """Sums of unit variance are off by about what an H100 showed, and toward zero on average."""
    g = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(300):
        a = torch.randn(width, generator=g).bfloat16()
        b = (torch.randn(width, 8, generator=g) * width**-0.5).bfloat16()
        exact = a.double() @ b.double()
        errors.append((dot(extension[1], a, b).double() - exact) * exact.sign())
    errors = torch.cat(errors)
    assert measured / 4 < errors.abs().max() < measured * 1.5
    assert errors.mean() < 0


@pytest.mark.parametrize("workspace", [None, *slow(0)])
def test_132_multiprocessors(workspace, emulated, extension):
    """Seven pairs of blocks of rows on the 66 clusters of an H100: as on four multiprocessors, and right."""
    case = head(1700, 16, 520)
    expected = truth(case, unit(1700))
    results = []
    for processors in (132, 132, 4):
        extension[1].set_machine(processors, len(results))
        results.append(evaluate(linear_log_likelihood, case, unit(1700), workspace=workspace))
        assert_right(results[-1], expected, torch.bfloat16)
    assert_equal(results[0], results[1])


SEEDS = 16
REMOVED = {
    "a producer that does not wait for its stage to be read": (
        "mainloop.cuh",
        "barrier_wait(base + Ring::empty + 8 * stage, phase ^ 1);",
        "",
    ),
    "a consumer that does not wait for its loads": (
        "mainloop.cuh",
        "barrier_wait(base + Ring::full + 8 * stage, phase);",
        "",
    ),
    "a stage that is handed back before its products are done": ("mainloop.cuh", "wgmma_wait<1>();", ""),
    "accumulators that are read before their products are done": ("mainloop.cuh", "wgmma_wait<0>();", ""),
    "products without a fence": ("mainloop.cuh", "wgmma_fence();", ""),
    "barriers that are not published": ("mainloop.cuh", "barrier_init_done();", ""),
    "a block that ends before its neighbour": (
        "mainloop.cuh",
        "cluster_sync();  // a CTA that left",
        "// a CTA that left",
    ),
    "a block that ends before its stores have read": ("mainloop.cuh", "  if (thread == 0) store_wait<0>();\n}", "}"),
    "a buffer that is written while a store reads it": ("epilogue.cuh", "if (leader) store_wait<1>();", ""),
    "stores that do not see what was written": ("epilogue.cuh", "fence_for_copies();", ""),
    "a store before all threads have written": (
        "epilogue.cuh",
        "fence_for_copies();\n  named_sync<128>(1 + wg);",
        "fence_for_copies();",
    ),
    "threads that write before the store has read": (
        "epilogue.cuh",
        "store_wait<1>();\n  named_sync<128>(1 + wg);",
        "store_wait<1>();",
    ),
    "a fence after the barrier instead of before it": (
        "epilogue.cuh",
        "fence_for_copies();\n  named_sync<128>(1 + wg);",
        "named_sync<128>(1 + wg);\n  fence_for_copies();",
    ),
}


def gradient(module, library, seed):
    """Return the gradient (150, 1100) of the logits of one case by one launch, of one cluster."""
    library.set_machine(2, seed)
    case = head(150, 584, 1100, bias=False)
    z = case.hidden.double() @ case.weight.double().T
    m, total = z.amax(1).float(), (z - z.amax(1, True)).exp().sum(1).float()
    value = z.gather(1, case.targets[:, None]).squeeze(1) - z.logsumexp(1)
    out, coefficients = torch.empty(150, 1104, dtype=torch.bfloat16), unit(150)
    inputs = (case.hidden, case.weight, 1, 150, 584, 1100, 584, 584, None, 0, 1.0, 0.0, case.targets)
    arguments = (*inputs, 0, coefficients, value.float(), m, total, out, 1104)
    module.hopper_gradient(
        *(a.data_ptr() if isinstance(a, torch.Tensor) else 0 if a is None else a for a in arguments), 0
    )
    g = -z.softmax(1)
    g[torch.arange(150), case.targets] += 1
    return out[:, :1100].double(), g * coefficients[:, None]


def load(path):
    """Load a second extension; (module, library)."""
    # pybind11 remembers modules by their full names
    spec = importlib.util.spec_from_file_location(f"{path.parent.parent.name}._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, ctypes.CDLL(str(path))


def is_right(extension, seed):
    """Return whether a launch ends and its gradient agrees with float64."""
    try:
        actual, expected = gradient(*extension, seed)
    except RuntimeError as error:
        if "emulator" not in str(error):
            raise
        return False
    return bool((actual - expected).abs().max() <= 1e-2 * expected.abs().max())


def test_the_kernel_as_it_is(extension):
    """Nothing is reported of the kernel itself, in as many orders."""
    assert all(is_right(extension, seed) for seed in range(SEEDS))


@pytest.mark.parametrize("what", REMOVED)
def test_what_is_left_out_is_seen(what, extension, tmp_path):
    """A copy of the gradient's kernel without one wait, fence or barrier gives wrong gradients, or is reported."""
    sys.path.insert(0, str(EMULATOR))
    try:
        from build import changed
    finally:
        sys.path.remove(str(EMULATOR))
    (tmp_path / "copy").mkdir()
    built = Path(extension[0].__file__).parent
    copy = load(changed(built, tmp_path / "copy", *REMOVED[what], "hopper_gradient.cu"))
    assert not all(is_right(copy, seed) for seed in range(SEEDS)), f"not seen in {SEEDS} runs"
