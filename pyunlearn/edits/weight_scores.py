"""Selection of exactly the k largest numbers of many tensors, without concatenating or sorting them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

_CHUNK = 1 << 24  # numbers processed together: bounds the working memory
_LOW = 16  # bits that the second histogram distinguishes

Key = TypeVar("Key")


def largest(scores: Mapping[Key, Tensor], count: int) -> dict[Key, Tensor]:
    """Return name -> bool tensor, True at the `count` largest of all scores, which are float32 and 0 or more.

    Of equal scores the first in the order of the mapping are taken. Floats from 0 upwards are in the order of their
    bits read as integers, so two histograms, of the upper bits and of the lower bits within the bin that the count ends
    in, find the smallest score that is taken.

    >>> largest({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0, 0.5])}, 2)
    {'a': tensor([ True, False]), 'b': tensor([ True, False])}
    """
    tensors = list(scores.values())
    if count < 1:
        return {name: torch.zeros_like(x, dtype=torch.bool) for name, x in scores.items()}
    high, above = _bin_of(_histogram(tensors, 0, shift=_LOW), count)
    low, above = _bin_of(_histogram(tensors, high, shift=0), count, above)
    threshold = (high << _LOW) + low
    ties, masks = count - above, {}
    for name, x in scores.items():
        bits = _bits(x)
        chosen = bits > threshold
        equal = (bits == threshold).flatten().nonzero().flatten()[: max(ties, 0)]
        chosen.view(-1)[equal] = True
        ties -= len(equal)
        masks[name] = chosen
    return masks


def _bits(x: Tensor) -> Tensor:
    return x.abs().float().contiguous().view(torch.int32)


def _chunks(scores: list[Tensor]) -> Iterator[Tensor]:
    for x in scores:
        yield from x.flatten().split(_CHUNK)


def _histogram(scores: list[Tensor], high: int, *, shift: int) -> Tensor:
    """Count the scores by their upper bits; with shift 0, those whose upper bits are `high` by their lower bits."""
    total = torch.zeros(1 << _LOW, dtype=torch.int64)
    for chunk in _chunks(scores):
        bits = _bits(chunk)
        part = bits >> _LOW if shift else bits[(bits >> _LOW) == high] & ((1 << _LOW) - 1)
        total += torch.bincount(part, minlength=1 << _LOW).cpu()
    return total


def _bin_of(histogram: Tensor, count: int, above: int = 0) -> tuple[int, int]:
    """Return (the bin of the count-th largest score, the number of scores above that bin).

    >>> _bin_of(torch.tensor([4, 3, 2]), 4)
    (1, 2)
    """
    from_top = histogram.flip(0).cumsum(0)
    rank = int((from_top < count - above).sum())
    rank = min(rank, len(histogram) - 1)
    before = int(from_top[rank - 1]) if rank else 0
    return len(histogram) - 1 - rank, above + before
