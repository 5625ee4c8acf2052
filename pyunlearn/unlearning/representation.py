"""The loop's part of the methods that work on the hidden states of one layer: what they train, what they compare with, their two terms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyunlearn.data import Tokens, batches
from pyunlearn.errors import ArgumentError
from pyunlearn.methods.rmu import representation_drift, steering_direction
from pyunlearn.models.hidden_states import Layer, blocks, trainable

if TYPE_CHECKING:
    from pyunlearn.unlearning.setup import Run

_USUAL = 7  # the layer that RMU's authors chose of 32


class Steering:
    """The layer, the parameters that are trained, the random direction, and what the layer gave out before the first step.

    keep: the retain examples that the run may come to, whose hidden states are kept in main memory.
    keeps: whether the retain term is that they stay as they are.

    Raises ArgumentError for an option that cannot be, before anything is changed.
    """

    def __init__(self, run: Run, keep: Iterable[int], *, keeps: bool) -> None:
        o: dict[str, Any] = run.method.options | run.options
        index = min(_USUAL, (len(blocks(run.inner)) - 1) // 2) if o["layer"] is None else o["layer"]
        self.run, self.layer = run, Layer(run.model, index)
        self.parameters = trainable(run.model, index, layers=o["layers"], patterns=o["trainable"])
        if "alpha" in run.options and not keeps:
            raise ArgumentError(
                'alpha is the weight of the retain term "representation", which this run does not have: leave alpha out, or pass retain= without another retain_loss'
            )
        self.alpha, self.keeps = float(o["alpha"]), keeps
        self.options = {k: v for k, v in run.options.items() if k in ("beta", "coefficient")}
        norms, size = {}, 0
        for i, h in self._read(run.forget, range(len(run.forget))):
            norms[i], size = h.float().norm(dim=-1).mean(), h.shape[-1]
        self.norms = torch.stack([norms[i] for i in range(len(norms))]).to(run.device)
        self.direction = steering_direction(size, run.seed).to(run.device)
        self.retained = dict(self._read(run.retain or [], list(keep)))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While it lasts nothing else requires a gradient, so none is computed for the rest."""
        chosen = set(self.parameters.values())
        others = [p for p in self.run.model.parameters() if p.requires_grad and p not in chosen]
        for p in others:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in others:
                p.requires_grad_(True)

    def forget_term(self, mine: Sequence[int]) -> Tensor:
        """() the sum of those forget examples' losses."""
        run = self.run
        batch = run.collate(run.forget, mine)
        hidden, norms = self.layer(batch).float(), self.norms[torch.as_tensor(mine, device=run.device)]
        return run.method.loss(hidden, batch.example, batch.counts, self.direction, norms, **self.options).sum()

    def retain_term(self, mine: Sequence[int]) -> Tensor:
        """() the sum over those retain examples of how far their hidden states have drifted, without alpha."""
        run = self.run
        batch = run.collate(run.retain or [], mine)
        before = torch.cat([self.retained[int(i)] for i in mine]).to(run.device, torch.float32)
        drift = representation_drift(self.layer(batch).float(), before, batch.example, batch.counts, reduction="none")
        return drift.sum()

    @torch.no_grad()
    def _read(self, tokens: Sequence[Tokens], places: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """(place, (T, D) what the layer gives out at that text's scored rows, in main memory), in every process: which it will want is not known yet."""
        run, chosen = self.run, [tokens[i] for i in places]
        for at, batch in (
            batches(chosen, 2 * run.batch_size, pad_id=run.pad, decoder_start_id=run.start) if chosen else ()
        ):
            with run.accelerator.autocast():
                hidden = self.layer(batch.to(run.device)).cpu()
            yield from zip((places[i] for i in at), hidden.split(batch.counts.tolist()), strict=True)
