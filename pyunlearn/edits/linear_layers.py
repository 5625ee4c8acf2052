"""The linear layers of a model's blocks, seen as matrices (out, in), and batches without padding to take their inputs from."""

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
from pyunlearn.models.scoring import batches_on


class LinearLayer(NamedTuple):
    """A linear layer that trains: y = W x (+ bias), W (out, in)."""

    name: str  # of the weight
    module: nn.Module
    block: str  # the block that it is in: "model.layers.3"
    transposed: bool  # GPT-2's Conv1D keeps W as (in, out)

    @property
    def bias(self) -> str:
        """The name that its bias has, if there is one."""
        return f"{self.name.removesuffix('weight')}bias"

    def matrix(self, stored: Tensor) -> Tensor:
        """What is stored like the weight, as (out, in); and back."""
        return stored.T if self.transposed else stored


def layers_of(edit: Editing) -> list[LinearLayer]:
    """In the order of the model. Head, embeddings and what lies outside the numbered blocks are no part of it.

    Raises ModelError where none trains.
    """
    found = []
    for name, module in edit.model.named_modules():
        block = re.match(r"(.*?\.\d+)\.", f"{name}.")
        weight = f"{name}.weight"
        if is_matrix(module) and block and weight in edit.parameters:
            found.append(LinearLayer(weight, module, block[1], type(module) is not nn.Linear))
    if not found:
        raise ModelError(
            f"{edit.name} works on linear layers of the model's blocks, and none that trains was found: set requires_grad on some"
        )
    return found


def by_block(layers: Sequence[LinearLayer]) -> list[list[LinearLayer]]:
    """The layers of each block, in order."""
    found: dict[str, list[LinearLayer]] = defaultdict(list)
    for layer in layers:
        found[layer.block].append(layer)
    return list(found.values())


def even_batches(edit: Editing, tokens: Sequence[Tokens]) -> Iterator[tuple[list[int], TokenBatch]]:
    """(places in `tokens`, their batch) of texts of one length each: no padding, whose activations would count as text's."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, t in enumerate(tokens):
        groups[len(t.ids), len(t.decoder or ())].append(i)
    for places in groups.values():
        for inner, batch in batches_on(edit.model, [tokens[i] for i in places], edit.batch_size):
            yield [places[i] for i in inner], batch


def forward(edit: Editing, batch: TokenBatch) -> None:
    """The model runs on a batch, for what hooks see of it."""
    edit.model(**models.inputs_of(batch))
