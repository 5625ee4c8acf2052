"""Settings with which models are loaded by name, and an option that all functions on models share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyunlearn.errors import ArgumentError
from pyunlearn.options import Choice, Config, Flag, Kind, Several, Text, Whole, option

WORKSPACE_OPTION: dict[str, Any] = {
    "default": None,
    "kind": Whole(0),
    "help": "Bytes for cached logits: more memory for less time, with the same result. Default: chosen from the free "
    "memory.",
    "group": "Model",
}
"""The option `workspace`, which several functions share."""

TASKS_OPTION: dict[str, Any] = {
    "default": None,
    "kind": Several(Text("the name of a task of lm-evaluation-harness, or the path of a YAML file that defines one")),
    "help": "Tasks that lm-evaluation-harness (the package lm-eval) runs on the model: names of its tasks and groups, "
    "or paths of YAML files.",
    "group": "Method",
}
"""The option `tasks`, which audit and compare share."""

TASK_LIMIT_OPTION: dict[str, Any] = {
    "default": None,
    "kind": Whole(1),
    "help": "Only the first N documents of each task. Default: all.",
    "group": "Method",
}
"""The option `task_limit`, which audit and compare share."""


GGUF_FORMATS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "F32")
"""Formats of tensors in a GGUF file that can be written, from the smallest to the largest."""


@dataclass(frozen=True)
class FilePath(Kind):
    """The path of a file, which `what` describes; whether it is there is looked up later."""

    what: str

    @property
    def wanted(self) -> str:
        return self.what

    def accepts(self, value: Any) -> bool:
        return isinstance(value, (str, Path)) and bool(str(value).strip())


GGUF_LIKE_OPTION: dict[str, Any] = {
    "default": None,
    "kind": FilePath("the path of a GGUF file"),
    "help": "The GGUF file of MODEL that is served today, or MODEL itself: unlearn in the formats of its tensors, so "
    "that no text comes back when the new weights are written in them. The weights are rounded to them before the "
    "first score and in every step, and all numbers are those of rounded weights. The command writes the new file, "
    "FOLDER.gguf, with the metadata and the tokenizer of this one; in Python, result.save_gguf does.",
    "group": "Output",
}
"""The option `gguf_like`."""

GGUF_AT_LEAST_OPTION: dict[str, Any] = {
    "default": None,
    "kind": Choice(GGUF_FORMATS),
    "help": "Of gguf_like: take this format for weights that have a smaller one there, since few bits can undo the "
    "run. Default: the formats of that file.",
    "group": "Output",
}
"""The option `gguf_at_least`."""


def require_tasks_for_limit(tasks: Sequence[str] | None, task_limit: int | None) -> None:
    """Raise ArgumentError for a limit of the tasks' documents where there are no tasks."""
    if task_limit is not None and tasks is None:
        raise ArgumentError("task_limit is the number of documents of each task, and there are no tasks: give tasks")


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
        "Where the model runs: cpu, cuda, cuda:1, mps, xpu, ..., or auto, with its layers on all GPUs of the machine. "
        "Default: the GPU, if there is one.",
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
