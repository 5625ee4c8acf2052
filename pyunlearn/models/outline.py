"""A model without its weights: its layers on the meta device, in the dtype in which it would be loaded."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyunlearn.errors import ModelError
from pyunlearn.models import gguf
from pyunlearn.models.inspection import is_matrix
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.loading import Origin, dtype_of, load_tokenizer, located, origin, present_options, saved_dtype

_BYTES_IN_4_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes a weight in nf4: the 4 bits, and for 64 of them a scale of 8 bits, of which 256 have one of 32 bits."""


def outline(name: str | Path, tokenizer: Any = None) -> LanguageModel:
    """Make a language model without its weights: only the configuration and the tokenizer are read.

    The options are those of `load_options`, as in `pyunlearn.models.load`; quantization needs no bitsandbytes here.

    Args:
        name: a folder, which may hold a PEFT adapter, a .gguf file or a name on the hub.
        tokenizer: a tokenizer, or where to load it from; None: where the model is.

    Returns:
        The model on the meta device, in evaluation mode.

    Raises:
        ModelError: no configuration or tokenizer can be loaded from there, or it is quantized otherwise than to 4 bits.
    """
    name = located(name)
    with gguf.cached_headers() if str(name).endswith(".gguf") else nullcontext():
        with origin(name) as source:
            model = _unloaded(source)
        if tokenizer is None or isinstance(tokenizer, (str, Path)):
            tokenizer = load_tokenizer(tokenizer or name)
    return LanguageModel.described(model, tokenizer)


def _unloaded(source: Origin) -> Any:
    """Return the model of that origin on the meta device, with its adapter."""
    options, config = present_options(), source.config
    implementation = "eager" if options.attn_implementation == "eager" else None  # all others take the same memory
    dtype = dtype_of(None, is_gguf=source.is_gguf) or _saved_dtype(source)
    in_4_bits = options.load_in_4bit or _saved_in_4_bits(config, source)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = source.on_meta(dtype, implementation)
    if in_4_bits:
        _quantize(model)
    if source.adapter:
        model = _with_adapter(model, source.adapter)
    return model.eval()


def _saved_dtype(source: Origin) -> torch.dtype:
    """Return the dtype in which the weights were saved: from the configuration, the first shard, or float32."""
    dtype = getattr(source.config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    if isinstance(dtype, torch.dtype):
        return dtype
    files = sorted(Path(source.where).glob("*.safetensors"))
    return (saved_dtype(files[0]) if files else None) or torch.float32


def _saved_in_4_bits(config: Any, source: Origin) -> bool:
    """Return whether the weights were saved in 4 bits. Raises ModelError for another quantization."""
    settings = getattr(config, "quantization_config", None)
    if not settings or source.is_gguf:
        return False
    facts = settings if isinstance(settings, dict) else settings.to_dict()
    if facts.get("load_in_4bit"):
        return True
    raise ModelError(
        f"the model is quantized ({facts.get('quant_method')}), and its memory is known for 4 bits by bitsandbytes "
        "alone: give the model before quantization"
    )


def _with_adapter(model: Any, where: str) -> Any:
    """Return the model with the PEFT adapter that is saved there, trainable, on the meta device."""
    from peft import PeftConfig, get_peft_model

    settings = PeftConfig.from_pretrained(where)
    settings.inference_mode = False
    with torch.device("meta"):
        adapted: Any = get_peft_model(model, settings, autocast_adapter_dtype=False)
    dtype = saved_dtype(Path(where) / "adapter_model.safetensors")
    for p in adapted.parameters():
        if p.requires_grad and dtype is not None:
            p.data = p.data.to(dtype)
    return adapted


class FourBits(nn.Linear):
    """Linear layer in 4 bits on the meta device: the memory of one, which is dequantized for each pass."""

    def __init__(self, inputs: int, outputs: int, bias: nn.Parameter | None) -> None:
        super().__init__(inputs, outputs, bias=False, device="meta")
        packed = round(inputs * outputs * _BYTES_IN_4_BITS)
        self.weight = nn.Parameter(torch.empty(packed, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.bias = bias  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., outputs) the layer's output."""
        y: Tensor = _Dequantized.apply(x, self.in_features, self.out_features)
        return y if self.bias is None else y + self.bias


class _Dequantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inputs: int, outputs: int) -> Tensor:
        ctx.shape, ctx.dtype = (outputs, inputs), x.dtype
        return x @ x.new_empty(ctx.shape).T

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return d_y @ d_y.new_empty(ctx.shape), None, None


def _quantize(model: Any) -> None:
    """Replace every linear layer but the head by one in 4 bits."""
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if is_matrix(layer) and layer is not head:
                inputs, outputs = layer.weight.shape if not isinstance(layer, nn.Linear) else layer.weight.shape[::-1]
                setattr(parent, name, FourBits(inputs, outputs, layer.bias))
    for p in model.parameters():
        p.requires_grad_(False)
