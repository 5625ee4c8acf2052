"""Memory and work of a step, traced on the meta device: the passes run, and no number is computed."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from pyunlearn.data import TokenBatch, Tokens
from pyunlearn.errors import ModelError, first_line
from pyunlearn.models.attention import attend
from pyunlearn.models.inspection import require_language_model
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.recomputation import recomputed_layers
from pyunlearn.ops import _stand_in

GRADIENTS, HEAD, ACTIVATIONS = "gradients", "head", "activations"

_HEAP = 32 << 20  # DEFAULT_MMAP_THRESHOLD_MAX of glibc
_aten: Any = torch.ops.aten
_attention = nn.functional.scaled_dot_product_attention


class Footprint(NamedTuple):
    """Bytes that passes take in addition to the parameters, at their peak, and their work."""

    gradients: int
    """Of parameters."""
    head: int
    """Of the output head: the gradients that it returns, cached logits and buffers."""
    activations: int
    """The others."""
    operations: float
    """Floating-point operations of matrix products and attention."""
    small: int
    """Most bytes at a time in tensors below 32 MiB, without gradients: on a CPU the C library has them in its heap."""

    @property
    def peak(self) -> int:
        """All bytes."""
        return self.gradients + self.head + self.activations


class Runtime(NamedTuple):
    """Conditions under which passes run."""

    device: str
    """Type of the device: cpu or cuda."""
    workspace: int | None = None
    """Bytes for cached logits; None for the default."""
    recomputed: bool = False
    """True for gradient checkpointing."""
    autocast: bool = False
    """True where float32 weights compute in bfloat16."""


def training(lm: LanguageModel, batches: Sequence[Sequence[Tokens]], runtime: Runtime) -> Footprint:
    """Trace the forward and backward passes of a step: one batch after the other, and their gradients add up.

    Args:
        lm: a model of `outline`; its parameters have no gradients before and after.
        batches: the texts of each pass.
        runtime: how the passes run.

    Raises ModelError where the model's forward pass depends on the numbers that it computes.
    """
    with _traced(lm, runtime) as trace:
        for tokens in batches:
            _head(lm, tokens, runtime, trace).backward()
    return trace.footprint


def scoring(lm: LanguageModel, tokens: Sequence[Tokens], runtime: Runtime) -> Footprint:
    """Trace the forward pass of a batch that is only scored; arguments and errors as of `training`."""
    with _traced(lm, runtime) as trace, torch.no_grad():
        _head(lm, tokens, runtime, trace)
    return trace.footprint


def first_scoring(lm: LanguageModel, tokens: Tokens, runtime: Runtime) -> Footprint:
    """Trace the test of the output head on the first text of a run, whose logits it computes whole."""
    with _traced(lm, runtime) as trace, torch.no_grad():
        logits = lm.likelihood.logits(_batch(lm, [tokens], trace))
        largest = logits.float().abs().max()
        del logits, largest
    return trace.footprint


def _head(lm: LanguageModel, tokens: Sequence[Tokens], runtime: Runtime, trace: Trace) -> Tensor:
    """Return the loss of a batch, after its forward pass."""
    batch = _batch(lm, tokens, trace)
    head = lm.inner.get_output_embeddings()
    if type(head) is not nn.Linear:  # its own logits, and a gradient of them
        return lm.likelihood.logits(batch).float().log_softmax(-1).sum()
    hidden, head = lm.likelihood.hidden(batch)
    place = _stand_in.Place(runtime.device, runtime.workspace, trace.count)
    with trace.part(HEAD):
        if not torch.is_grad_enabled():
            _stand_in.log_likelihood(hidden, head.weight, place)
            return hidden
        return _stand_in.objective(hidden, head.weight, head.bias, [len(t.scored) for t in tokens], place)


def _batch(lm: LanguageModel, tokens: Sequence[Tokens], trace: Trace) -> TokenBatch:
    """Return the texts as a batch on the meta device."""
    trace.full = len({len(t.ids) for t in tokens}) == 1
    return lm.collate(list(tokens))


@contextmanager
def _traced(lm: LanguageModel, runtime: Runtime) -> Iterator[Trace]:
    """Trace what is allocated within the context; the gradients are removed at its end."""
    module = lm.module
    trained = [p for p in module.parameters() if p.requires_grad]
    hooks: list[Any] = []
    try:
        with ExitStack() as stack:
            stack.enter_context(recomputed_layers(lm.inner) if runtime.recomputed else nullcontext())
            stack.enter_context(_operators(runtime))
            trace = stack.enter_context(traced([*module.parameters(), *module.buffers()]))
            hooks += [p.register_post_accumulate_grad_hook(trace.is_gradient) for p in trained]
            yield trace
    except (RuntimeError, NotImplementedError) as error:
        name = type(require_language_model(lm.module)).__name__
        raise ModelError(
            f"the memory of {name} cannot be planned, since its forward pass does not run without its weights "
            f"({first_line(error)}): measure a short run instead (max_steps=1)"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for p in trained:
            p.grad = None


@contextmanager
def traced(tensors: Sequence[Any]) -> Iterator[Trace]:
    """Count what is allocated on the meta device within the context, besides these tensors."""
    trace = Trace()
    trace.ignore([each for each in tensors if isinstance(each, Tensor)])
    with trace:
        yield trace


class Trace(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, by part, and the operations of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: Any = WeakIdKeyDictionary()  # storage -> [its part]
        self.live: Counter[str] = Counter()
        self.total = self.most = self.small = self.small_most = 0
        self.at_peak: Counter[str] = Counter()
        self.operations = 0.0
        self.present = ACTIVATIONS
        self.full = True  # whether no text of the batch is padded

    @property
    def footprint(self) -> Footprint:
        """Return what has been counted."""
        parts = self.at_peak
        return Footprint(parts[GRADIENTS], parts[HEAD], parts[ACTIVATIONS], self.operations, self.small_most)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten._local_scalar_dense.default:  # transformers tests whether a mask hides anything
            return self.full
        out = func(*args, **(kwargs or {}))
        if work := flop_registry.get(func._overloadpacket):
            self.operations += work(*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._add(tensor.untyped_storage())
        return out

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what is allocated within the context as that part."""
        before, self.present = self.present, name
        try:
            yield
        finally:
            self.present = before

    def count(self, operations: float) -> None:
        """Add operations."""
        self.operations += operations

    def ignore(self, tensors: Sequence[Tensor]) -> None:
        """Leave tensors out that were there before."""
        for tensor in tensors:
            self.parts[tensor.untyped_storage()] = ["before"]

    def is_gradient(self, p: Tensor) -> None:
        """Count the gradient of a parameter as such."""
        if p.grad is None or (box := self.parts.get(p.grad.untyped_storage())) is None:
            return
        size = p.grad.untyped_storage().nbytes()
        self.live[box[0]] -= size
        self.live[GRADIENTS] += size
        self.small -= size if size < _HEAP and box[0] != GRADIENTS else 0
        box[0] = GRADIENTS

    def _add(self, storage: Any) -> None:
        if storage in self.parts:
            return
        size, box = storage.nbytes(), [self.present]
        self.parts[storage] = box
        weakref.finalize(storage, self._remove, size, box)
        self.live[self.present] += size
        self.total += size
        if size < _HEAP:
            self.small += size
            self.small_most = max(self.small_most, self.small)
        if self.total > self.most:
            self.most, self.at_peak = self.total, self.live.copy()

    def _remove(self, size: int, box: list[str]) -> None:
        self.live[box[0]] -= size
        self.total -= size
        self.small -= size if size < _HEAP and box[0] != GRADIENTS else 0


@contextmanager
def _operators(runtime: Runtime) -> Iterator[None]:
    """Replace PyTorch's attention by the fused kernels, which store no matrix of weights; emulate mixed precision.

    With autocast a parameter's copy in bfloat16 is made once, as torch.autocast does. A torch function mode would not
    see the layers that are recomputed in the backward pass.
    """
    copies: dict[Tensor, Tensor] = {}

    def narrow(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype is not torch.float32:
            return x
        if not (isinstance(x, nn.Parameter) and x.requires_grad):
            return x.to(torch.bfloat16)
        if x not in copies:
            copies[x] = x.to(torch.bfloat16)
        return copies[x]

    def narrowed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return function(*map(narrow, args), **{name: narrow(x) for name, x in kwargs.items()})

        return call if runtime.autocast else function

    def autocast_on_cpu(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return original_autocast("cpu" if device_type == "meta" else device_type, *args, **kwargs)

    original_autocast: Any = torch.autocast  # which older transformers call with the device of their input
    places: list[tuple[Any, str]] = [
        (nn.functional, "scaled_dot_product_attention"),
        (nn.functional, "linear"),
        (torch, "matmul"),
        (nn.functional, "grouped_mm"),
    ]
    places = [(module, name) for module, name in places if hasattr(module, name)]
    before = [getattr(module, name) for module, name in places]
    attention = partial(attend, _fused_attention, "meta") if runtime.device == "cpu" else _fused_attention
    own = {"scaled_dot_product_attention": attention, "grouped_mm": _Experts.product}
    try:
        torch.autocast = autocast_on_cpu  # type: ignore[assignment, misc]
        for (module, name), original in zip(places, before, strict=True):
            function = own.get(name, original)
            setattr(module, name, narrowed(function))
        yield
    finally:
        torch.autocast = original_autocast  # type: ignore[misc]
        for (module, name), function in zip(places, before, strict=True):
            setattr(module, name, function)


class _Experts(torch.autograd.Function):
    """Products of rows with one matrix each, of which there are several; meta tensors have them in bfloat16 alone."""

    @classmethod
    def product(cls, x: Tensor, weight: Tensor, *, offs: Tensor) -> Tensor:
        """Return (n, outputs) for rows (n, inputs) and matrices (experts, inputs, outputs)."""
        y: Tensor = cls.apply(x, weight)
        return y

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight[0]

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        d_x = d_y @ weight[0].T if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return d_x, None
        x.T @ d_y  # the work of all matrices together
        return d_x, torch.empty_like(weight)


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return the output of `scaled_dot_product_attention`, with what the fused kernels store."""
    learned = attn_mask is not None and attn_mask.requires_grad  # T5's relative positions
    if learned or query.dim() != 4 or query.shape[-1] != value.shape[-1]:
        out: Tensor = _attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        return out
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    fused = _aten._scaled_dot_product_flash_attention_for_cpu
    attended: Tensor = fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return attended
