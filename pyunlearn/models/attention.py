"""Attention of short texts on a CPU in float32, where a model computes in 16 bits.

PyTorch's backward pass of attention takes two to three times as long in bfloat16 and float16 as in float32 there, up to
128 positions. Longer texts, and passes without gradients, are as fast or faster in 16 bits (docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pyunlearn.models.inspection import is_recomputing, unwrapped

LONGEST = 128
"""Positions of the longest texts whose attention is faster in float32."""
_NARROW = (torch.bfloat16, torch.float16)


def attention_of(model: Any) -> AbstractContextManager[Any]:
    """Return the context of a model's forward pass, in which attention is computed in the dtype that is faster.

    A model that torch.compile has compiled computes its attention as it is, and so does one whose layers transformers
    recomputes in training: the context has ended by then.

    Args:
        model: a transformers model, wrapped or not.
    """
    inner = unwrapped(model)
    weight = next(inner.parameters())
    narrow = weight.dtype in _NARROW or torch.is_autocast_enabled("cpu")
    if weight.device.type != "cpu" or not narrow or not torch.is_grad_enabled():
        return nullcontext()
    compiled = hasattr(model, "_orig_mod") or getattr(inner, "_compiled_call_impl", None) is not None
    if compiled or (inner.training and is_recomputing(inner)):
        return nullcontext()
    return ShortAttention()


class ShortAttention(TorchFunctionMode):
    """Within the context, attention of short texts on a CPU is computed in float32 where it would be in 16 bits.

    It is that of `torch.nn.functional.scaled_dot_product_attention`, with a gradient to come, of at most `LONGEST`
    positions. The result has the dtype that it would have had.

    >>> import torch
    >>> query = torch.randn(1, 2, 5, 8, dtype=torch.bfloat16, requires_grad=True)
    >>> with ShortAttention():
    ...     attended = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    >>> attended.dtype
    torch.bfloat16
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch as it is, and attention by `attend`."""
        if func is F.scaled_dot_product_attention and len(args) >= 3:
            return attend(func, "cpu", *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def attend(
    attention: Callable[..., Tensor],
    device: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *others: Any,
    **named: Any,
) -> Tensor:
    """Return what `scaled_dot_product_attention` returns, computed in float32 where that is faster.

    Args:
        attention: computes it.
        device: type of the device on which short texts are computed in float32.
        query, key, value, others, named: its arguments; heads are (B, H, T, D).
    """
    dtype = _narrow_dtype(device, query, key, value)
    if dtype is None:
        return attention(query, key, value, *others, **named)
    inputs = [_float32(x) for x in (query, key, value, *others)]
    with torch.autocast("cpu", enabled=False):
        return attention(*inputs, **{name: _float32(x) for name, x in named.items()}).to(dtype)


def _narrow_dtype(device: str, query: Tensor, key: Tensor, value: Tensor) -> torch.dtype | None:
    """Return the 16-bit dtype of an attention that is faster in float32, or None for any other."""
    if query.device.type != device or max(query.shape[-2], key.shape[-2]) > LONGEST:
        return None
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))):
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    return dtype if dtype in _NARROW else None


def _float32(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x
