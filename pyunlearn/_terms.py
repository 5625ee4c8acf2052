"""The two terms of one optimizer step: what it makes less likely, and what it keeps. Each leaves its gradient and drops its graph."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyunlearn._run import Run, sizes
from pyunlearn.methods import OF_THE_LOOP


def forget_step(run: Run, chosen: NDArray[np.int64]) -> float:
    """Leaves the gradient of this process's share of the examples; returns the mean loss of all."""
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
    n, size = len(run.retain), min(run.batch_size, len(run.retain))
    order = np.random.default_rng((run.seed, 1, step * size // n)).permutation(n)
    chosen = np.array([order[(step * size + i) % n] for i in range(size)])
    tokens = sum(sizes(run.retain, chosen))

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


def finite(x: float) -> float | None:
    """The number, or None where it is none: JSON has neither NaN nor Inf."""
    return float(x) if math.isfinite(x) else None
