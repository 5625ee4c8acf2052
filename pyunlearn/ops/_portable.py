"""Replacements for what some devices lack: Apple's MPS has no float64, segment_reduce and eigh, and fixed storages."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

_COMPLETE = ("cpu", "cuda", "meta")  # device types that have all of it


def float64_device(device: torch.device) -> torch.device:
    """Return the device, or the CPU where the device has no float64."""
    return device if device.type in _COMPLETE or _has_float64(device) else torch.device("cpu")


def to_float64(x: Tensor) -> Tensor:
    """Return x in float64: on its device, or on the CPU where the device has no float64.

    >>> to_float64(torch.ones(1)).dtype
    torch.float64
    """
    home = float64_device(x.device)
    return x.double() if home == x.device else x.to(home).double()


def on_one_device(parts: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors that may be on several devices on the device of the first; differentiable.

    >>> [x.item() for x in on_one_device([torch.tensor(1), torch.tensor(2)])]
    [1, 2]
    """
    return [part.to(parts[0].device) for part in parts]


def segment_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """Return (B,) the sums of consecutive segments of values (n,), of lengths (B,); differentiable, without atomics.

    >>> segment_sums(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, 0, 2]))
    tensor([1., 0., 5.])
    """
    if values.device.type in _COMPLETE:
        return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)
    return torch.stack([part.sum() for part in values.split(lengths.tolist())])  # synchronizes


def write_rows(out: Tensor, rows: Tensor, values: Tensor, dim: int = 0) -> Tensor:
    """Write the slices of values to the indices `rows` of one dimension of out, in place, and return out.

    >>> write_rows(torch.zeros(3), torch.tensor([2, 0]), torch.tensor([1.0, 2.0]))
    tensor([2., 0., 1.])
    """
    if out.device.type in _COMPLETE:
        return out.index_copy_(dim, rows, values)
    out[(slice(None),) * dim + (rows,)] = values  # MPS has index_copy from torch 2.8 on only
    return out


def eigenvectors(symmetric: Tensor) -> Tensor:
    """Return the eigenvectors of a symmetric matrix, as columns, on its device."""
    home = symmetric.device if symmetric.device.type in _COMPLETE else torch.device("cpu")
    return torch.linalg.eigh(symmetric.to(home)).eigenvectors.to(symmetric.device)


def release(buffer: Tensor) -> None:
    """Free a tensor's memory although names still refer to it; no effect on a device whose storages keep their size."""
    if buffer.device.type in _COMPLETE:
        buffer.untyped_storage().resize_(0)


@cache
def _has_float64(device: torch.device) -> bool:
    """Try it: MPS raises TypeError at a conversion, a GPU of Intel's without float64 RuntimeError at an operation."""
    try:
        torch.ones(1, dtype=torch.float64, device=device).add_(1)
    except (TypeError, RuntimeError):
        return False
    return True
