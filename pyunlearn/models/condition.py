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
    """Raise ModelError where weights of a model, `name` in the message, were never loaded (meta device)."""
    for owner, weight, tensor in _tensors(model):
        if tensor.is_meta and not _is_offloaded(owner):
            raise ModelError(
                f"the weights of {name} are not all loaded: {weight} is on the meta device and has no values; load it "
                "whole with from_pretrained"
            )


def require_trainable(model: nn.Module, name: str = "model") -> None:
    """Raise ModelError where the weights of a model, `name` in the message, cannot be changed as they are.

    That is where parts of it are offloaded, where it was made in torch.inference_mode, where it is quantized and has no
    adapter, and where no parameter requires a gradient.
    """
    if away := _offloaded(model):
        raise ModelError(
            f"parts of {name} are offloaded ({away}), where no gradient reaches them: load it on one device (without "
            "device_map), or take a smaller model"
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


def device_of(model: nn.Module) -> torch.device:
    """Return the device that takes a model's inputs: of its first weight, or that to which offloaded ones are moved."""
    first = next(model.parameters()).device
    hooks: list[Any] = [getattr(module, "_hf_hook", None) for module in model.modules()] if first.type == "meta" else []
    execution = (getattr(hook, "execution_device", None) for hook in hooks)
    device = next((each for each in execution if each is not None), first)
    return torch.device(device)


def float_types(model: nn.Module) -> list[str]:
    """Return the names of the floating-point dtypes of a model's parameters, sorted."""
    return sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()})


def _tensors(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield (module, name, tensor) of every parameter and buffer."""
    for prefix, module in model.named_modules():
        own = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        yield from ((module, f"{prefix}.{name}".strip("."), tensor) for name, tensor in own)


def _is_offloaded(module: nn.Module) -> bool:
    """Return whether accelerate moves a module's weights in for each forward pass."""
    hook: Any = getattr(module, "_hf_hook", None)
    return any(getattr(each, "offload", False) for each in getattr(hook, "hooks", [hook]))


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
