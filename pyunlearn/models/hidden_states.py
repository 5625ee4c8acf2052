"""Hidden states of one layer, computed without the layers above it, and the parameters that they depend on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from pyunlearn.data import TokenBatch
from pyunlearn.errors import ArgumentError, ModelError, brief
from pyunlearn.models.attention import attention_of
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.likelihood import inputs_of, scored_rows
from pyunlearn.models.sharding import is_sharded

_DOWN = ("down_proj", "dense_4h_to_h", "fc2", "fc_out", "c_proj", "wo", "w2")
_ATTENTION = re.compile(r"att(e?n|ention)", re.IGNORECASE)


def blocks(model: Any) -> nn.ModuleList:
    """Return the model's transformer layers in order; for an encoder-decoder model, the decoder's layers.

    Raises ModelError where the model has no list of layers.
    """
    inner = LanguageModel.of(model, needs_tokenizer=False).inner
    stack: Any = (inner.get_decoder() if hasattr(inner, "get_decoder") else None) or inner
    lists = [m for m in stack.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ModelError(
            f"{type(inner).__name__} has no list of layers, so none can be selected: choose a method that needs none"
        )
    # the largest list: experts are lists too, inside a layer
    return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))


def down_projection(name: str) -> bool:
    """Return True for the name of a parameter of an MLP's down projection, of its experts', or of an adapter on these.

    The down projection is the matrix by which an MLP writes into the residual stream.

    >>> down_projection("model.layers.3.mlp.down_proj.weight"), down_projection("model.layers.3.mlp.up_proj.weight")
    (True, False)
    """
    parts = name.split(".")
    if parts[-1] == "bias" or any(_ATTENTION.search(part) for part in parts):
        return False
    return any(part in _DOWN for part in parts)


class Layer:
    """One layer of a model: `Layer(model, index)(batch)` -> (n, D) its output at batch.rows.

    These are the positions that predict the scored tokens; D is the hidden size. The forward pass ends at the layer:
    layers above it and the head are not computed. Differentiable, except under torch.no_grad.

    Args:
        model: a transformers language model, or a LanguageModel.
        index: of the layer, from 0.

    Raises:
        ArgumentError: the model has no layer with that index.
    """

    def __init__(self, model: Any, index: int) -> None:
        self.lm = LanguageModel.of(model, needs_tokenizer=False)
        layers = blocks(self.lm)
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(layers):
            raise ArgumentError(
                f"layer must be a whole number from 0 to {len(layers) - 1} with this model, got {brief(index)}"
            )
        self.index, self.block = index, layers[index]

    def __call__(self, batch: TokenBatch) -> Tensor:
        """Return (n, D) hidden states, in the model's dtype, in the order of batch.rows."""
        return scored_rows(self.all_positions(batch), batch)

    def all_positions(self, batch: TokenBatch) -> Tensor:
        """Return (B, T, D) hidden states at all positions; of an encoder-decoder model, those of the decoder."""
        outputs: list[Tensor] = []

        def stop(_module: nn.Module, _args: Any, output: Any) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)
            if not is_sharded(self.lm.inner):  # a forward pass that is not ended holds gathered weights
                raise _Stopped

        self._run(batch, self.block.register_forward_hook(stop))
        return outputs[0]

    def _run(self, batch: TokenBatch, handle: Any) -> None:
        """Run the model up to the hook, and remove the hook."""
        try:
            with attention_of(self.lm.inner):
                self.lm.inner(**inputs_of(batch))
        except _Stopped:
            pass
        finally:
            handle.remove()


class DownProjection(Layer):
    """Down projection of one layer's MLP: the matrix by which it writes into the residual stream.

    `name` is the name of the parameter, `module` the linear layer. Arguments as of `Layer`.

    Raises:
        ModelError: the layer has not exactly one plain down projection: a mixture of experts has several, and an
            adapter wraps it.
    """

    def __init__(self, model: Any, index: int) -> None:
        super().__init__(model, index)
        names = [n for n, _ in self.block.named_parameters() if down_projection(n)]
        inside = dict(self.block.named_modules())
        self.module: Any = inside.get(names[0].removesuffix(".weight")) if len(names) == 1 else None
        if not _plain(self.module):
            has = ", ".join(names[:3]) or "none"
            raise ModelError(
                f"layer {index} of {self.lm.name} must have one plain matrix as the down projection of its MLP, and "
                f"has {has}: merge an adapter first; a mixture of experts cannot be edited this way"
            )
        weight = getattr(self.module, "weight", None)
        self.name = next(n for n, p in self.lm.module.named_parameters() if p is weight)

    def oriented(self, matrix: Tensor) -> Tensor:
        """Return a matrix (D, I) in the module's own orientation: GPT-2 stores the transpose."""
        return matrix if isinstance(self.module, nn.Linear) else matrix.T

    def inputs(self, batch: TokenBatch) -> Tensor:
        """Return (n, I) the inputs of the matrix at batch.rows; nothing further is computed."""
        values: list[Tensor] = []

        def stop(_module: nn.Module, args: Any) -> None:
            values.append(args[0])
            raise _Stopped

        self._run(batch, self.module.register_forward_pre_hook(stop))
        inputs = values[0]
        return scored_rows(inputs.reshape(1, -1, inputs.shape[-1]), batch)

    def require_plain(self, batch: TokenBatch) -> None:
        """Raise ModelError unless the layer adds this matrix's output as it is; Gemma 2 normalizes it."""
        before = self(batch).float()
        push = torch.linspace(-1, 1, before.shape[-1], device=before.device) * before.std()
        handle = self.module.register_forward_hook(lambda _module, _args, output: output + push.to(output))
        try:
            moved = self(batch).float() - before
        finally:
            handle.remove()
        # bfloat16 rounding makes less than 0.01
        if not float((moved - push).norm()) <= 0.05 * float(push.expand_as(moved).norm()):
            raise ModelError(
                f"{self.lm.name} normalizes the output of a layer's MLP, so its down projection cannot set the layer's "
                "hidden states: choose adaptive_rmu instead"
            )


def trainable(
    model: Any, layer: int, *, layers: Sequence[int] | None = None, patterns: Sequence[str] | str | None = None
) -> dict[str, nn.Parameter]:
    """Return name -> parameter that a method on the hidden states of one layer trains, of those with a gradient.

    Args:
        model: a transformers language model, or a LanguageModel.
        layer: index of the layer with the hidden states.
        layers: layers whose MLPs' down projections are trained, none above `layer`; default: layer - 2 to layer. With
            adapters (PEFT) those on these matrices, or all in these layers where there are none.
        patterns: names of parameters instead, such as "*.5.mlp.*".

    Raises:
        ArgumentError: nothing is left to train, or something that the hidden states do not depend on.
    """
    lm = LanguageModel.of(model, needs_tokenizer=False)
    all_layers = blocks(lm)
    layer_of = {p: i for i, block in enumerate(all_layers) for p in block.parameters()}
    live = {n: p for n, p in lm.module.named_parameters() if p.requires_grad}
    if patterns is not None:
        chosen = _matching(live, [patterns] if isinstance(patterns, str) else list(patterns))
    else:
        wanted = range(max(0, layer - 2), layer + 1) if layers is None else layers
        if isinstance(wanted, (int, str)) or any(i not in range(layer + 1) for i in wanted):
            raise ArgumentError(
                f"layers must be a list of whole numbers from 0 to {layer}, those whose down projections are trained, "
                f"got {brief(layers)}"
            )
        inside = {n: p for n, p in live.items() if layer_of.get(p) in wanted}
        chosen = {n: p for n, p in inside.items() if down_projection(n)}
        if not chosen and hasattr(lm.module, "peft_config"):
            chosen = inside
        if not chosen:
            raise ArgumentError(
                "none of the parameters that require a gradient is a down projection of layers "
                f"{', '.join(map(str, wanted))}: say which to train with trainable=, by name or pattern"
            )
    head = lm.inner.get_output_embeddings()
    if head is not None and head.weight is not lm.inner.get_input_embeddings().weight:
        layer_of |= dict.fromkeys(head.parameters(), len(all_layers))
    if above := next((n for n, p in chosen.items() if layer_of.get(p, -1) > layer), None):
        raise ArgumentError(
            f"{above} lies above layer {layer}, whose hidden states do not depend on it: train what lies in or below "
            "it, or choose a later layer"
        )
    return chosen


def _matching(parameters: dict[str, nn.Parameter], patterns: list[str]) -> dict[str, nn.Parameter]:
    """Return the parameters whose name matches any pattern. Raises ArgumentError for a pattern without a match."""
    for pattern in patterns:
        if not any(fnmatchcase(n, pattern) for n in parameters):
            example = next(iter(parameters), "none")
            raise ArgumentError(
                f"trainable={pattern!r} matches no parameter that requires a gradient: names look like {example}"
            )
    return {n: p for n, p in parameters.items() if any(fnmatchcase(n, pattern) for pattern in patterns)}


def _plain(module: Any) -> bool:
    """Return True for a module that multiplies with a matrix that is neither adapted nor packed (quantized)."""
    if type(module).__name__ == "Conv1D":
        return True
    return isinstance(module, nn.Linear) and module.weight.shape == (module.out_features, module.in_features)


class _Stopped(Exception):
    """Signal that ends the forward pass once the hidden states are computed."""
