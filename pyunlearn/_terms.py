"""The two terms of one optimizer step: what it makes less likely, and what it keeps. Each leaves its gradient and drops its graph."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyunlearn._run import Run, sizes
from pyunlearn.methods import OF_THE_LOOP


def forget_step(run: Run, chosen: NDArray[np.int64]) -> float:
    """Leaves the gradient of this process's share of the examples; returns the mean loss of all."""
    value = 0.0
    for mine in run.pieces(run.workers.share(chosen)):
        with run.accelerator.autocast():
            total = _FORGET[run.method.kind](run, mine) / len(chosen)
        run.accelerator.backward(total)
        value += total.item()
    return run.workers.sum(value)


def _of_log_likelihoods(run: Run, mine: list[int]) -> Tensor:
    """() the sum of the examples' losses, for methods that see them by their summed or their single log-likelihoods."""
    method = run.method
    shown = {k: v for k, v in run.options.items() if k in ("temperature", "top_fraction")}

    def loss(*given: Tensor) -> Tensor:
        return method.loss(*given, **_own_options(run))

    batch, reference = run.forget_batch(mine)
    weights, together = run.forget_weights(mine), len(method.reads)
    if method.token:
        each = (reference,) if weights is None else (reference, weights)
        return run.likelihood.token_objective(batch, loss, *each, group_size=together, **shown).loss
    return run.likelihood.objective(batch, loss, reference, group_size=together, weights=weights, **shown).loss


def _of_the_vocabulary(run: Run, mine: list[int]) -> Tensor:
    """() the sum of the examples' losses, for methods that see whole distributions."""
    batch = run.collate(run.forget, mine)
    reference = run.kept["forget"].at(mine, run.device) if "forget" in run.kept else None
    model = run.likelihood.distributions(batch)
    return run.method.loss(model, reference, batch.targets, batch.example, batch.counts, **_own_options(run)).sum()


def _of_hidden_states(run: Run, mine: list[int]) -> Tensor:
    """() the sum of the examples' losses, for methods on the hidden states of one layer."""
    assert run.steering is not None
    return run.steering.forget_term(mine)


_FORGET = {
    "example": _of_log_likelihoods, "token": _of_log_likelihoods, "vocabulary": _of_the_vocabulary, "hidden": _of_hidden_states,
}  # fmt: skip


def _own_options(run: Run) -> dict[str, Any]:
    return {k: v for k, v in run.options.items() if k not in OF_THE_LOOP}


def retain_step(run: Run, step: int, weight: float) -> dict[str, float | None]:
    """Adds the retain term's gradient to what the forget term left; returns what the history says of it.

    That is `retain_nll`, the mean negative log-likelihood a token, or None where the term does not say; `retain_kl`, the mean divergence a token, or
    `retain_drift`, the mean squared distance of the hidden states from where they were, where that is the term; and the `multiplier` that the term had.
    """
    multiplier = run.multiplier
    if not run.retain or not (weight or multiplier):
        return {"retain_nll": None}
    weight = weight if multiplier is None else weight * multiplier.value
    chosen = run.retain_places(step)
    tokens = sum(sizes(run.retain, chosen))
    total = 0.0
    for mine in run.pieces(run.workers.share(chosen)):
        with run.accelerator.autocast():
            loss, part = _RETAIN[run.retain_loss or "nll"](run, mine, weight, tokens, len(chosen))
        run.accelerator.backward(loss)
        total += part
    if run.retain_loss == "representation":
        return {"retain_nll": None, "retain_drift": finite(run.workers.sum(total) / len(chosen))}
    mean = run.workers.sum(total) / tokens
    said: dict[str, float | None] = {"retain_nll": finite(mean)}
    if run.retain_loss == "kl":
        said = {"retain_nll": None, "retain_kl": finite(mean)}
    if multiplier is not None:
        said["multiplier"] = multiplier.value
        multiplier.update(mean)
    return said


# each: (the weighted loss, the sum over tokens of what is reported) of the retain examples `mine`, of `size` that have so many tokens together


def _likelihood_kept(run: Run, mine: list[int], weight: float, tokens: int, size: int) -> tuple[Tensor, float]:
    assert run.retain is not None

    def loss(sums: Tensor, counts: Tensor, held: Tensor | None = None) -> Tensor:
        return -weight / tokens * sums if held is None else weight / size * torch.relu(-sums / counts - held)

    held = [] if run.held is None else [torch.as_tensor(run.held[mine], dtype=torch.float32, device=run.device)]
    found = run.likelihood.objective(run.collate(run.retain, mine), loss, *held)
    return found.loss, -found.log_likelihood.sum().item()


def _distributions_kept(run: Run, mine: list[int], weight: float, tokens: int, size: int) -> tuple[Tensor, float]:
    assert run.retain is not None
    batch = run.collate(run.retain, mine)
    before = run.kept["retain"].at(mine, run.device)
    divergence = run.likelihood.distributions(batch).kl_from(before, batch.targets).sum()
    return weight / tokens * divergence, divergence.item()


def _states_kept(run: Run, mine: list[int], weight: float, tokens: int, size: int) -> tuple[Tensor, float]:
    assert run.steering is not None
    drift = run.steering.retain_term(mine)
    return weight * run.steering.alpha / size * drift, drift.item()


_RETAIN = {"nll": _likelihood_kept, "hold": _likelihood_kept, "kl": _distributions_kept, "representation": _states_kept}


def finite(x: float) -> float | None:
    """The number, or None where it is none: JSON has neither NaN nor Inf."""
    return float(x) if math.isfinite(x) else None
