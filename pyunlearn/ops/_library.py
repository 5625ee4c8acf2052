"""The torch.library that holds our ops, so that torch.compile, opcheck, CUDA graphs and FSDP see ordinary ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

LIBRARY = torch.library.Library("pyunlearn", "DEF")


def on_its_device(op: Callable[..., Any]) -> Callable[..., Any]:
    """The op with its first tensor's GPU as the current one, as a kernel launch needs it; nothing on the CPU."""

    @wraps(op)
    def run(x: torch.Tensor, *args: Any) -> Any:
        with torch.cuda.device_of(x):
            return op(x, *args)

    return run


def host_may_wait(x: torch.Tensor) -> bool:
    """Whether Python may look at numbers: not while torch.compile traces, nor while a CUDA graph is captured."""
    return not torch.compiler.is_compiling() and not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def bias_beside(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """The bias as the kernels take it with rows of x: without gaps, and float64 only where x is."""
    if bias is None:
        return None
    return (bias.float() if bias.dtype is torch.float64 and x.dtype is not torch.float64 else bias).contiguous()


def NO_GRADIENT_OF_GRADIENT(ctx: Any, *gradients: Any) -> Any:
    """What the backward ops answer when they are differentiated themselves."""
    raise NotImplementedError(
        "pyunlearn's log-likelihoods can be differentiated once, not twice: use pyunlearn.ops.reference for second derivatives"
    )
