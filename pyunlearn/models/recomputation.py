"""Gradient checkpointing of a model in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from pyunlearn.errors import ModelError
from pyunlearn.models.attention import attention_of


@contextmanager
def recomputed_layers(model: Any) -> Iterator[None]:
    """Recompute the activations of each layer in the backward pass, within the context, instead of storing them.

    The gradients are the same, bit for bit on a CPU, for one more forward pass of each layer; only the layers' inputs
    are stored. transformers' own `gradient_checkpointing_enable` has no effect in evaluation mode, in which a run must
    train: dropout would change the scores.

    Args:
        model: a transformers model, wrapped or not.

    Raises:
        ModelError: the model has no layers that transformers could recompute either.

    Source: Chen et al. 2016, arXiv 1604.06174.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"gradient checkpointing needs a model whose layers transformers can recompute, and "
            f"{type(model).__name__} has none: leave it out, or lower micro_batch_size"
        )
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(_recomputed, layer, layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _recomputed(layer: Any, forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    # no random numbers are drawn in evaluation mode
    again = partial(_attending, layer, forward)
    return checkpoint(again, *inputs, use_reentrant=False, preserve_rng_state=False, **named)


def _attending(layer: Any, forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    """Call a layer's forward with the attention of the model's, whose context has ended when it is computed again."""
    with attention_of(layer):
        return forward(*inputs, **named)
