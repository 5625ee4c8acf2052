"""What transformers leaves to be done about GGUF files: they are read once, and the model is then one like any other."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def read_once() -> Iterator[None]:
    """While it lasts each file's header is parsed once, and each table of names made once.

    A header holds the whole vocabulary, and transformers has it parsed for the configuration, for the tokenizer and twice for the weights; it has the
    table made for every module. With SmolLM2-135M that is two thirds of all loading.
    """
    try:
        gguf: Any = importlib.import_module("gguf")
    except ImportError:  # transformers says what to install
        yield
        return
    theirs = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map") if hasattr(gguf, name)}
    for name, function in theirs.items():
        setattr(gguf, name, functools.cache(function))
    try:
        yield
    finally:
        for name, function in theirs.items():
            setattr(gguf, name, function)


def dequantized(model: Any) -> None:
    """transformers still calls such a model quantized, and would refuse to save it."""
    model.hf_quantizer, model.is_quantized = None, False
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
