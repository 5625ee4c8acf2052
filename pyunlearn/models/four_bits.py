"""Weights in 4 bits, quantized by bitsandbytes: how they are loaded, and that gradients pass through them."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from pyunlearn.errors import ModelError, missing_packages
from pyunlearn.models.devices import default_device


def loading_arguments() -> dict[str, Any]:
    """Return the arguments with which transformers quantizes weights to 4 bits (nf4) as it loads them.

    Raises DependencyError without bitsandbytes.

    Source: Dettmers et al. 2023, arXiv 2305.14314 (QLoRA).
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise missing_packages("load_in_4bit", "bitsandbytes", otherwise="leave it out")
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": settings, "device_map": {"": str(default_device())}}


def keep_differentiable(model: Any) -> None:
    """Let gradients pass through the 4-bit layers of a model on a CPU; nothing changes in other models.

    In evaluation mode bitsandbytes (0.50) repacks the weights for a kernel that has no backward pass, and the gradients
    of the layers below are silently wrong.

    Raises ModelError where the weights are repacked already.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            state = getattr(module.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                raise ModelError(
                    "the 4-bit weights were packed for inference when the model was first used, and no gradient passes "
                    "through them: load the model again and unlearn before other use"
                )
