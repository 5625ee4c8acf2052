"""Conditions of a model in which it cannot be read, or not be changed: one sentence each."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from pyunlearn.errors import ModelError
from pyunlearn.models.inspection import unwrapped

_AWAY = ("cpu", "disk", "meta")


def require_loaded(model: nn.Module, name: str = "model") -> None:
    """Raise ModelError where weights of a model, `name` in the message, were never loaded (meta device).

    Likewise where a device map has put a module on another device than its weights, as it can do to a head and an
    embedding that share them: such a model cannot be run.
    """
    for owner, weight, tensor in _tensors(model):
        if tensor.is_meta and not _is_offloaded(owner):
            raise ModelError(
                f"the weights of {name} are not all loaded: {weight} is on the meta device and has no values; load it "
                "whole with from_pretrained"
            )
    if is_spread(model):
        _require_weights_at_hand(model, name)


def require_trainable(model: nn.Module, name: str = "model") -> None:
    """Raise ModelError where the weights of a model, `name` in the message, cannot be changed as they are.

    That is where parts of it are offloaded, where it was made in torch.inference_mode, where it is quantized and has no
    adapter, and where no parameter requires a gradient.
    """
    if away := _offloaded(model):
        raise ModelError(
            f"parts of {name} are offloaded ({away}), where no gradient reaches them: load it on one device (without "
            "device_map), on several GPUs that hold all of it, or take a smaller model"
        )
    for _, weight, tensor in _tensors(model):
        if tensor.is_inference():
            raise ModelError(
                f"{name} was made in torch.inference_mode ({weight} is an inference tensor), which no gradient can "
                "pass: load it outside of torch.inference_mode"
            )
    kind = _quantization(model)
    if kind and not any(hasattr(m, "peft_config") for m in model.modules()):
        raise ModelError(
            f"{name} is quantized ({kind}), and quantized weights do not train: add an adapter (--lora of unlearn, or "
            "peft.get_peft_model), or load it without quantization"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError(
            f"no parameter of {name} requires a gradient, so no method can change it: unfreeze it "
            "(model.requires_grad_(True)), or an adapter, first"
        )


def is_spread(model: nn.Module) -> bool:
    """Return whether a model's layers are on several devices, between which accelerate moves their inputs.

    Such is a model that was loaded with a device_map, or dispatched by accelerate.
    """
    return hasattr(unwrapped(model), "_hf_hook") and len({p.device for p in model.parameters()}) > 1


def to_device(model: Any, device: torch.device) -> Any:
    """Move a model to a device, in place, and return it; one whose layers are on several devices stays there."""
    return model if is_spread(model) else model.to(device)


def require_on_one_device(model: nn.Module, processes: int) -> None:
    """Raise ModelError where a model's layers are on several devices and several processes are to share its run."""
    if processes > 1 and is_spread(model):
        raise ModelError(
            f"the layers of model are on several devices (device_map), and this launch has {processes} processes, of "
            "which each needs the model on its own: start one process, or load it without device_map"
        )


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a transformers model's inputs and outputs.

    That is the device of its first weight, or that to which offloaded ones are moved. Where its layers are on several
    devices, it is the one of its head, on which log-likelihoods are computed: accelerate moves inputs from there to the
    first layer, and outputs back.
    """
    if is_spread(model) and (head := _device_of_head(model)) is not None:
        return head
    first = next(model.parameters()).device
    hooks: list[Any] = [getattr(module, "_hf_hook", None) for module in model.modules()] if first.type == "meta" else []
    execution = (getattr(hook, "execution_device", None) for hook in hooks)
    device = next((each for each in execution if each is not None), first)
    return torch.device(device)


def _device_of_head(model: Any) -> torch.device | None:
    """Return the device of the head's weights; None where there are none, or they are offloaded."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    return None if weight is None or weight.is_meta else torch.device(weight.device)


def float_types(model: nn.Module) -> list[str]:
    """Return the names of the floating-point dtypes of a model's parameters, sorted."""
    return sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()})


def weights_of(model: nn.Module) -> str:
    """Return the number format of a model's weights, for results: float32; bitsandbytes, bfloat16.

    >>> weights_of(nn.Linear(2, 2).bfloat16())
    'bfloat16'
    """
    return ", ".join(filter(None, [_quantization(model), *float_types(model)]))


def _tensors(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield (module, name, tensor) of every parameter and buffer."""
    for prefix, module in model.named_modules():
        own = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        yield from ((module, f"{prefix}.{name}".strip("."), tensor) for name, tensor in own)


def _hooks(module: nn.Module) -> list[Any]:
    """Return accelerate's hooks on a module."""
    hook: Any = getattr(module, "_hf_hook", None)
    return list(getattr(hook, "hooks", [hook]))


def _is_offloaded(module: nn.Module) -> bool:
    """Return whether accelerate moves a module's weights in for each forward pass."""
    return any(getattr(each, "offload", False) for each in _hooks(module))


def _require_weights_at_hand(model: nn.Module, name: str) -> None:
    """Raise ModelError for a module whose inputs are moved to another device than that of its own weights."""
    for prefix, module in model.named_modules():
        execution = (getattr(hook, "execution_device", None) for hook in _hooks(module))
        inputs = next((each for each in execution if each is not None), None)
        weights = next((p.device for p in module.parameters(recurse=False) if not p.is_meta), None)
        if inputs is None or weights is None or _is_offloaded(module):
            continue
        inputs = torch.device(weights.type, inputs) if isinstance(inputs, int) else torch.device(inputs)
        if not _same(inputs, weights):
            raise ModelError(
                f"the device_map of {name} puts {prefix or 'all of it'} on {inputs}, and its weights are "
                f"on {weights}: put modules that share weights (embedding and head) on one device, and move none later"
            )


def _same(a: torch.device, b: torch.device) -> bool:
    """Return whether two names may be of one device: "cuda" is that of any GPU."""
    return a.type == b.type and (a.index == b.index or None in (a.index, b.index))


def _offloaded(model: nn.Module) -> str:
    """Return where parts of a model are offloaded to, as a clause, or an empty string."""
    device_map = getattr(unwrapped(model), "hf_device_map", None) or {}
    places = {str(place) for place in device_map.values()}
    away = sorted(place for place in places if place in _AWAY)
    if away and (len(places) > 1 or places & {"disk", "meta"}):
        return f"hf_device_map has {', '.join(away)}"
    part = next((name for name, module in model.named_modules() if _is_offloaded(module)), None)
    return "" if part is None else f"{part or 'all of it'}, by accelerate"


def _quantization(model: nn.Module) -> str:
    """Return how a model is quantized, or an empty string."""
    inner = unwrapped(model)
    if getattr(inner, "is_quantized", False) or getattr(inner, "hf_quantizer", None) is not None:
        method = getattr(inner, "quantization_method", None)
        return str(getattr(method, "value", method) or "by transformers")
    for bits in (4, 8):
        if getattr(inner, f"is_loaded_in_{bits}bit", False):
            return f"{bits} bits"
    for module in model.modules():
        kind = type(module)
        if "quantized" in kind.__module__.split(".") or kind.__module__.startswith("bitsandbytes"):
            return kind.__name__
        for tensor in module.parameters(recurse=False):
            if type(tensor.data).__module__.startswith("torchao") or not _floats(tensor):
                return f"{kind.__name__} with {str(tensor.dtype).removeprefix('torch.')} weights"
    return ""


def _floats(tensor: Tensor) -> bool:
    return torch.is_floating_point(tensor) or torch.is_complex(tensor)
