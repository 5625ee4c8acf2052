"""Products of bfloat16 operands with a float32 result: csrc/bf16_products.h."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyunlearn.ops import _backend
from pyunlearn.ops._products import Logits

KERNEL = _backend.build_info().get("bf16_products") if _backend.on_cpu().kernels == "cpu" else None
pytestmark = pytest.mark.skipif(not KERNEL, reason="needs AVX512-BF16 or AMX")


def operands(rows, columns, width, seed=0):
    """a (rows, width) and b (columns, width)."""
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(n, width, generator=g).bfloat16() for n in (rows, columns))
    return a, b


def largest_error(found, a, b):
    """In units of the sum of the summands' magnitudes, which is what rounding is relative to."""
    a, b = a.double(), b.double()
    return float(((found.double() - a @ b.T).abs() / (a.abs() @ b.abs().T + 1e-30)).max())


@pytest.mark.parametrize("width", [1, 2, 64, 123, 639, 640, 641, 896, 2304, 4096])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 63), (6, 64), (7, 65), (13, 129), (100, 123), (600, 65)])
def test_every_shape(rows, columns, width):
    """Every sum is good to float32's rounding, and nothing beside the result is written, for any shape and whatever stood there before."""
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
    """A row's sums are the same bits whatever rows stand beside it, and whatever the number of threads."""
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
    turned = b.T.contiguous().T
    _backend.bf16_product(out, a, turned)
    assert largest_error(out, a, turned) <= 1e-6


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


def test_without_amx():
    """PYUNLEARN_CPU=avx512 takes the other kernel, which passes the same tests."""
    if KERNEL != "amx_bf16":
        pytest.skip("no AMX here: the tests above ran on the other kernel")
    environment = os.environ | {"PYUNLEARN_CPU": "avx512"}
    ask = "from pyunlearn.ops import _backend; print(_backend.build_info()['bf16_products'])"
    done = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True)
    if done.stdout.strip() != "avx512_bf16":
        pytest.skip("AMX without AVX512-BF16")
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-n0", __file__], env=environment, check=True)
