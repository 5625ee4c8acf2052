"""Weights rounded as in a GGUF file: the package's numbers, on tensors, and what is spread over a step's width."""

import gguf
import numpy as np
import pytest
import torch
from gguf_files import KINDS

from pyunlearn.models.gguf_formats import WRITABLE
from pyunlearn.models.gguf_rounding import round_to, rounded_as, spread

IN_BLOCKS = tuple(name for name in WRITABLE if name.startswith("Q"))


def weights_of(scale, seed=0):
    """(96, 64) weights, some of them in blocks with two values, with one value, and far from 0."""
    rng = np.random.default_rng(seed)
    rows = (rng.normal(size=(96, 64)) * scale).astype(np.float32)
    rows[:20] = rng.choice([-scale, scale], size=(20, 64))
    rows[20:40] += np.float32(3 * scale)
    rows[40:44] = scale
    rows[44] = 0
    return rows


@pytest.mark.parametrize("form", WRITABLE)
@pytest.mark.parametrize("scale", [1e-7, 1e-3, 0.05, 10.0])
def test_numbers_are_those_of_the_package(form, scale):
    """Bit by bit, and the same again for what is rounded already."""
    rows = weights_of(scale)
    wanted = gguf.quants.dequantize(gguf.quants.quantize(rows, KINDS[form]), KINDS[form])
    rounded = rounded_as(torch.from_numpy(rows), form)
    np.testing.assert_array_equal(rounded.numpy(), wanted)
    again = gguf.quants.dequantize(gguf.quants.quantize(rounded.numpy(), KINDS[form]), KINDS[form])
    if scale > 1e-5:  # scales are float16, whose smallest numbers are coarse
        np.testing.assert_array_equal(again, rounded.numpy())
        assert torch.equal(rounded_as(rounded, form), rounded)


def test_a_part_of_a_tensor_is_rounded_as_the_whole_is():
    """The optimizer rounds a flat run of whole blocks at a time; 16-bit weights are rounded as float32."""
    weight = torch.from_numpy(weights_of(0.05))
    flat = torch.cat([rounded_as(part, "Q4_1") for part in weight.view(-1).split(32 * 7)])
    assert torch.equal(flat.view(weight.shape), rounded_as(weight, "Q4_1"))
    half = weight.bfloat16()
    assert torch.equal(rounded_as(half, "Q4_0"), rounded_as(half.float(), "Q4_0"))


@pytest.mark.parametrize("form", WRITABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_spread_is_rounded_to_the_weights(form, dtype):
    """Every weight keeps its number in the file; in the formats of blocks nearly all unrounded numbers are others."""
    weight = torch.from_numpy(weights_of(0.05)).to(dtype)
    round_to(weight, form)
    out = spread(weight, form, torch.Generator().manual_seed(0))
    assert torch.equal(rounded_as(out, form).to(dtype), weight)
    moved = float((out != weight).float().mean())
    assert moved > 0.8 if form in IN_BLOCKS else moved == 0


@pytest.mark.parametrize("form", IN_BLOCKS)
def test_the_mean_of_a_change_survives(form):
    """A tenth of a step moves a tenth of the weights by a step; from the middle of the steps none moves."""
    torch.manual_seed(0)
    weight = rounded_as(0.05 * torch.randn(2000, 32), form)
    levels = {"Q4_0": 8, "Q4_1": 15, "Q5_0": 16, "Q5_1": 31, "Q8_0": 127}[form]
    width = weight.amax(1) - weight.amin(1) if form.endswith("1") else weight.abs().amax(1)
    step = (width / levels)[:, None]
    change = 0.1 * step * torch.randint(0, 2, weight.shape).mul(2).sub(1)
    change.scatter_(1, weight.abs().argmax(1, keepdim=True), 0.0)  # the scales stay as they are
    for end in (weight.argmin(1, keepdim=True), weight.argmax(1, keepdim=True)):
        change.scatter_(1, end, 0.0)
    inside = (change != 0) & (weight < weight.amax(1, keepdim=True)) & (weight > weight.amin(1, keepdim=True))

    def moved(start):
        return float((((rounded_as(start + change, form) - weight) / change * 0.1)[inside]).mean())

    assert moved(spread(weight, form, torch.Generator().manual_seed(0))) == pytest.approx(0.1, abs=0.02)
    assert moved(weight) == pytest.approx(0, abs=0.001)
