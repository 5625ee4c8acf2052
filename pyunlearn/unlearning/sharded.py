"""Sharded training (FSDP2): the processes of a run that each hold a part of every weight, gradient and moment."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyunlearn.errors import ArgumentError, ModelError
from pyunlearn.models.condition import require_on_one_device
from pyunlearn.models.sharding import part, shard
from pyunlearn.unlearning.config import UnlearnConfig
from pyunlearn.unlearning.distributed import (
    Batch,
    Processes,
    T,
    computes_in_bfloat16,
    fsdp_version,
    require_fsdp2,
    together,
)
from pyunlearn.unlearning.schedule import Schedule


class ShardedProcesses(Processes):
    """Processes that hold the model in parts, and gather a layer at a time while they compute.

    All must take part in each forward and backward pass. So shares of unequal size are filled up with passes that do
    not count, and text is sampled in all processes.
    """

    sharded = True

    def place(self, module: Any, inner: Any) -> None:
        """Shard a model whose weights are those of the main process."""
        from accelerate.utils import broadcast

        dtype = torch.bfloat16 if computes_in_bfloat16(inner) else None
        with together(named=True):
            shard(module, inner, self._accelerator.device, lambda tensor: broadcast(tensor, from_process=0), dtype)

    def batches(self, batches: Iterator[tuple[list[int], Batch]]) -> Iterator[tuple[list[int], Batch]]:
        """Return this process's share of (indices, batch); one without indices is computed and not counted."""
        number, last = -1, None
        for number, (indices, last) in enumerate(batches):
            if number % self.count == self.rank:
                yield indices, last
        if last is not None and number % self.count < self.rank:  # the last round of batches is not complete
            yield [], last

    def micro_batches(self, schedule: Schedule, indices: Any) -> list[tuple[list[int], float]]:
        """Return this process's share in micro-batches, as many as the largest share has; the factor of some is 0."""
        shares = [schedule.micro_batches(indices[rank :: self.count]) for rank in range(self.count)]
        own = [(each, 1.0) for each in shares[self.rank]]
        missing = len(shares[0]) - len(own)
        return own + [(shares[0][0][:1], 0.0)] * missing if missing else own

    def once(self, make: Callable[[], T]) -> T:
        """Return, in every process, what the main process makes with the model; the others compute the same."""
        made = make()
        return super().once(lambda: made)

    def writes(self, due: bool = True) -> bool:
        """Return True in all processes where the main process finds a checkpoint due."""
        return self.any(due and self.is_main)

    def writes_after(self, error: BaseException) -> bool:
        """Return whether all processes are here, as they are after a signal; the parts of a lost one are lost."""
        return isinstance(error, KeyboardInterrupt)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Do nothing: the backward pass has summed the gradients."""

    def clip_gradients(self, parameters: Iterable[Tensor], max_norm: float) -> float:
        """Clip the gradients to a norm over all parts of all of them; return their norm before."""
        parts = [part(p.grad) for p in parameters if p.grad is not None]
        squares = sum((each.float().square().sum() for each in parts), torch.zeros((), device=self._accelerator.device))
        norm = math.sqrt(self.sum(float(squares)))
        factor = float(np.minimum(1.0, max_norm / (norm + 1e-6)))  # NaN stays NaN
        for each in parts:
            each.mul_(factor)
        return norm


def processes_of(accelerator: Any) -> Processes:
    """Return the processes of a launch, as FSDP asks for.

    Raises ArgumentError for another version of it, for offloading, and as `Processes`.
    """
    version = fsdp_version(accelerator)
    require_fsdp2(version)
    if version and os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() in ("true", "1"):
        raise ArgumentError(
            "this launch asks for fsdp_offload_params, and the weights stay on the GPUs here: set it to false, and "
            "start more processes, or train an adapter (--lora), if the model is too large"
        )
    return ShardedProcesses(accelerator) if version and int(accelerator.num_processes) > 1 else Processes(accelerator)


def require_shareable(processes: Processes, config: UnlearnConfig, module: Any) -> None:
    """Raise ArgumentError or ModelError for what the processes of a run, of which there may be one, cannot share."""
    require_on_one_device(module, processes.count)
    if processes.sharded:
        require_shardable(config, module)


def require_shardable(config: UnlearnConfig, module: Any) -> None:
    """Raise ArgumentError or ModelError for what a run with a sharded model cannot do."""
    if config.merge:
        raise ArgumentError(
            "merge needs the whole model in one process, and this launch shards it (FSDP): leave merge out, and merge "
            "the saved adapter with peft"
        )
    if config.attacks is not None:
        raise ArgumentError(
            "attacks need the whole model in one process, and this launch shards it (FSDP): leave attacks out, and run "
            "pyunlearn attack on the saved model"
        )
    if config.robust:
        raise ArgumentError(
            "robust changes and restores the whole model in each process, and this launch shards it (FSDP): leave "
            "robust out, or launch the run without FSDP"
        )
    if config.mask is not None:
        raise ArgumentError(
            "mask needs the whole model in each process, and this launch shards it (FSDP): leave mask out, or launch "
            "the run without FSDP"
        )
    if any(not p.is_floating_point() for p in module.parameters()):
        raise ModelError(
            "quantized weights cannot be sharded (FSDP): leave load_in_4bit out, or launch the run without FSDP"
        )
    if config.lora is None and len(dtypes := {p.dtype for p in module.parameters() if p.requires_grad}) > 1:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ModelError(
            f"the trained weights are {names}, and this launch shards them (FSDP), which needs one dtype: choose one "
            "(--dtype), or train an adapter (--lora)"
        )
