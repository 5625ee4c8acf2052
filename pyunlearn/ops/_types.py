"""Inputs and outputs of the two passes over the vocabulary."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Head(NamedTuple):
    """The output head: logits = cap(logit_scale * (hidden @ weight.T + bias))."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,), contiguous
    logit_scale: float
    softcap: float  # 0: none


class Statistics(NamedTuple):
    """Row statistics (n,): the target's log-likelihood, the largest logit M, and the sum of exp(logit - M)."""

    log_likelihood: Tensor
    maximum: Tensor
    total: Tensor


class Gradients(NamedTuple):
    """Output buffers of the gradients; None where no gradient is needed. That of the hidden states is returned."""

    hidden: bool  # whether it is needed
    weight: Tensor | None  # (V, D), of the head's dtype, or real to add to
    bias: Tensor | None  # (V,) real
    add: bool = False  # weight and bias already hold the gradient of earlier rows: add to it
