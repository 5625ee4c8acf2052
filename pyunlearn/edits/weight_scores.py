"""The largest of many numbers that lie in many tensors: exactly so many, without a copy of them all in one place and without sorting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

_PIECE = 1 << 24  # numbers looked at together: bounds the working memory
_LOW = 16  # bits that the second histogram tells apart

Key = TypeVar("Key")


def largest(scores: Mapping[Key, Tensor], count: int) -> dict[Key, Tensor]:
    """name -> True at the `count` largest of all scores, float32 and 0 or more; of equal ones the first in the order of the mapping are taken.

    Floats from 0 upwards are in the order of their bits read as integers, so two histograms, of the upper bits and of the lower ones
    below the bin that the count ends in, find the smallest that is taken.
    """
    every = list(scores.values())
    if count < 1:
        return {name: torch.zeros_like(x, dtype=torch.bool) for name, x in scores.items()}
    high, above = _bin_of(_histogram(every, 0, shift=_LOW), count)
    low, above = _bin_of(_histogram(every, high, shift=0), count, above)
    threshold = (high << _LOW) + low
    ties, found = count - above, {}
    for name, x in scores.items():
        bits = _bits(x)
        chosen = bits > threshold
        equal = (bits == threshold).flatten().nonzero().flatten()[: max(ties, 0)]
        chosen.view(-1)[equal] = True
        ties -= len(equal)
        found[name] = chosen
    return found


def _bits(x: Tensor) -> Tensor:
    return x.abs().float().contiguous().view(torch.int32)


def _pieces(scores: list[Tensor]) -> Iterator[Tensor]:
    for x in scores:
        yield from x.flatten().split(_PIECE)


def _histogram(scores: list[Tensor], high: int, *, shift: int) -> Tensor:
    """Of the upper bits; with shift 0 of the lower ones of those whose upper bits are `high`."""
    total = torch.zeros(1 << _LOW, dtype=torch.int64)
    for piece in _pieces(scores):
        bits = _bits(piece)
        part = bits >> _LOW if shift else bits[(bits >> _LOW) == high] & ((1 << _LOW) - 1)
        total += torch.bincount(part, minlength=1 << _LOW).cpu()
    return total


def _bin_of(histogram: Tensor, count: int, above: int = 0) -> tuple[int, int]:
    """(the bin that the count-th largest is in, how many lie above that bin)."""
    from_top = histogram.flip(0).cumsum(0)
    place = int((from_top < count - above).sum())
    place = min(place, len(histogram) - 1)
    before = int(from_top[place - 1]) if place else 0
    return len(histogram) - 1 - place, above + before
