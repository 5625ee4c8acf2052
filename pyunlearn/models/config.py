"""Settings with which models are loaded by name, and an option that all functions on models share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyunlearn.options import Choice, Config, Flag, Text, Whole, option

WORKSPACE_OPTION: dict[str, Any] = {
    "default": None,
    "kind": Whole(0),
    "help": "Bytes for cached logits: more memory for less time, with the same result. Default: chosen from the free "
    "memory.",
    "group": "Model",
}
"""The option `workspace`, which several functions share."""


@dataclass(frozen=True, kw_only=True)
class LoadOptions(Config):
    """Settings with which a model that is given by its name is loaded, and where it runs.

    >>> LoadOptions(dtype="bfloat16").load_in_4bit
    False
    """

    dtype: str = option(
        "auto",
        Choice(("auto", "float32", "bfloat16", "float16")),
        "Number format of the weights, in which they are loaded, trained and saved. Default: auto, the one in which "
        "they were saved (float32 for a .gguf file).",
        group="Model",
    )
    device: str | None = option(
        None,
        Text("the name of a device"),
        "Where the model runs: cpu, cuda, cuda:1, mps, xpu, ... Default: the GPU, if there is one.",
        group="Model",
    )
    revision: str | None = option(
        None,
        Text("a branch, tag or commit"),
        "Branch, tag or commit of MODEL on the hub; the same as MODEL@REVISION, which other models' names take too.",
        group="Model",
    )
    attn_implementation: str | None = option(
        None,
        Text("a name"),
        "Implementation of attention in transformers: eager, sdpa, flash_attention_2, ... Default: transformers' "
        "choice.",
        group="Model",
    )
    load_in_4bit: bool = option(
        False,
        Flag(),
        "Quantize the weights to 4 bits (nf4) as they are loaded: about half a byte a parameter. Unlearning then needs "
        "--lora. Needs the package bitsandbytes.",
        group="Model",
    )
    trust_remote_code: bool = option(
        False,
        Flag(),
        "Run code that comes with the model: only for a model whose author you trust. Without it none is run.",
        group="Model",
    )
