"""What every probe does with a model: settle it for measuring, and take it through tokens batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from pyunlearn import models
from pyunlearn.data import TokenBatch, Tokens, batches
from pyunlearn.errors import ArgumentError


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """While it lasts the model runs without dropout; afterwards it is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def batches_on(model: Any, tokens: Sequence[Tokens], batch_size: int) -> Iterator[tuple[list[int], TokenBatch]]:
    """(places in `tokens`, their batch on the model's device). Padding is neither attended to nor scored, so any id will do."""
    if not tokens:
        raise ArgumentError("tokens must hold at least one example, and are empty.")
    models.require_language_model(model)
    start = models.decoder_start_id(model) if models.is_encoder_decoder(model) else None
    device = next(model.parameters()).device
    for places, batch in batches(tokens, batch_size, pad_id=0, decoder_start_id=start):
        yield places, batch.to(device)


def by_example(values: Tensor, tokens: Sequence[Tokens], places: Sequence[int]) -> list[Tensor]:
    """Values of a batch's scored tokens (n, ...), parted into one tensor for each example."""
    return list(values.split([len(tokens[i].scored) for i in places]))
