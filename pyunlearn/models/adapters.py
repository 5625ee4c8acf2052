"""LoRA adapters: made before a run, and merged into the weights after it."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from pyunlearn.errors import ArgumentError, ModelError, missing_packages
from pyunlearn.models.devices import seeded
from pyunlearn.models.language_model import LanguageModel


def with_lora(lm: LanguageModel, rank: int, seed: int) -> LanguageModel:
    """Add a LoRA adapter to every linear layer but the head; only the adapter is trained, in float32.

    At first the adapter changes nothing. It has alpha = 2 * rank and no dropout. Saved, it names the model: one on this
    machine by its whole path, so that it is loaded from any folder, and one from the hub with its commit.

    Args:
        lm: the model, whose layers get the adapter in place.
        rank: of the matrices, 1 or more.
        seed: of the adapter's first matrices.

    Raises:
        ArgumentError: the model has an adapter already.
        DependencyError: without the package peft.
        ModelError: the model has no linear layer that peft can adapt.

    Source: Hu et al. 2021, arXiv 2106.09685.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise missing_packages("lora", "peft", otherwise="train all weights") from error
    from transformers.pytorch_utils import Conv1D

    if hasattr(lm.module, "peft_config"):
        raise ArgumentError("lora makes an adapter, and the model has one already, which a run trains: leave lora out")
    transposed = any(isinstance(m, Conv1D) for m in lm.inner.modules())  # GPT-2's layers
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", fan_in_fan_out=transposed
    )
    try:
        with seeded(seed, lm.device):
            adapted = get_peft_model(lm.module, config, revision=getattr(lm.module.config, "_commit_hash", None))
    except ValueError as error:
        raise ModelError(f"lora cannot adapt {lm.name}: {error}") from error
    own = adapted.peft_config["default"]
    if own.base_model_name_or_path and os.path.exists(own.base_model_name_or_path):
        own.base_model_name_or_path = os.path.abspath(own.base_model_name_or_path)
    return replace(lm, module=adapted)


def require_mergeable(model: Any) -> None:
    """Raise ArgumentError unless a model has an adapter that can be merged."""
    if not hasattr(model, "merge_adapter"):
        raise ArgumentError("merge needs a model with an adapter that can be merged: set lora as well, or leave it out")


def merged(model: Any) -> Any:
    """Merge the adapter of a PEFT model into its weights in place, and return the transformers model without it."""
    model.merge_adapter()
    return model.unload()
