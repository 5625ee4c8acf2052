"""Facts about a transformers model that its configuration and modules tell."""

from __future__ import annotations

from typing import Any

from torch import nn

from pyunlearn.errors import ModelError


def unwrapped(model: nn.Module) -> Any:
    """The transformers model inside DDP, a PEFT wrapper or torch.compile."""
    seen: Any = model
    while True:
        if hasattr(seen, "_orig_mod"):
            seen = seen._orig_mod
        elif type(seen).__name__ in ("DistributedDataParallel", "DataParallel"):
            seen = seen.module
        elif hasattr(seen, "get_base_model"):
            seen = seen.get_base_model()
        else:
            return seen


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model reads with an encoder and writes with a decoder (T5) or does both in one (GPT)."""
    return bool(getattr(unwrapped(model).config, "is_encoder_decoder", False))


def decoder_start_id(model: nn.Module) -> int | None:
    """The token a decoder starts from, for encoder-decoder models."""
    config = unwrapped(model).config
    return next(
        (
            i
            for i in (getattr(config, "decoder_start_token_id", None), getattr(config, "pad_token_id", None))
            if i is not None
        ),
        0,
    )


def context_length(model: nn.Module) -> int | None:
    """The longest sequence the model has positions for, or None where it has no limit of its own (T5)."""
    config = _text_config(unwrapped(model).config)
    both = is_encoder_decoder(model)  # T5's n_positions limits nothing
    for name in (
        ("max_position_embeddings",)
        if both
        else ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    ):
        length = getattr(config, name, None)
        if isinstance(length, int) and length > 0:
            return length
    return None


def require_language_model(model: Any, name: str = "model") -> None:
    """Raise ModelError unless the model is one of transformers with a language-model head; `name` is the argument's."""
    inner = unwrapped(model) if isinstance(model, nn.Module) else model
    if not hasattr(inner, "config") or not hasattr(inner, "get_output_embeddings"):
        raise ModelError(
            f"{name} must be a transformers language model, a path or a name, got {type(model).__name__}: load it with "
            "AutoModelForCausalLM or AutoModelForSeq2SeqLM"
        )
    if inner.get_output_embeddings() is None:
        raise ModelError(
            f"{type(inner).__name__} has no language-model head, so it gives text no probability: load it with "
            "AutoModelForCausalLM or AutoModelForSeq2SeqLM instead"
        )


def _text_config(config: Any) -> Any:
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def vocabulary_of(model: Any) -> int:
    """How many tokens a model reads."""
    return int(unwrapped(model).get_input_embeddings().weight.shape[0])


def is_matrix(module: nn.Module) -> bool:
    """Return whether a module is a plain linear layer: torch's, or GPT-2's Conv1D, which stores the transposed weight."""
    from transformers.pytorch_utils import Conv1D

    return type(module) in (nn.Linear, Conv1D)
