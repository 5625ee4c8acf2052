"""The torch.library of the ops, so that torch.compile, opcheck, CUDA graphs and FSDP see ordinary ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # of a gradient with is_grads_batched=True
LIBRARY = torch.library.Library("pyunlearn", "DEF")


def on_its_device(op: Callable[..., Any]) -> Callable[..., Any]:
    """Run the op with its first tensor's CUDA device current, as kernel launches require; no effect on the CPU."""

    @wraps(op)
    def run(x: torch.Tensor, *args: Any) -> Any:
        if not x.is_cuda:
            return op(x, *args)
        with torch.cuda.device_of(x):
            return op(x, *args)

    return run


def define(schema: str, op: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register an op of that schema, `name(arguments) -> results`; `fake` returns empty results of the right shapes.

    Returns the function that calls it where nothing is to be differentiated: directly, where nobody has to see an op.
    """
    name = LIBRARY.define(schema)
    run = on_its_device(op)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyunlearn::{name}", fake, lib=LIBRARY)
    registered = getattr(torch.ops.pyunlearn, name)
    return lambda *inputs: (registered if torch.is_grad_enabled() or is_watched(inputs) else run)(*inputs)


def define_gradient(
    name: str, op: Callable[..., Any], autograd: Callable[..., Any], setup_context: Callable[..., None]
) -> Callable[..., Any]:
    """Register the autograd formula of an op, and that its backward op, NAME_backward, has none.

    Returns the function that calls the op, differentiably, and returns its first result. Where nobody has to see an op,
    it goes past the dispatcher, whose formulas in Python take longer than a small call.
    """
    torch.library.register_autograd(f"pyunlearn::{name}", autograd, setup_context=setup_context, lib=LIBRARY)
    torch.library.register_autograd(f"pyunlearn::{name}_backward", no_second_derivative, lib=LIBRARY)
    registered, run = getattr(torch.ops.pyunlearn, name), on_its_device(op)

    def forward(ctx: Any, *inputs: Any) -> Any:
        outputs = run(*inputs)
        setup_context(ctx, inputs, outputs)
        return outputs[0]

    methods = {"forward": staticmethod(forward), "backward": staticmethod(autograd)}
    direct = type(name, (torch.autograd.Function,), methods)

    def call(*inputs: Any) -> Any:
        if is_watched(inputs):
            return registered(*inputs)[0]
        return direct.apply(*inputs) if torch.is_grad_enabled() else run(*inputs)[0]  # type: ignore[attr-defined]

    return call


def is_watched(inputs: tuple[Any, ...]) -> bool:
    """Return whether someone has to see an op: a compiler, a tracer, a mode, a transform, or a subclass of Tensor."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.maybe_current_level() is not None:
        return True
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    return any(type(x) not in _PLAIN or x.is_neg() or _is_batched(x) for x in tensors)


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
