"""The device on which the commands run a model, and random generators that are seeded for a while."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pyunlearn.errors import ArgumentError


def default_device() -> torch.device:
    """Return the machine's accelerator (CUDA, MPS, XPU, ...), or the CPU without one or with ACCELERATE_USE_CPU=true.

    That is the device that accelerate chooses for one process, and with it `pyunlearn.unlearn`; `use_device` and the
    variable ACCELERATE_TORCH_DEVICE name another.
    """
    if chosen := os.environ.get("ACCELERATE_TORCH_DEVICE"):
        return torch.device(chosen)
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "on", "t"):
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if accelerator is None else accelerator


def use_device(name: str) -> None:
    """Run models on this device from now on, in this process: "cpu", "cuda:1", "mps", ...

    Raises ArgumentError for a device that is not there.
    """
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        names = "cpu" if there is None else f"cpu and {there.type}"
        raise ArgumentError(f"device must be one that this machine has ({names}), got {name!r}") from error
    os.environ["ACCELERATE_TORCH_DEVICE"] = name


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's random generators; afterwards restore those of the CPU and of the device.

    >>> with seeded(0, torch.device("cpu")):
    ...     first = torch.rand(2)
    >>> with seeded(0, torch.device("cpu")):
    ...     torch.equal(torch.rand(2), first)
    True
    """
    devices = [] if device.type in ("cpu", "meta") else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield
