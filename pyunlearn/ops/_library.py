"""The torch.library of the ops, so that torch.compile, opcheck, CUDA graphs and FSDP see ordinary ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

LIBRARY = torch.library.Library("pyunlearn", "DEF")


def on_its_device(op: Callable[..., Any]) -> Callable[..., Any]:
    """Run the op with its first tensor's CUDA device current, as kernel launches require; no effect on the CPU."""

    @wraps(op)
    def run(x: torch.Tensor, *args: Any) -> Any:
        with torch.cuda.device_of(x):
            return op(x, *args)

    return run


def define(schema: str, op: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an op of that schema, `name(arguments) -> results`; `fake` returns empty results of the right shapes."""
    name = LIBRARY.define(schema)
    LIBRARY.impl(name, on_its_device(op), "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyunlearn::{name}", fake, lib=LIBRARY)


def define_gradient(name: str, autograd: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Register the autograd formula of an op, and that its backward op, NAME_backward, has none."""
    torch.library.register_autograd(f"pyunlearn::{name}", autograd, setup_context=setup_context, lib=LIBRARY)
    torch.library.register_autograd(f"pyunlearn::{name}_backward", no_second_derivative, lib=LIBRARY)


def host_may_wait(x: torch.Tensor) -> bool:
    """Return whether Python may read tensor values: not while torch.compile traces or a CUDA graph is captured."""
    return not torch.compiler.is_compiling() and not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def kernel_bias(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """Return the bias in the layout that the kernels expect for rows of x: contiguous, and float64 only where x is."""
    if bias is None:
        return None
    return (bias.float() if bias.dtype is torch.float64 and x.dtype is not torch.float64 else bias).contiguous()


def no_second_derivative(ctx: Any, *gradients: Any) -> Any:
    """Raise NotImplementedError on double backward; registered as the autograd formula of the backward ops."""
    raise NotImplementedError(
        "pyunlearn's log-likelihoods can be differentiated once, not twice: "
        "use pyunlearn.ops.reference for second derivatives"
    )
