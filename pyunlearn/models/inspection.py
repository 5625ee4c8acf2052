"""Inspection of a transformers model: facts read from its configuration and its modules."""

from __future__ import annotations

from typing import Any

from torch import nn

from pyunlearn.errors import ModelError


def unwrapped(model: Any) -> Any:
    """Return the transformers model inside any wrappers of DDP, PEFT and torch.compile."""
    inner = model
    while True:
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif type(inner).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = inner.module
        elif hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        else:
            return inner


def require_language_model(model: Any, name: str = "model") -> Any:
    """Return the transformers model inside a model, which is called `name` in messages.

    Raises ModelError unless it is a transformers model with a language-model head.
    """
    inner = unwrapped(model)
    if not hasattr(inner, "config") or not hasattr(inner, "get_output_embeddings"):
        kind = type(model).__name__
        raise ModelError(f"{name} must be a transformers language model, a path or a name, got a value of type {kind}")
    if inner.get_output_embeddings() is None:
        raise ModelError(
            f"{name} must have a language-model head, and {type(inner).__name__} has none: load it "
            "with AutoModelForCausalLM or AutoModelForSeq2SeqLM"
        )
    return inner


def is_encoder_decoder(inner: Any) -> bool:
    """Return True for an encoder-decoder model such as T5, False for a causal model such as GPT."""
    return bool(getattr(inner.config, "is_encoder_decoder", False))


def decoder_start_id(inner: Any) -> int:
    """Return the token id that the decoder of an encoder-decoder model starts from."""
    names = ("decoder_start_token_id", "pad_token_id")
    ids = (getattr(inner.config, name, None) for name in names)
    return next((i for i in ids if i is not None), 0)


def context_length(inner: Any, *, encoder_decoder: bool) -> int | None:
    """Return the number of positions of the longest sequence, or None where the model has no limit (T5).

    T5's n_positions limits nothing, so only max_position_embeddings counts for encoder-decoder models.
    """
    config = text_config(inner)
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    for name in names[:1] if encoder_decoder else names:
        length = getattr(config, name, None)
        if isinstance(length, int) and length > 0:
            return length
    return None


def text_config(inner: Any) -> Any:
    """Return the part of a model's configuration that describes its text decoder."""
    config = inner.config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def is_matrix(module: nn.Module) -> bool:
    """Return True for a plain linear layer: torch's, or GPT-2's Conv1D, which stores the transposed weight."""
    from transformers.pytorch_utils import Conv1D

    return type(module) in (nn.Linear, Conv1D)


def is_recomputing(model: Any) -> bool:
    """Return whether transformers' own gradient checkpointing is on."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
