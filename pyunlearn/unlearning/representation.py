"""RMU and other methods on the hidden states of one layer: trained parameters, targets and the two losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pyunlearn.data import Tokens
from pyunlearn.errors import ArgumentError
from pyunlearn.methods import Method
from pyunlearn.methods.rmu import representation_drift, steering_direction
from pyunlearn.models.hidden_states import Layer, blocks, trainable
from pyunlearn.models.scoring import Scorer
from pyunlearn.models.sharding import drop_gathered

_USUAL_LAYER = 7  # the layer that RMU's authors chose of 32


class RepresentationTarget:
    """One layer of the model: its trained parameters, the random direction, and its output before the first step.

    Args:
        scorer: scorer of the model; it makes the batches.
        method: a method on hidden states, such as rmu.
        options: the method's options that the user set.
        forget: the forget texts, whose mean hidden-state norms are measured.
        retain: the retain texts.
        retain_indices: the retain texts that the run may use; their hidden states are cached in main memory.
        keeps_retain: True where retain_loss is "representation".
        batch_size: texts in one forward pass.
        seed: seed of the direction.

    Raises ArgumentError for an option out of range, before anything is changed.
    """

    def __init__(
        self,
        scorer: Scorer,
        method: Method,
        options: Mapping[str, Any],
        forget: Sequence[Tokens],
        retain: Sequence[Tokens],
        *,
        retain_indices: Sequence[int],
        keeps_retain: bool,
        batch_size: int,
        seed: int,
    ) -> None:
        settings = method.options | dict(options)
        lm, index = scorer.lm, settings["layer"]
        if index is None:
            index = min(_USUAL_LAYER, (len(blocks(lm)) - 1) // 2)
        self.scorer, self.lm, self.method, self.batch_size = scorer, lm, method, batch_size
        self.layer = Layer(lm, index)
        drop_gathered(lm.module)  # the parameters below are those that are trained
        self.parameters = trainable(lm, index, layers=settings["layers"], patterns=settings["trainable"])
        if "alpha" in options and not keeps_retain:
            raise ArgumentError(
                'alpha is the weight of the retain term "representation", which this run does not have: leave alpha '
                "out, or pass retain= without another retain_loss"
            )
        self.alpha, self.options = float(settings["alpha"]), dict(options)
        self.forget, self.retain = forget, retain
        norms, size = {}, 0
        for i, hidden in self._read(forget, range(len(forget))):
            norms[i], size = hidden.float().norm(dim=-1).mean(), hidden.shape[-1]
        self.norms = torch.stack([norms[i] for i in range(len(norms))]).to(lm.device)  # (B,)
        self.direction = steering_direction(size, seed).to(lm.device)  # (D,)
        self.retained = dict(self._read(retain, retain_indices))

    @contextmanager
    def freeze_rest(self) -> Iterator[None]:
        """Freeze all other parameters within the context, so that no gradient is computed for them."""
        drop_gathered(self.lm.module)
        chosen = set(self.parameters.values())
        others = [p for p in self.lm.module.parameters() if p.requires_grad and p not in chosen]
        for p in others:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in others:
                p.requires_grad_(True)

    def forget_loss(self, indices: Sequence[int]) -> Tensor:
        """Return () the sum of those forget examples' losses."""
        batch = self.lm.collate(self.forget, indices)
        tensors = {
            "hidden": self.layer(batch).float(),  # (n, D)
            "norms": self.norms[torch.as_tensor(indices, device=self.lm.device)],  # (b,)
            "direction": self.direction,
            "example": batch.example,
            "counts": batch.counts,
        }
        return self.method.loss(tensors, self.options).sum()

    def retain_drift(self, indices: Sequence[int]) -> Tensor:
        """Return (b,) mean squared distances of those retain examples' hidden states from their original values."""
        batch = self.lm.collate(self.retain, indices)
        initial = torch.cat([self.retained[int(i)] for i in indices]).to(self.lm.device, torch.float32)
        hidden = self.layer(batch).float()
        return representation_drift(hidden, initial, batch.example, batch.counts, reduction="none")

    @torch.no_grad()
    def _read(self, tokens: Sequence[Tokens], indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield (index, (T, D) the layer's output at that text's scored rows, on the CPU), in every process."""
        chosen = [tokens[i] for i in indices]
        for within, batch in self.lm.batches(chosen, self.batch_size) if chosen else ():
            with self.scorer.autocast():
                hidden = self.layer(batch).cpu()
            yield from zip((indices[i] for i in within), hidden.split(batch.counts.tolist()), strict=True)
