"""Saturation and importance weights."""

import torch
from torch import Tensor

from pyunlearn.methods.reduction import reduced, token_means


def satimp(
    log_likelihood: Tensor,
    example: Tensor,
    counts: Tensor,
    *,
    beta1: float = 5.0,
    beta2: float = 1.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Ascends on tokens that are neither improbable already nor certain.

        loss_i = mean over its tokens of p^beta1 (1 - p)^beta2 log p,   p = exp(log_likelihood)

    The weight is a constant: no gradient goes through it.

    Args:
        log_likelihood: (N,) of each token, nats.
        example: (N,) whose it is, in [0, B).
        counts: (B,) tokens of each example.
        beta1, beta2: exponents of saturation and of importance.
        weights: (N,) factors on the tokens in the mean; default: 1.
        reduction: "mean" over the examples, or "none".

    Returns:
        () the mean loss, or (B,) losses.

    Source: Yang et al. 2025, arXiv 2505.11953 (SatImp).
    """
    fixed = log_likelihood.detach()
    weight = (beta1 * fixed).exp() * (-torch.expm1(fixed)).clamp(min=0) ** beta2
    return reduced(token_means(weight * log_likelihood, example, counts, weights), reduction)
