"""What the two passes over a head take and give."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Head(NamedTuple):
    """logits = cap(logit_scale * (hidden @ weight.T + bias)): weight (V, D), bias (V,) contiguous or None, softcap 0 for none."""

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float


class Statistics(NamedTuple):
    """(n,) each: log-likelihood of the target, largest logit M, and the sum over the vocabulary of exp(logit - M)."""

    log_likelihood: Tensor
    maximum: Tensor
    total: Tensor


class Gradients(NamedTuple):
    """Where the gradients go; None for those that nobody asked for. `add` says that weight and bias hold earlier rows' gradient already."""

    hidden: Tensor | None  # (n, D) real, zeros
    weight: Tensor | None  # (V, D), of the head's dtype, or real to add to
    bias: Tensor | None  # (V,) real
    add: bool = False
