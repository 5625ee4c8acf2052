"""One layer of a model: what it gives out, computed without the layers above it, and the parameters that decide it.

Beside models.py the only file that knows how a transformers model is put together.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from pyunlearn.data import TokenBatch
from pyunlearn.errors import ArgumentError, ModelError
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.likelihood import inputs_of

_DOWN = ("down_proj", "dense_4h_to_h", "fc2", "fc_out", "c_proj", "wo", "w2")
_ATTENTION = re.compile(r"att(e?n|ention)", re.IGNORECASE)


def blocks(model: Any) -> nn.ModuleList:
    """The layers that write the text, in order: with an encoder-decoder model the decoder's. Raises ModelError where there is no list of them."""
    inner = LanguageModel.of(model, needs_tokenizer=False).inner
    stack: Any = (inner.get_decoder() if hasattr(inner, "get_decoder") else None) or inner
    lists = [m for m in stack.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ModelError(
            f"{type(inner).__name__} does not keep its layers in a list, so none can be read: take a method that needs none"
        )
    return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))  # experts are lists too, within a layer


def down_projection(name: str) -> bool:
    """Whether this parameter is, or adapts, the matrix by which an MLP (or each of its experts) writes into the residual stream."""
    parts = name.split(".")
    if parts[-1] == "bias" or any(_ATTENTION.search(part) for part in parts):
        return False
    return any(part in _DOWN for part in parts)


class Layer:
    """`Layer(model, index)(batch)` -> (n, D): what that layer gives out at batch.rows, the positions that predict the scored tokens.

    The forward pass ends there: no layer above it and no head is computed. D is the model's hidden size. Differentiable, unless under no_grad.

    Raises ArgumentError where the model has no such layer.
    """

    def __init__(self, model: Any, index: int) -> None:
        every = blocks(model)
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(every):
            raise ArgumentError(
                f"layer must be a whole number from 0 to {len(every) - 1} with this model, got {index!r}"
            )
        self.model, self.index, self.block = LanguageModel.of(model, needs_tokenizer=False).inner, index, every[index]

    def __call__(self, batch: TokenBatch) -> Tensor:
        """(n, D) hidden states, in the model's dtype, in the order of batch.rows."""
        return self.everywhere(batch).flatten(0, 1).index_select(0, batch.rows)

    def everywhere(self, batch: TokenBatch) -> Tensor:
        """(B, T, D) hidden states at all positions; of the decoder, if there is one."""
        found: list[Tensor] = []

        def stop(_module: nn.Module, _given: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)
            raise _Reached

        self._run(batch, self.block.register_forward_hook(stop))
        return found[0]

    def _run(self, batch: TokenBatch, handle: Any) -> None:
        try:
            self.model(**inputs_of(batch))
        except _Reached:
            pass
        finally:
            handle.remove()


class DownProjection(Layer):
    """The one matrix by which the MLP of a layer writes into the residual stream: `.name`, `.module`, and what it reads.

    Raises ModelError where there is no such matrix: a mixture of experts has many, and an adapter stands around it.
    """

    def __init__(self, model: Any, index: int) -> None:
        super().__init__(model, index)
        names = [n for n, _ in self.block.named_parameters() if down_projection(n)]
        inside = dict(self.block.named_modules())
        self.module: Any = inside.get(names[0].removesuffix(".weight")) if len(names) == 1 else None
        if not _plain(self.module):
            has = ", ".join(names[:3]) or "none"
            raise ModelError(
                f"layer {index} of {type(self.model).__name__} must have one plain matrix as the down projection of its MLP, and has {has}: "
                "merge an adapter first; a mixture of experts cannot be edited this way"
            )
        weight = getattr(self.module, "weight", None)
        module = LanguageModel.of(model, needs_tokenizer=False).module
        self.name = next(n for n, p in module.named_parameters() if p is weight)

    def oriented(self, matrix: Tensor) -> Tensor:
        """(D, I) as the module keeps it: GPT-2 keeps its transpose."""
        return matrix if isinstance(self.module, nn.Linear) else matrix.T

    def reads(self, batch: TokenBatch) -> Tensor:
        """(n, I) what the matrix is multiplied with at batch.rows; nothing further is computed."""
        found: list[Tensor] = []

        def stop(_module: nn.Module, given: Any) -> None:
            found.append(given[0])
            raise _Reached

        self._run(batch, self.module.register_forward_pre_hook(stop))
        return found[0].reshape(-1, found[0].shape[-1]).index_select(0, batch.rows)

    def require_plain(self, batch: TokenBatch) -> None:
        """Raises ModelError unless what the matrix writes arrives unchanged at the layer's end: Gemma 2 normalises it on the way."""
        before = self(batch).float()
        push = torch.linspace(-1, 1, before.shape[-1], device=before.device) * before.std()
        handle = self.module.register_forward_hook(lambda _module, _given, output: output + push.to(output.dtype))
        try:
            moved = self(batch).float() - before
        finally:
            handle.remove()
        if not float((moved - push).norm()) <= 0.05 * float(
            push.expand_as(moved).norm()
        ):  # bfloat16 makes less than 0.01
            raise ModelError(
                f"{type(self.model).__name__} normalises behind the MLP of a layer, so the layer's hidden states cannot be set by its down projection: "
                "take adaptive_rmu instead"
            )


def trainable(
    model: Any, layer: int, *, layers: Sequence[int] | None = None, patterns: Sequence[str] | str | None = None
) -> dict[str, nn.Parameter]:
    """name -> parameter: those that a method on the hidden states of `layer` trains, out of those that require a gradient.

    Default: the down projections of the MLPs of layers layer - 2, layer - 1 and layer; of adapters (PEFT), those on these matrices, or all in
    these layers where there are none. `layers` names others, none above `layer`; `patterns`, such as "*.5.mlp.*", choose parameters by name instead.

    Raises ArgumentError where nothing is left to train, or something that the hidden states do not depend on.
    """
    lm = LanguageModel.of(model, needs_tokenizer=False)
    every = blocks(lm)
    home = {p: i for i, block in enumerate(every) for p in block.parameters()}
    live = {n: p for n, p in lm.module.named_parameters() if p.requires_grad}
    if patterns is not None:
        wanted = [patterns] if isinstance(patterns, str) else list(patterns)
        for pattern in wanted:
            if not any(fnmatchcase(n, pattern) for n in live):
                example = next(iter(live), "none")
                raise ArgumentError(
                    f"trainable={pattern!r} matches no parameter that requires a gradient: such have names like {example}"
                )
        chosen = {n: p for n, p in live.items() if any(fnmatchcase(n, pattern) for pattern in wanted)}
    else:
        wanted_layers = range(max(0, layer - 2), layer + 1) if layers is None else layers
        if isinstance(wanted_layers, (int, str)) or any(i not in range(layer + 1) for i in wanted_layers):
            raise ArgumentError(
                f"layers must be a list of whole numbers from 0 to {layer}, those whose down projections are trained, got {layers!r}"
            )
        inside = {n: p for n, p in live.items() if home.get(p) in wanted_layers}
        chosen = {n: p for n, p in inside.items() if down_projection(n)}
        if not chosen and hasattr(lm.module, "peft_config"):
            chosen = inside
        if not chosen:
            raise ArgumentError(
                f"none of the parameters that require a gradient is a down projection of layers {', '.join(map(str, wanted_layers))}: "
                "say which to train with trainable=, by name or pattern"
            )
    head = lm.inner.get_output_embeddings()
    if head is not None and head.weight is not lm.inner.get_input_embeddings().weight:
        home |= dict.fromkeys(head.parameters(), len(every))
    if late := next((n for n, p in chosen.items() if home.get(p, -1) > layer), None):
        raise ArgumentError(
            f"{late} lies above layer {layer}, whose hidden states do not depend on it: train what lies in or below it, or choose a later layer"
        )
    return chosen


def _plain(module: Any) -> bool:
    """Whether it multiplies with a matrix that is there, neither adapted nor packed (quantized)."""
    if type(module).__name__ == "Conv1D":
        return True
    return isinstance(module, nn.Linear) and module.weight.shape == (module.out_features, module.in_features)


class _Reached(Exception):
    """Raised and caught here: the layer has been computed, and nothing else is needed."""
