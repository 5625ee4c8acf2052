"""Cache of the reference model's last hidden states at scored positions, so that no second model stays in memory."""

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
"""Bytes of states in main memory; larger caches use a memory-mapped temporary file."""


class HiddenStateCache:
    """Distributions of texts under one model: a state (D,) for each scored token, on the CPU, and the head.

    The head is copied only where it is trained, or where `copies_head`.

    Args:
        parts: (indices of some texts, their distributions in that order).
        sizes: index of a text -> its scored tokens.
        device: on which the distributions are used.
        in_memory: bytes allowed in main memory.
        copies_head: True where the head's weights are freed after the pass, as those of a sharded model are.

    Raises OutputError where the states fit neither in main memory nor on the disk.
    """

    def __init__(
        self,
        parts: Iterator[tuple[list[int], Distributions]],
        sizes: dict[int, int],
        device: torch.device,
        in_memory: int = IN_MEMORY,
        *,
        copies_head: bool = False,
    ) -> None:
        self.device = device
        self.ends, end = {}, 0
        for index, size in sizes.items():
            end += size
            self.ends[index] = (end - size, end)
        self.states: Tensor | None = None  # (all scored tokens, D)
        self.head: Head | None = None
        self.workspace: int | None = None
        for indices, distributions in parts:
            states, self.head, self.workspace = distributions
            if self.states is None:
                self.states = _allocate(end, states, in_memory)
            for index, part in zip(indices, states.split([sizes[i] for i in indices]), strict=True):
                first, last = self.ends[index]
                self.states[first:last] = part.to("cpu")
        if self.head is not None:
            weight, bias = self.head.weight, self.head.bias
            weight = _constant(weight, copies_head).to(device)
            bias = None if bias is None else _constant(bias, copies_head).to(device)
            self.head = self.head._replace(weight=weight, bias=bias)

    def at(self, indices: Iterable[int]) -> Distributions:
        """Return the concatenated distributions of texts, on the device of their use."""
        assert self.states is not None
        states = torch.cat([self.states[slice(*self.ends[i])] for i in indices])
        return Distributions(states.to(self.device), self.head, self.workspace)

    def magnitudes(self, indices: Iterable[int]) -> NDArray[np.float64]:
        """Return (n,) the mean magnitude of each text's states, a fingerprint of the reference model."""
        assert self.states is not None
        states = [self.states[slice(*self.ends[i])] for i in indices]
        return np.array([float(s.abs().double().mean()) for s in states], dtype=np.float64)


def _constant(parameter: Tensor, copies: bool) -> Tensor:
    """Return a copy of a parameter that is trained; share the memory of one that is not, unless `copies`."""
    return parameter.detach().clone() if copies or parameter.requires_grad else parameter.detach()


def _allocate(rows: int, like: Tensor, in_memory: int) -> Tensor:
    """Return an empty (rows, width) tensor of the dtype, on the CPU or in a file that is deleted with the process."""
    shape = (rows, like.shape[1])
    size = math.prod(shape) * like.dtype.itemsize
    if size <= in_memory:
        return torch.empty(shape, dtype=like.dtype)
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if size > free:
        raise OutputError(
            f"the reference model's states of these texts take {size / 1e9:.1f} GB, and {tempfile.gettempdir()} has "
            f"{free / 1e9:.1f} GB: give fewer or shorter texts, fewer max_steps, or another TMPDIR"
        )
    with tempfile.NamedTemporaryFile(prefix="pyunlearn-", delete=False) as file:
        path = Path(file.name)
    mapped = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=like.dtype)
    path.unlink()  # the mapping remains valid
    return mapped.view(shape)
