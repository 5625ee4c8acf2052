"""Weights rounded as a GGUF file holds them, on any device, and numbers spread over what rounds to the same weight.

The formulas are those of the package gguf, which the tests compare bit by bit; its own work on the CPU alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyunlearn.models.gguf_formats import ABOUT_ZERO, BLOCK, FROM_MINIMUM

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Format -> dtype, of the floating-point formats."""
_TIMES = 8  # roundings of a 16-bit weight at most
_INSIDE = 0.999  # share of the way to the next cell: what is at its border could round to either


class _Grid(NamedTuple):
    """Numbers that blocks can hold: from `first` to `first + steps` times `scale` above `start`, both (n, 1)."""

    scale: Tensor
    start: Tensor
    first: int
    steps: int


def rounded_as(weight: Tensor, name: str) -> Tensor:
    """Return the numbers that a GGUF file holds of a weight in a format, float32 of the same shape.

    Of the formats of blocks the columns are a multiple of 32. The formats are `gguf_formats.WRITABLE`.

    >>> rounded_as(torch.arange(32) / 31, "Q4_1")[:4]
    tensor([0.0000, 0.0000, 0.0667, 0.0667])
    """
    if name in FLOATS:
        return weight.detach().to(FLOATS[name]).float()
    blocks = weight.detach().float().reshape(-1, BLOCK)
    grid = _grid(blocks, name)
    exact = (blocks - grid.start) * torch.where(grid.scale == 0, 0.0, 1 / grid.scale)
    if name == "Q8_0":  # halves are rounded away from zero
        levels = exact.abs().add_(0.5).floor_().mul_(exact.sign())
    else:
        levels = (exact - grid.first + 0.5).trunc_().clamp_(0, grid.steps).add_(grid.first)
    return (_half(grid.scale) * levels).add_(_half(grid.start)).view(weight.shape)


def round_to(weight: Tensor, name: str) -> None:
    """Round a weight to a format in place, so that it is rounded to itself again.

    16 bits cannot hold all numbers of a format: what was rounded to both is rounded again, up to 8 times, since the
    largest weights of a block, which set its scale, have moved.
    """
    for _ in range(_TIMES):
        rounded = rounded_as(weight, name).to(weight.dtype)
        if torch.equal(rounded, weight):
            return
        weight.copy_(rounded)


def spread(weight: Tensor, name: str, generator: torch.Generator) -> Tensor:
    """Return numbers that are rounded to the weight, drawn evenly from all that are; float32 of the same shape.

    A change of a fraction of a step, added to them, moves that fraction of the weights by one step: on average nothing
    of it is lost to rounding, where numbers in the middle of their steps would all stay. The weights that set the scale
    of a block keep their numbers, and so do those of floating-point formats, whose steps are small, and those that
    would be rounded to another number in the weight's dtype.

    Args:
        weight: rounded to the format already, see `round_to`.
        name: the format.
        generator: of the CPU.

    Source: Schuchman 1964 (dither).
    """
    if name in FLOATS:
        return weight.detach().float()
    blocks = weight.detach().float().reshape(-1, BLOCK)
    grid = _grid(blocks, name)
    noise = (torch.rand(blocks.shape, generator=generator).to(blocks.device) - 0.5) * (_INSIDE * grid.scale.abs())
    if name in FROM_MINIMUM:
        ends: tuple[Tensor, ...] = (blocks.argmin(1, keepdim=True), blocks.argmax(1, keepdim=True))
        low, high = (blocks.gather(1, end) for end in ends)
    else:
        ends = (blocks.abs().argmax(1, keepdim=True),)
        high = blocks.gather(1, ends[0]).abs()
        low = -high
    middle = rounded_as(blocks, name)  # of 16 bits, not the same numbers
    out = middle + noise
    out = torch.where((out < low) | (out > high), middle - noise, out)  # none beyond the weights that set the scale
    for end in ends:
        out.scatter_(1, end, blocks.gather(1, end))
    same = rounded_as(out, name).to(weight.dtype).view(weight.shape) == weight
    return torch.where(same, out.view(weight.shape), weight.detach().float())


def _grid(blocks: Tensor, name: str) -> _Grid:
    """Return the levels of blocks (n, 32) in a format."""
    zero = torch.zeros_like(blocks[:, :1])
    if name in FROM_MINIMUM:
        low = blocks.amin(1, keepdim=True)
        return _Grid((blocks.amax(1, keepdim=True) - low) / FROM_MINIMUM[name], low, 0, FROM_MINIMUM[name])
    steps, _ = ABOUT_ZERO[name]
    if name == "Q8_0":
        return _Grid(blocks.abs().amax(1, keepdim=True) / steps, zero, -steps, 2 * steps)
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    return _Grid(largest / -steps, zero, -steps, 2 * steps - 1)


def _half(x: Tensor) -> Tensor:
    """Return numbers rounded to float16, in which scales and minima are stored."""
    return x.half().float()
