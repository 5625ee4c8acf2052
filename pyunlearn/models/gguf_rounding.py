"""Weights rounded as a GGUF file holds them, on any device, and numbers spread over what rounds to the same weight.

The formulas are those of the package gguf, which the tests compare bit by bit; its own work on the CPU alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 32  # weights that share a scale
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Format -> dtype, of the floating-point formats."""
_FROM_MINIMUM = {"Q4_1": 15, "Q5_1": 31}  # steps from the smallest to the largest weight of a block
_FROM_LARGEST = {"Q4_0": 8, "Q5_0": 16}  # steps from 0 to the largest weight of a block
_Q8_0 = 127  # the same, in each direction
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
    tensor([0.0000, 0.0000, 0.0667, 0.1334])
    """
    if name in FLOATS:
        return weight.detach().to(FLOATS[name]).float()
    blocks = weight.detach().float().reshape(-1, _BLOCK)
    grid = _grid(blocks, name)
    exact = (blocks - grid.start) * torch.where(grid.scale == 0, 0.0, 1 / grid.scale)
    if name == "Q8_0":  # halves are rounded away from zero
        levels = exact.abs().add_(0.5).floor_().mul_(exact.sign())
    else:
        levels = (exact - grid.first + 0.5).trunc_().clamp_(0, grid.steps).add_(grid.first)
    return (_half(grid.scale) * levels).add_(_half(grid.start)).view(weight.shape)


def spread(weight: Tensor, name: str, generator: torch.Generator) -> Tensor:
    """Return numbers that are rounded to the weight, drawn evenly from all that are; float32 of the same shape.

    A change of a fraction of a step, added to them, moves that fraction of the weights by one step: on average nothing
    of it is lost to rounding, where numbers in the middle of their steps would all stay. The weights that set the scale
    of a block keep their numbers, and so do those of floating-point formats, whose steps are small.

    Args:
        weight: rounded to the format already.
        name: the format.
        generator: of the CPU.

    Source: Schuchman 1964 (dither).
    """
    if name in FLOATS:
        return weight.detach().float()
    blocks = weight.detach().float().reshape(-1, _BLOCK)
    grid = _grid(blocks, name)
    noise = (torch.rand(blocks.shape, generator=generator).to(blocks.device) - 0.5) * (_INSIDE * grid.scale.abs())
    if name in _FROM_MINIMUM:
        ends: tuple[Tensor, ...] = (blocks.argmin(1, keepdim=True), blocks.argmax(1, keepdim=True))
        low, high = (blocks.gather(1, end) for end in ends)
    else:
        ends = (blocks.abs().argmax(1, keepdim=True),)
        high = blocks.gather(1, ends[0]).abs()
        low = -high
    out = blocks + noise
    out = torch.where((out < low) | (out > high), blocks - noise, out)  # none beyond the weights that set the scale
    for end in ends:
        out.scatter_(1, end, blocks.gather(1, end))
    return out.view(weight.shape)


def _grid(blocks: Tensor, name: str) -> _Grid:
    """Return the levels of blocks (n, 32) in a format."""
    zero = torch.zeros_like(blocks[:, :1])
    if name in _FROM_MINIMUM:
        low = blocks.amin(1, keepdim=True)
        return _Grid((blocks.amax(1, keepdim=True) - low) / _FROM_MINIMUM[name], low, 0, _FROM_MINIMUM[name])
    if name == "Q8_0":
        return _Grid(blocks.abs().amax(1, keepdim=True) / _Q8_0, zero, -_Q8_0, 2 * _Q8_0)
    steps = _FROM_LARGEST[name]
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    return _Grid(largest / -steps, zero, -steps, 2 * steps - 1)


def _half(x: Tensor) -> Tensor:
    """Return numbers rounded to float16, in which scales and minima are stored."""
    return x.half().float()
