"""Data parallelism: shares of the work, reductions, broadcasts, over processes that each hold the whole model.

The gradients are summed here and not by a DDP wrapper: the fused head is not called through the model's forward, shards
may be empty, and the model must come back as the user gave it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pyunlearn.errors import ArgumentError, TrainingError, first_line
from pyunlearn.models.condition import to_device
from pyunlearn.models.devices import bfloat16_requested
from pyunlearn.unlearning.schedule import Schedule

T = TypeVar("T")
Batch = TypeVar("Batch")


_TRANSPORTS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")


class LostProcess(TrainingError):
    """Another process of the run has ended, so that this one cannot continue."""


@contextmanager
def together(*, named: bool = False) -> Iterator[None]:
    """Raise LostProcess where an operation of all processes fails; if `named`, only after an error of gloo or NCCL."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if named and (isinstance(error, TrainingError) or not any(name in str(error) for name in _TRANSPORTS)):
            raise
        raise LostProcess(
            f"another process of this launch has ended, so this one ends too ({first_line(error)}): launch the run "
            "again, with resume=True (--resume) where there is a checkpoint"
        ) from error


class Processes:
    """Processes of a run, as seen from one of them. With one process, every operation is the identity.

    `sharded` is True where each process holds a part of the model, see `ShardedProcesses`.

    Raises ArgumentError where accelerate does not join the processes that were started, or does it in another way.
    """

    sharded = False

    def __init__(self, accelerator: Any) -> None:
        kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
        if kind not in ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", *(["FSDP"] * self.sharded)):
            raise ArgumentError(
                f"unlearn runs on one process, or on several that each hold the whole model (DDP) or a part of it "
                f"(FSDP version 2), and this launch is {kind}: launch it with examples/fsdp2.yaml, or train an adapter "
                "(--lora)"
            )
        world = int(os.environ.get("WORLD_SIZE") or accelerator.num_processes)
        if world != int(accelerator.num_processes):
            raise ArgumentError(
                f"the launcher started {world} processes, and accelerate joins {accelerator.num_processes}: each would "
                "run alone and write to the same folder; launch with `accelerate launch`, or start one process"
            )
        self._accelerator = accelerator
        self.rank, self.count = int(accelerator.process_index), int(accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        """True in the main process, which samples, prints and saves."""
        return self.rank == 0

    def place(self, module: Any, inner: Any) -> None:
        """Move a model to this process's device, with the main process's weights; `inner`: without its wrappers.

        One whose layers are on several devices stays there.
        """
        to_device(module, self._accelerator.device)
        self.broadcast_weights(module)

    def batches(self, batches: Iterator[tuple[list[int], Batch]]) -> Iterator[tuple[list[int], Batch]]:
        """Return this process's share of (indices, batch); one without indices is computed and not counted."""
        return islice(batches, self.rank, None, self.count)

    def micro_batches(self, schedule: Schedule, indices: Any) -> list[tuple[list[int], float]]:
        """Return this process's share of a step's examples, in micro-batches, and the factor on the loss of each."""
        return [(each, 1.0) for each in schedule.micro_batches(self.shard(indices))]

    def once(self, make: Callable[[], T]) -> T:
        """Return, in every process, what the main process makes with the model."""
        (made,) = self.broadcast_objects([make()] if self.is_main else [])
        return cast(T, made)

    def writes(self, due: bool = True) -> bool:
        """Return whether this process takes part in writing a checkpoint, which the main process finds due."""
        return due and self.is_main

    def writes_after(self, error: BaseException) -> bool:
        """Return whether this process takes part in writing a checkpoint after an error."""
        lost = isinstance(error, LostProcess)  # perhaps the main process
        return lost or (self.is_main and not isinstance(error, TrainingError))

    def clip_gradients(self, parameters: Iterable[Tensor], max_norm: float) -> float:
        """Clip the gradients to a norm over all of them; return their norm before."""
        return float(self._accelerator.clip_grad_norm_(parameters, max_norm))

    def shard(self, items: Any) -> Any:
        """Return this process's part of a sequence."""
        return items[self.rank :: self.count]

    def sum(self, value: float) -> float:
        """Return the sum of one number over all processes."""
        return value if self.count == 1 else float(self.sum_array(np.array([value]))[0])

    def any(self, here: bool) -> bool:
        """Return whether that is True in one process or more."""
        return here if self.count == 1 else self.sum(float(here)) > 0

    def sum_array(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sum of an array over all processes."""
        if self.count == 1:
            return values
        local = torch.as_tensor(values, device=self._accelerator.device)
        with together():
            total: NDArray[np.float64] = self._accelerator.reduce(local, "sum").cpu().numpy()
        return total

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by its sum over all processes; one that is missing counts as zero."""
        if self.count == 1:
            return
        with together():
            for p in parameters:
                p.grad = self._accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "sum")

    @torch.no_grad()
    def broadcast_weights(self, model: nn.Module) -> None:
        """Give every process the main process's parameters and buffers."""
        if self.count > 1:
            from accelerate.utils import broadcast

            with together():
                for p in [*model.parameters(), *model.buffers()]:
                    p.copy_(broadcast(p.detach().clone(), from_process=0))

    def broadcast_masks(self, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the main process's boolean tensors in every process; names and shapes are the same already."""
        if self.count == 1:
            return masks
        from accelerate.utils import broadcast

        with together():
            return {name: broadcast(m.to(torch.uint8), from_process=0).bool() for name, m in masks.items()}

    def broadcast_objects(self, items: Sequence[Any]) -> list[Any]:
        """Return the main process's items in every process."""
        if self.count == 1:
            return list(items)
        from accelerate.utils import broadcast_object_list

        box = [list(items)]
        with together():
            broadcast_object_list(box, from_process=0)
        return box[0]

    def barrier(self) -> None:
        """Wait for all processes to get here."""
        if self.count > 1:
            with together():
                self._accelerator.wait_for_everyone()


def fsdp_version(accelerator: Any = None) -> int:
    """Return the version of FSDP that this launch asks for, 0 for none.

    accelerate's launcher exports it; on CPUs an Accelerator passes over it.
    """
    plugin = getattr(getattr(accelerator, "state", None), "fsdp_plugin", None)
    if plugin is not None:
        return int(plugin.fsdp_version)
    asked_for = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    return int(os.environ.get("FSDP_VERSION", "1")) if asked_for else 0


def require_fsdp2(version: int) -> None:
    """Raise ArgumentError for FSDP version 1."""
    if version == 1:
        raise ArgumentError(
            "this launch asks for FSDP version 1, and unlearn shards a model with version 2: set fsdp_version: 2 in "
            "the config of accelerate (see examples/fsdp2.yaml)"
        )


def fills_in_weights() -> bool:
    """Return whether this process gets the weights from the main process, while these are sharded."""
    return fsdp_version() == 2 and not is_main_process()


def computes_in_bfloat16(module: nn.Module) -> bool:
    """Return whether a model's float32 weights compute in bfloat16.

    On a GPU that has it, and elsewhere where ACCELERATE_MIXED_PRECISION is bf16.
    """
    if next(module.parameters()).dtype != torch.float32:
        return False
    on_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return on_gpu or bfloat16_requested()


def is_main_process() -> bool:
    """Return True in the main one of several processes, and in a process of its own; known without an Accelerator."""
    return os.environ.get("RANK", "0") == "0"


def make_accelerator(module: nn.Module) -> Any:
    """Make an Accelerator; float32 weights compute in bfloat16 where `computes_in_bfloat16`.

    With FSDP these are gathered in bfloat16: autocast would hold a copy of each until the backward pass.
    Several processes on a machine without a GPU, as `torchrun` starts them, are joined by gloo on its CPUs. The state
    of an earlier Accelerator is reused.

    Raises ArgumentError for FSDP version 1, and for a launch that accelerate cannot join.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    require_fsdp2(fsdp_version())  # on CPUs accelerate refuses version 1 in words of its own
    if AcceleratorState._shared_state:
        return Accelerator()
    mixed = computes_in_bfloat16(module) and not fsdp_version()
    on_cpus = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()
    try:
        return Accelerator(mixed_precision="bf16" if mixed else "no", cpu=on_cpus)
    except (ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"accelerate cannot join the processes of this launch ({first_line(error)}): launch with `accelerate "
            "launch` or `torchrun`, or start one process without WORLD_SIZE"
        ) from error
