"""What a reference's head reads at every scored token, taken once and kept beside the run: so that no second model is."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyunlearn.errors import OutputError
from pyunlearn.models.distributions import Distributions, Head

IN_MEMORY = 1 << 30
"""Bytes kept in memory; more goes to a temporary file that is mapped."""


class Kept:
    """The distributions of some texts under one model.

    What is kept is a state (D,) for each scored token, on the CPU; and a copy of the head only where it is going to be trained. Raises OutputError
    where they fit neither in `in_memory` bytes nor on the disk.
    """

    def __init__(
        self, parts: Iterator[tuple[list[int], Distributions]], sizes: dict[int, int], in_memory: int = IN_MEMORY
    ) -> None:
        """parts: (places of some texts, their distributions in that order); sizes: the scored tokens of each place."""
        self.ends, end = {}, 0
        for place, size in sizes.items():
            end += size
            self.ends[place] = (end - size, end)
        self.states: Tensor | None = None
        self.head: Head | None = None
        self.workspace: int | None = None
        for places, found in parts:
            states, self.head, self.workspace = found
            if self.states is None:
                self.states = _room(end, states, in_memory)
            for place, part in zip(places, states.split([sizes[i] for i in places]), strict=True):
                first, last = self.ends[place]
                self.states[first:last] = part.to("cpu")
        if self.head is not None:
            bias = self.head.bias
            self.head = self.head._replace(weight=_fixed(self.head.weight), bias=None if bias is None else _fixed(bias))

    def at(self, places: Iterable[int], device: torch.device) -> Distributions:
        """Those texts' distributions, text by text."""
        assert self.states is not None
        states = torch.cat([self.states[slice(*self.ends[i])] for i in places])
        return Distributions(states.to(device), self.head, self.workspace)

    def magnitudes(self, places: Iterable[int]) -> NDArray[np.float64]:
        """The mean magnitude of each of those texts' states, by which a reference is known again."""
        assert self.states is not None
        found: NDArray[np.float64] = np.array(
            [float(self.states[slice(*self.ends[i])].abs().double().mean()) for i in places]
        )
        return found


def _fixed(parameter: Tensor) -> Tensor:
    """A copy of what will be trained; of what will not be, the memory it has now, wherever its model is moved later."""
    return parameter.detach().clone() if parameter.requires_grad else parameter.detach()


def _room(rows: int, like: Tensor, in_memory: int) -> Tensor:
    """(rows, width) of the dtype, on the CPU or in a file that is gone when the run is."""
    shape = (rows, like.shape[1])
    size = math.prod(shape) * like.dtype.itemsize
    if size <= in_memory:
        return torch.empty(shape, dtype=like.dtype)
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if size > free:
        raise OutputError(
            f"the reference's states of these texts take {size / 1e9:.1f} GB, and {tempfile.gettempdir()} has {free / 1e9:.1f} GB: "
            "give fewer or shorter texts, fewer max_steps, or another TMPDIR"
        )
    with tempfile.NamedTemporaryFile(prefix="pyunlearn-", delete=False) as file:
        path = Path(file.name)
    mapped = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=like.dtype)
    path.unlink()  # the mapping holds it
    return mapped.view(shape)
