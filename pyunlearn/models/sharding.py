"""Models sharded with FSDP2: each process holds a part of every weight, and layers are gathered while they compute.

Source: Zhao et al. 2023, arXiv 2304.11277; `torch.distributed.fsdp.fully_shard`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyunlearn.errors import ModelError


def shard(
    model: Any,
    inner: Any,
    device: torch.device,
    synchronize: Callable[[Tensor], Tensor],
    compute_dtype: torch.dtype | None = None,
) -> None:
    """Shard a model in place over all processes: each layer is gathered alone, then what is outside of the layers.

    The gradients of a backward pass are summed over the processes; each gets those of its part. The weights move to the
    device one layer at a time, so that no GPU holds the whole model.

    Args:
        model: the model, whole in the main process; in the others it may be on the meta device.
        inner: the transformers model inside, or the model itself.
        device: of this process.
        synchronize: returns the main process's values of a tensor on the device.
        compute_dtype: in which weights are gathered and compute; their gradients are summed in float32. None: their
            own.

    Raises:
        ModelError: the model has no layers that transformers marks as such, the processes made it differently, or torch
            is too old.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
    from transformers.modeling_layers import GradientCheckpointingLayer

    _require_same(inner)
    layers = [m for m in inner.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"FSDP shards a model layer by layer, and transformers marks no layers of {type(inner).__name__}: launch "
            "the run without FSDP"
        )
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise ModelError(
            f"the FSDP of torch {torch.__version__} cannot sum gradients: install a newer torch, or launch the run "
            "without FSDP"
        )
    policy = MixedPrecisionPolicy(compute_dtype, compute_dtype and torch.float32)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in [*reversed(layers), inner]:  # a layer inside a layer first
        for tensor in _tensors(module):
            _synchronize(tensor, device, synchronize)
        unit = fully_shard(module, mesh=mesh, mp_policy=policy)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no other
        unit.set_gradient_divide_factor(1.0)  # the losses are divided by all examples already
    adapter = getattr(model, "base_model", None) if hasattr(model, "peft_config") else None
    if adapter is not None and adapter is not inner:  # it calls the forward of the model, without the hooks that gather
        adapter.forward = inner.__call__


def _require_same(model: nn.Module) -> None:
    """Raise ModelError where the weights of the main process are others than those that its configuration makes."""
    own = [(name, tuple(p.shape), str(p.dtype)) for name, p in model.named_parameters()]
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, own)
    different = sorted({row[0] for each in every for row in set(each) ^ set(own)})
    if different:
        raise ModelError(
            f"the saved weights are not those that the model's configuration describes ({different[0]} has another "
            "shape or dtype, or is tied to another): choose --dtype float32, or load it with transformers and save it "
            "again"
        )


def _tensors(module: nn.Module) -> list[Tensor]:
    """Return the parameters, buffers and other tensors of a module that are not sharded yet, each once."""
    others = [value for each in module.modules() for value in vars(each).values() if isinstance(value, Tensor)]
    every = [*module.parameters(), *module.buffers(), *others]
    return list({id(tensor): tensor for tensor in every if not is_part(tensor)}.values())


def _synchronize(tensor: Tensor, device: torch.device, synchronize: Callable[[Tensor], Tensor]) -> None:
    """Give a tensor the main process's values in place; one on the meta device gets its memory here."""
    if not tensor.is_meta:
        tensor.data = synchronize(tensor.detach().to(device, copy=True)).to(tensor.device)
        return
    value = synchronize(torch.empty_like(tensor, device=device, requires_grad=False))
    # the thread of the operation may still hold `value`, which could not be swapped then: both are new tensors
    is_parameter = isinstance(tensor, nn.Parameter)
    torch.utils.swap_tensors(tensor, nn.Parameter(value, tensor.requires_grad) if is_parameter else value.detach())


def is_sharded(model: nn.Module) -> bool:
    """Return whether a transformers model was sharded by `shard`."""
    return hasattr(model, "set_gradient_divide_factor")


def is_part(tensor: Tensor) -> bool:
    """Return whether this process holds only a part of a tensor."""
    return hasattr(tensor, "device_mesh")


def part(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, without a copy: the tensor itself where it is not sharded."""
    return tensor.detach().to_local() if is_part(tensor) else tensor  # type: ignore[attr-defined, no-any-return]


def part_like(whole: Tensor, parameter: Any) -> Tensor:
    """Return this process's part of a parameter's tensor, which is whole in every process, or this part already.

    Or, of a tensor of another shape, this process's share of its rows.
    """
    if not is_part(parameter) or whole.shape == part(parameter).shape:
        return whole
    mesh = parameter.device_mesh
    parts = whole.chunk(mesh.size(), parameter.placements[0].dim)
    rank = mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else whole[:0]


@torch.no_grad()
def gathered(own: Tensor, parameter: Any) -> Tensor | None:
    """Return a tensor of which each process holds its part, whole and on the CPU; None outside of the main process.

    `parameter` is sharded in the same way, and has the shape of the whole.
    """
    from torch.distributed.tensor import DTensor

    mesh = parameter.device_mesh
    sharded = DTensor.from_local(
        own, mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    whole = sharded.full_tensor()
    return whole.cpu() if mesh.get_rank() == 0 else None


def first_of_all(value: str | None) -> str | None:
    """Return the first value that is not None in the order of the processes; all of them call it."""
    values: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return next((each for each in values if each is not None), None)


def drop_gathered(model: nn.Module) -> None:
    """Free the weights that are gathered: they are old once a process changes its part, and not those that are trained.

    The weights outside of the layers stay gathered from one forward pass to the next backward pass.
    """
    for module in model.modules():
        if is_sharded(module):
            module.reshard()  # type: ignore[operator]


def whole_state_dict(model: nn.Module) -> dict[str, Tensor] | None:
    """Gather the state dict of a sharded model in the main process, tensor by tensor; it is empty in the others.

    Of a model with an adapter, the adapter's alone. None where the model is not sharded.
    """
    if not isinstance(model, nn.Module) or not any(map(is_sharded, model.modules())):
        return None
    drop_gathered(model)
    whole: dict[int, Any] = {}  # tied weights once
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if hasattr(model, "peft_config") and not tensor.requires_grad:
            continue
        if id(tensor) not in whole:
            whole[id(tensor)] = gathered(part(tensor), tensor) if is_part(tensor) else tensor.detach().cpu()
        state[name] = whole[id(tensor)]
    return state if torch.distributed.get_rank() == 0 else {}
