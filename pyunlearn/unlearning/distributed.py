"""Data parallelism: sharding, reductions, broadcasts, over processes that each hold the whole model.

The gradients are summed here and not by a DDP wrapper: the fused head is not called through the model's forward, shards
may be empty, and the model must come back as the user gave it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pyunlearn.errors import ArgumentError, TrainingError, first_line


class LostProcess(TrainingError):
    """Another process of the run has ended, so that this one cannot continue."""


@contextmanager
def _together() -> Iterator[None]:
    """Raise LostProcess where an operation of all processes fails."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo's and NCCL's
        raise LostProcess(
            f"another process of this launch has ended, so this one ends too ({first_line(error)}): launch the run "
            "again, with resume=True (--resume) where there is a checkpoint"
        ) from error


_SERVED = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU")


class Processes:
    """Processes of a run, as seen from one of them. With one process, every operation is the identity.

    Raises ArgumentError where the processes hold the model in parts (FSDP, DeepSpeed, tensor parallel).
    """

    def __init__(self, accelerator: Any) -> None:
        kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
        if kind not in _SERVED:
            raise ArgumentError(
                f"unlearn runs on one process, or on several that each hold the whole model (DDP), and this launch is "
                f"{kind}: launch it without, and train an adapter (peft) if the model is too large"
            )
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
            raise ArgumentError(
                "this launch asks for FSDP, which accelerate ignores without a GPU: unlearn would run on the whole "
                "model in each process; launch it without FSDP"
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
        with _together():
            total: NDArray[np.float64] = self._accelerator.reduce(local, "sum").cpu().numpy()
        return total

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by its sum over all processes; one that is missing counts as zero."""
        if self.count == 1:
            return
        with _together():
            for p in parameters:
                p.grad = self._accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "sum")

    @torch.no_grad()
    def broadcast_weights(self, model: nn.Module) -> None:
        """Give every process the main process's parameters and buffers."""
        if self.count > 1:
            from accelerate.utils import broadcast

            with _together():
                for p in [*model.parameters(), *model.buffers()]:
                    p.copy_(broadcast(p.detach().clone(), from_process=0))

    def broadcast_masks(self, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the main process's boolean tensors in every process; names and shapes are the same already."""
        if self.count == 1:
            return masks
        from accelerate.utils import broadcast

        with _together():
            return {name: broadcast(m.to(torch.uint8), from_process=0).bool() for name, m in masks.items()}

    def broadcast_objects(self, items: Sequence[Any]) -> list[Any]:
        """Return the main process's items in every process."""
        if self.count == 1:
            return list(items)
        from accelerate.utils import broadcast_object_list

        box = [list(items)]
        with _together():
            broadcast_object_list(box, from_process=0)
        return box[0]

    def barrier(self) -> None:
        """Wait for all processes to get here."""
        if self.count > 1:
            with _together():
                self._accelerator.wait_for_everyone()


def is_main_process() -> bool:
    """Return True in the main one of several processes, and in a process of its own; known without an Accelerator."""
    return os.environ.get("RANK", "0") == "0"


def make_accelerator(module: nn.Module) -> Any:
    """Make an Accelerator; float32 weights compute in bfloat16 on a GPU that has it.

    Several processes on a machine without a GPU, as `torchrun` starts them, are joined by gloo on its CPUs. The state
    of an earlier Accelerator is reused.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if AcceleratorState._shared_state:
        return Accelerator()
    is_float32 = next(module.parameters()).dtype == torch.float32
    mixed = is_float32 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    on_cpus = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()
    return Accelerator(mixed_precision="bf16" if mixed else "no", cpu=on_cpus)
