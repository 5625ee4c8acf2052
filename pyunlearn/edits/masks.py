"""Masks of the weights that a run may change: checks of a user's mask, and its digest for a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyunlearn.data import Tokens
from pyunlearn.edits.saliency import salient
from pyunlearn.errors import ArgumentError, brief
from pyunlearn.probes.gradients import mean_gradient, trained_parameters

Mask = dict[str, Tensor]


def require_mask(mask: Any) -> None:
    """Raise ArgumentError for an object that can be a mask of no model.

    >>> require_mask({"lm_head.weight": 1})
    Traceback (most recent call last):
    pyunlearn.errors.ArgumentError: mask of lm_head.weight must be a boolean tensor like the parameter, got int
    """
    if not (mask is None or isinstance(mask, Mapping) or (isinstance(mask, str) and mask in ("saliency", "nonzero"))):
        raise ArgumentError(
            f'mask must be "saliency", "nonzero" or a dict of parameter names to boolean tensors, got {brief(mask)}'
        )
    for name, tensor in mask.items() if isinstance(mask, Mapping) else ():
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.bool:
            got = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ArgumentError(f"mask of {name} must be a boolean tensor like the parameter, got {got}")


def mask_of(
    mask: Any, model: nn.Module, forget: Sequence[Tokens], *, batch_size: int = 8, workspace: int | None = None
) -> Mask:
    """Return name -> the weights that may change; empty for None. A parameter without an entry may change as a whole.

    Raises ArgumentError where the mask fits no parameter, or lets nothing change.
    """
    if mask is None:
        return {}
    parameters = trained_parameters(model)
    if mask == "saliency":
        tensors = salient(mean_gradient(model, forget, batch_size=batch_size, workspace=workspace), 0.5)
    elif mask == "nonzero":
        tensors = {name: p.detach() != 0 for name, p in parameters.items()}
    else:
        every = dict(model.named_parameters())
        fitting = {name: _fitting(name, m, every.get(name)) for name, m in mask.items()}
        tensors = {name: m for name, m in fitting.items() if name in parameters}
    if all(name in tensors and not bool(tensors[name].any()) for name in parameters):
        raise ArgumentError("mask lets no trainable weight change: give one that is True somewhere")
    return tensors


def _fitting(name: str, mask: Tensor, p: Tensor | None) -> Tensor:
    """Return a parameter's mask on its device. Raises ArgumentError where there is no such parameter or shape."""
    if p is None:
        raise ArgumentError(
            f"mask has {name!r}, which is no parameter of the model: take names of model.named_parameters()"
        )
    if mask.shape != p.shape:
        raise ArgumentError(f"mask of {name} must have the parameter's shape {tuple(p.shape)}, got {tuple(mask.shape)}")
    return mask.to(p.device)


def digest_of(mask: Any) -> str | None:
    """Return the form of a mask in a checkpoint: a name unchanged, a dict as its SHA-256.

    >>> digest_of("nonzero")
    'nonzero'
    """
    if not isinstance(mask, Mapping):
        return mask
    digest = hashlib.sha256()
    for name in sorted(mask):
        digest.update(name.encode() + mask[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
