"""The device on which the commands run a model, and random generators that are seeded for a while."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pyunlearn.errors import ArgumentError

AUTO = "auto"
"""The device of models whose layers are on all GPUs of the machine."""

_NUMBERED = ("cuda", "xpu", "npu")  # kinds of devices of which a machine can have several


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
    return torch.device("cpu") if accelerator is None else torch.device(_own(accelerator.type))


def use_device(name: str) -> None:
    """Run models on this device from now on, in this process: "cpu", "cuda:1", "mps", ...

    Of several processes that a launcher started, each takes its own GPU for "cuda".

    Raises ArgumentError for a device that is not there, and for one GPU that several processes would share.
    """
    kind, _, number = name.partition(":")
    if number and kind != "cpu" and _own(kind) != kind:
        raise ArgumentError(f"device {name!r} would be shared by all processes of the launcher: give {kind!r}")
    name = name if number else _own(name)
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        names = "cpu" if there is None else f"cpu and {there.type}"
        raise ArgumentError(f"device must be one that this machine has ({names}), got {name!r}") from error
    os.environ["ACCELERATE_TORCH_DEVICE"] = name


def spreads_layers(name: str | None) -> bool:
    """Return whether models are loaded with their layers on all GPUs: for the device "auto", where there are several.

    Raises ArgumentError for "auto" in one of several processes that a launcher started.
    """
    if name != AUTO:
        return False
    if (count := int(os.environ.get("WORLD_SIZE") or 1)) > 1:
        raise ArgumentError(
            f"device 'auto' spreads a model's layers over the GPUs in one process, and the launcher started {count}: "
            "start one process, or leave device out"
        )
    return torch.accelerator.is_available() and torch.accelerator.device_count() > 1


def bfloat16_requested() -> bool:
    """Return whether ACCELERATE_MIXED_PRECISION is bf16, which `accelerate launch --mixed_precision bf16` sets."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower() == "bf16"


def _own(kind: str) -> str:
    """Return the device of this kind that belongs to this process, of several that a launcher started: "cuda:1"."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1 or kind not in _NUMBERED:
        return kind
    visible = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    rank = int(os.environ.get("LOCAL_RANK") or 0)
    return f"{kind}:{rank % visible if visible else rank}"  # some launchers show each process its GPU alone


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
