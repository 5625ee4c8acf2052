"""Products of bfloat16 operands with a float32 result: csrc/bf16_products.h."""

import os
import subprocess
import sys

import pytest
import torch
from coverings import grid
from heads import error
from hypothesis import given
from hypothesis import strategies as st

from pyunlearn.ops import _backend, _products
from pyunlearn.ops._products import Logits

KERNEL = _backend.build_info().get("bf16_products") if _backend.on_cpu().kernels == "cpu" else None
pytestmark = pytest.mark.skipif(not KERNEL, reason="needs AVX512-BF16 or AMX")


def operands(rows, columns, width, seed=0):
    """Return random bfloat16 operands a (rows, width) and b (columns, width)."""
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(n, width, generator=g).bfloat16() for n in (rows, columns))
    return a, b


def largest_error(actual, a, b):
    """Return the largest error relative to the sum of the summands' magnitudes, which bounds rounding."""
    a, b = a.double(), b.double()
    return float(((actual.double() - a @ b.T).abs() / (a.abs() @ b.abs().T + 1e-30)).max())


@pytest.mark.parametrize("width", [1, 2, 64, 123, 639, 640, 641, 896, 2304, 4096])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 63), (6, 64), (7, 65), (13, 129), (100, 123), (600, 65)])
def test_every_shape(rows, columns, width):
    """Every sum is right to float32 rounding for any shape, and nothing outside the result is written."""
    a, b = operands(rows, columns, width)
    memory = torch.full((rows + 1, columns + 3), torch.nan)
    _backend.bf16_product(memory[:rows, :columns], a, b)
    assert largest_error(memory[:rows, :columns], a, b) <= 1e-6
    assert memory[rows].isnan().all()
    assert memory[:, columns:].isnan().all()


@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 140), st.integers(1, 700)),
    seed=st.integers(0, 2**31),
    threads=st.integers(1, 3),
)
def test_one_row_at_a_time(shape, seed, threads):
    """A row's sums have the same bits alone or among other rows, with any number of threads."""
    a, b = operands(*shape, seed=seed)
    whole, alone = torch.empty(shape[:2]), torch.empty(shape[:2])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        _backend.bf16_product(whole, a, b)
    finally:
        torch.set_num_threads(before)
    for r in range(shape[0]):
        _backend.bf16_product(alone[r : r + 1], a[r : r + 1], b)
    assert torch.equal(whole, alone)


def test_views():
    """Operands may be slices of something wider, or transposed."""
    a, b = operands(9, 70, 50)
    out = torch.empty(9, 70)
    _backend.bf16_product(out, a[:, :30], b[:, :30])
    assert largest_error(out, a[:, :30], b[:, :30]) <= 1e-6
    for left, right in ((a, b.T.contiguous().T), (a.T.contiguous().T, b), (a[:, ::2], b[:, ::2])):
        _backend.bf16_product(out, left, right)
        assert largest_error(out, left, right) <= 1e-6


def test_not_finite_stays_in_its_row():
    """NaN and Inf reach the sums they belong to and no others."""
    a, b = operands(8, 70, 40)
    a[3, 7], a[5, 39] = torch.nan, torch.inf
    out = torch.empty(8, 70)
    _backend.bf16_product(out, a, b)
    assert out[3].isnan().all()
    assert not out[5].isfinite().any()
    assert out[[0, 1, 2, 4, 6, 7]].isfinite().all()


def test_no_operands_are_widened():
    """The logits of bfloat16 operands are made from them as they are, with no float32 copy."""
    a, b = operands(4, 70, 40)
    logits = Logits(a, torch.float32)
    out = torch.empty(4, 70)
    logits.into(out, b)
    assert logits.wide is a
    assert not logits.buffer.numel()
    assert largest_error(out, a, b) <= 1e-6


@pytest.fixture
def with_amx():
    if KERNEL != "amx_bf16":
        pytest.skip("needs AMX")


@grid(
    transposed=[False, True],
    depth=[1, 2, 31, 32, 33, 100, 1025, 3000],
    shape=[(1, 1), (31, 33), (32, 64), (33, 31), (65, 100), (300, 72)],
)
def test_gradient(shape, depth, transposed, with_amx):
    """The gradient's product is right in float32, added and rounded, and nothing outside the result is written."""
    rows, columns = shape
    a, b = operands(rows, columns, depth)
    left, right = (x.T.clone(memory_format=torch.contiguous_format) for x in (a, b))
    left = left.T if transposed else a
    memory = torch.full((rows + 1, columns + 3), torch.nan)
    out = memory[:rows, :columns]
    assert _backend.multiplies_bf16_gradient(out, left, right)
    _products.product(out, left, right)
    assert largest_error(out, a, b) <= 2e-6
    twice = out.clone()
    _products.add_product(twice, left, right)
    assert largest_error(twice / 2, a, b) <= 2e-6
    narrow = torch.full_like(memory, torch.nan, dtype=torch.bfloat16)
    _products.product(narrow[:rows, :columns], left, right)
    assert error(narrow[:rows, :columns], out) <= 2**-8
    for edge in (memory, narrow):
        assert edge[rows].isnan().all()
        assert edge[:, columns:].isnan().all()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_gradient_of_views(threads, with_amx):
    """NaN and Inf stay in their column, or row of the other operand, with any number of threads."""
    a, b = torch.randn(50, 700).bfloat16(), torch.randn(50, 90).bfloat16()
    a[3, 207], b[7, 11] = torch.nan, torch.inf
    task, other, out = a[:, 100:600], b[:, 3:80], torch.empty(500, 77)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        _products.product(out, task.T, other)
    finally:
        torch.set_num_threads(before)
    assert out[107].isnan().all()
    assert not out[:, 8].isfinite().any()
    task, other = task.clone(), other.clone()
    task[3, 107], other[7, 8] = 0, 0
    fine = torch.ones(500, 77, dtype=torch.bool)
    fine[107], fine[:, 8] = False, False
    wanted = task.double().T @ other.double()
    assert (out.double() - wanted)[fine].abs().max() <= 1e-4


def test_dtypes_that_do_not_fit(with_amx):
    """A torch.ops call with a head of another dtype raises, instead of reading outside the operands."""
    hidden, weight, targets = torch.randn(4, 16), torch.randn(90, 16), torch.arange(4)
    for h, w in ((hidden.bfloat16(), weight), (hidden, weight.bfloat16())):
        with pytest.raises(RuntimeError, match="dtype"):
            torch.ops.pyunlearn.token_statistics(h, w, None, targets, 1.0, 0.0, -100, None)


def test_out_of_memory(with_amx, tmp_path):
    """A call without memory to lay an operand out raises MemoryError, and the next call that fits works."""
    script = """
import resource, torch
from pyunlearn.ops import _backend
torch.set_num_threads(1)
a, few, out = torch.ones(1024, 1).bfloat16(), torch.ones(1024, 64).bfloat16(), torch.zeros(1, 1 << 20)
many = torch.ones(1, 1 << 20).bfloat16().expand(1024, -1)  # 2 GiB when laid out
_backend.bf16_gradient(out[:, :64], a.T, few, False)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
try:
    _backend.bf16_gradient(out, a.T, many, False)
except MemoryError:
    _backend.bf16_gradient(out[:, :64], a.T, few, False)
    print(out[0, 63].item())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1024.0"


@pytest.mark.full
def test_without_amx(tmp_path):
    """PYUNLEARN_CPU=avx512 takes the other kernel, which passes the same tests."""
    if KERNEL != "amx_bf16":
        pytest.skip("no AMX here: the tests above ran on the other kernel")
    environment = os.environ | {"PYUNLEARN_CPU": "avx512"}
    ask = "from pyunlearn.ops import _backend; print(_backend.build_info()['bf16_products'])"
    done = subprocess.run(
        [sys.executable, "-c", ask], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    if done.stdout.strip() != "avx512_bf16":
        pytest.skip("AMX without AVX512-BF16")
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-n0", __file__], env=environment, cwd=tmp_path, check=True)
