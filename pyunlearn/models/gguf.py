"""Support for GGUF files: faster loading through transformers, and a dequantized model that can be saved."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def cached_headers() -> Iterator[None]:
    """Cache the parsed header of each file and each table of tensor names within the context.

    A header holds the whole vocabulary. Without the cache, transformers parses it for the configuration, for the
    tokenizer and twice for the weights, and makes the table for every module: two thirds of the time to load
    SmolLM2-135M.
    """
    try:
        gguf: Any = importlib.import_module("gguf")
    except ImportError:  # the error message of transformers names the package
        yield
        return
    uncached = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map") if hasattr(gguf, name)}
    for name, function in uncached.items():
        setattr(gguf, name, functools.cache(function))
    try:
        yield
    finally:
        for name, function in uncached.items():
            setattr(gguf, name, function)


def mark_dequantized(model: Any) -> None:
    """Remove the quantization settings of a model with dequantized weights, so that transformers can save it."""
    model.hf_quantizer, model.is_quantized = None, False
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
