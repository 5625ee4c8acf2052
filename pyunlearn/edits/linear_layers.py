"""The linear layers of a model's blocks as matrices (out, in), and batches without padding to read their inputs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from pyunlearn import models
from pyunlearn.data import TokenBatch, Tokens
from pyunlearn.edits.base import Editing
from pyunlearn.errors import ModelError
from pyunlearn.models.inspection import is_matrix

_BLOCK = re.compile(r"(.*?\.\d+)\.")


class LinearLayer(NamedTuple):
    """A trainable linear layer: y = W x (+ bias), W (out, in)."""

    name: str  # of the weight
    module: nn.Module
    block: str  # the block that it is in: "model.layers.3"
    transposed: bool  # GPT-2's Conv1D stores W as (in, out)

    @property
    def bias(self) -> str:
        """The name that its bias has, if there is one.

        >>> LinearLayer("layers.0.up.weight", nn.Linear(2, 2), "layers.0", False).bias
        'layers.0.up.bias'
        """
        return f"{self.name.removesuffix('weight')}bias"

    def matrix(self, stored: Tensor) -> Tensor:
        """Turn a tensor stored like the weight into (out, in), and back."""
        return stored.T if self.transposed else stored


def layers_of(edit: Editing) -> list[LinearLayer]:
    """Return the trainable linear layers of the numbered blocks, in the order of the model.

    Head, embeddings and everything outside the blocks are left out. Raises ModelError where none is trainable, and for
    a trainable parameter that stacks the matrices of experts: no layer reads it, so it would be left out silently.
    """
    layers = []
    for name, module in edit.model.named_modules():
        block = _BLOCK.match(f"{name}.")
        weight = f"{name}.weight"
        if is_matrix(module) and block and weight in edit.parameters:
            layers.append(LinearLayer(weight, module, block[1], type(module) is not nn.Linear))
    linear = {layer.name for layer in layers}
    if stacked := next((n for n, p in edit.parameters.items() if n not in linear and stacks_experts(n, p)), None):
        raise ModelError(
            f"{edit.name} works on linear layers, and {stacked} {tuple(edit.parameters[stacked].shape)} stacks those "
            "of several experts in one parameter: take an edit of all weights, such as fisher_step, or set "
            "requires_grad to False on the experts to edit the other layers alone"
        )
    if not layers:
        raise ModelError(
            f"{edit.name} works on linear layers of the model's blocks, and none of them is trainable: "
            "set requires_grad on some"
        )
    return layers


def stacks_experts(name: str, p: Tensor) -> bool:
    """Return True for a parameter of experts in a block that holds a matrix for each: in DBRX in two dimensions.

    >>> import torch
    >>> stacks_experts("layers.0.mlp.experts.down_proj", torch.zeros(4, 8, 6))
    True
    >>> stacks_experts("layers.0.rg_lru.input_gate_weight", torch.zeros(2, 16, 16))
    False
    """
    of_experts = any("expert" in part or "moe" in part for part in name.lower().split("."))
    whole = "experts" in name.split(".")  # the module of all of them
    return bool(_BLOCK.match(name)) and of_experts and sum(n > 1 for n in p.shape) > (1 if whole else 2)


def by_block(layers: Sequence[LinearLayer]) -> list[list[LinearLayer]]:
    """Return the layers of each block, in order."""
    blocks: dict[str, list[LinearLayer]] = defaultdict(list)
    for layer in layers:
        blocks[layer.block].append(layer)
    return list(blocks.values())


def even_batches(edit: Editing, tokens: Sequence[Tokens]) -> Iterator[tuple[list[int], TokenBatch]]:
    """Yield (indices into `tokens`, their batch), the texts of a batch all of one length.

    There is no padding then, whose activations would be counted as those of text.
    """
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, t in enumerate(tokens):
        groups[len(t.ids), len(t.decoder or ())].append(i)
    for group in groups.values():
        for inner, batch in edit.batches([tokens[i] for i in group]):
            yield [group[i] for i in inner], batch


def forward(edit: Editing, batch: TokenBatch) -> None:
    """Run the model on a batch, for the hooks that are registered on it."""
    edit.model(**models.inputs_of(batch))
