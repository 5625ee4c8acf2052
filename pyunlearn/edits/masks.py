"""Masks of weights: what a user may give for one, and what a checkpoint remembers of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyunlearn.data import Tokens
from pyunlearn.edits.saliency import salient
from pyunlearn.errors import ArgumentError
from pyunlearn.probes.gradients import trained_parameters

Mask = dict[str, Tensor]


def require_mask(given: Any) -> None:
    """Raises ArgumentError for what can be a mask of no model."""
    if not (given is None or isinstance(given, Mapping) or given in ("saliency", "nonzero")):
        raise ArgumentError(
            f'mask must be "saliency", "nonzero" or a dict of parameter names to boolean tensors, got {given!r:.60}'
        )
    for name, mask in given.items() if isinstance(given, Mapping) else ():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
            raise ArgumentError(f"mask of {name} must be a boolean tensor like the parameter, got {got}")


def mask_of(
    given: Any, model: nn.Module, forget: Sequence[Tokens], *, batch_size: int = 8, workspace: int | None = None
) -> Mask:
    """name -> which weights may change; empty for None. A parameter that is not in it may change in whole.

    Raises ArgumentError where the mask fits no parameter, or lets nothing change.
    """
    if given is None:
        return {}
    parameters = trained_parameters(model)
    if given == "saliency":
        found = salient(model, forget, 0.5, batch_size=batch_size, workspace=workspace)
    elif given == "nonzero":
        found = {name: p.detach() != 0 for name, p in parameters.items()}
    else:
        every = dict(model.named_parameters())
        fitting = {name: _fitting(name, m, every.get(name)) for name, m in given.items()}
        found = {name: m for name, m in fitting.items() if name in parameters}
    if all(name in found and not bool(found[name].any()) for name in parameters):
        raise ArgumentError("mask lets no weight that trains change: give one that is True somewhere")
    return found


def _fitting(name: str, mask: Tensor, p: Tensor | None) -> Tensor:
    if p is None:
        raise ArgumentError(
            f"mask has {name!r}, which is no parameter of the model: take names of model.named_parameters()"
        )
    if mask.shape != p.shape:
        raise ArgumentError(f"mask of {name} must have the parameter's shape {tuple(p.shape)}, got {tuple(mask.shape)}")
    return mask.to(p.device)


def digest_of(given: Any) -> str | None:
    """What a checkpoint remembers of a mask given: a word as it is, a dict by its hash."""
    if not isinstance(given, Mapping):
        return given
    found = hashlib.sha256()
    for name in sorted(given):
        found.update(name.encode() + given[name].cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
