"""Weights that an attack changes for a while, restored bit for bit at the end, also after an error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def temporarily(parameters: Mapping[str, nn.Parameter]) -> Iterator[dict[str, Tensor]]:
    """Save parameters in main memory, and write them back at the end of the block; yields the saved values.

    Their gradients are dropped, and each requires a gradient afterwards if it did before.
    """
    saved = {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}
    required = {name: p.requires_grad for name, p in parameters.items()}
    try:
        yield saved
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(saved[name])
                p.grad = None
                p.requires_grad_(required[name])


@contextmanager
def frozen_but(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let only these parameters of a model require gradients within the block."""
    before = {p: p.requires_grad for p in model.parameters()}
    wanted = {id(p) for p in parameters}
    try:
        for p in before:
            if p.is_floating_point():
                p.requires_grad_(id(p) in wanted)
        yield
    finally:
        for p, required in before.items():
            if p.is_floating_point():
                p.requires_grad_(required)
