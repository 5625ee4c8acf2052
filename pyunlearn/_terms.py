"""The two terms of one optimizer step: what it makes less likely, and what it keeps. Each leaves its gradient and drops its graph."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyunlearn._representations import Steering
from pyunlearn._run import Run, sizes
from pyunlearn.methods import OF_THE_LOOP


def forget_step(run: Run, chosen: NDArray[np.int64]) -> float:
    """Leaves the gradient of this process's share of the examples; returns the mean loss of all."""
    if run.steering is not None:
        return _steered(run, chosen, run.steering)
    method = run.method
    shown = {k: v for k, v in run.options.items() if k in ("temperature", "likeliest")}
    options = {k: v for k, v in run.options.items() if k not in OF_THE_LOOP}

    def loss(*given: Tensor) -> Tensor:
        return method.loss(*given, **options) / len(chosen)

    mine, value = run.workers.share(chosen), 0.0
    if len(mine):
        batch, reference = run.forget_batch(mine)
        objective = run.likelihood.token_objective if method.token else run.likelihood.objective
        with run.accelerator.autocast():
            total = objective(batch, loss, reference, group_size=len(method.reads), **shown).loss
        run.accelerator.backward(total)
        value = total.item()
    return run.workers.sum(value)


def retain_step(run: Run, step: int, weight: float) -> float | None:
    """Adds the retain term's gradient to what the forget term left; returns the mean negative log-likelihood a token."""
    if not weight or not run.retain:
        return None
    chosen = np.array(run.retain_places(step))
    if run.steering is not None and run.steering.keeps:
        _kept_in_place(run, chosen, weight, run.steering)
        return None
    size, tokens = len(chosen), sum(sizes(run.retain, chosen))

    def loss(sums: Tensor, counts: Tensor, held: Tensor | None = None) -> Tensor:
        return -weight / tokens * sums if held is None else weight / size * torch.relu(-sums / counts - held)

    mine, total = run.workers.share(chosen), 0.0
    if len(mine):
        held = [] if run.held is None else [torch.as_tensor(run.held[mine], dtype=torch.float32, device=run.device)]
        with run.accelerator.autocast():
            found = run.likelihood.objective(run.collate(run.retain, mine), loss, *held)
        run.accelerator.backward(found.loss)
        total = found.log_likelihood.sum().item()
    return finite(-run.workers.sum(total) / tokens)


def _steered(run: Run, chosen: NDArray[np.int64], steering: Steering) -> float:
    """As `forget_step`, for methods on hidden states."""
    mine, value = run.workers.share(chosen), 0.0
    if len(mine):
        with run.accelerator.autocast():
            total = steering.forget_term(mine) / len(chosen)
        run.accelerator.backward(total)
        value = total.item()
    return run.workers.sum(value)


def _kept_in_place(run: Run, chosen: NDArray[np.int64], weight: float, steering: Steering) -> None:
    """As `retain_step`, where the hidden states are what is to be kept."""
    mine = run.workers.share(chosen)
    if len(mine):
        with run.accelerator.autocast():
            total = weight * steering.alpha * steering.retain_term(mine) / len(chosen)
        run.accelerator.backward(total)


def finite(x: float) -> float | None:
    """The number, or None where it is none: JSON has neither NaN nor Inf."""
    return float(x) if math.isfinite(x) else None
