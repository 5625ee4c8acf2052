"""Weighted token-wise negative preference optimization."""

import torch
from torch import Tensor

from pyunlearn.methods.reduction import reduced, token_means


def wtnpo(
    log_likelihood: Tensor,
    example: Tensor,
    counts: Tensor,
    reference: Tensor,
    *,
    beta: float = 4.0,
    alpha: float = 1.5,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """TNPO that also leaves alone what is already improbable.

        loss_i = mean over its tokens of 2 p^(beta + alpha) / (p^beta + q^beta) log p

    The weight is a constant: no gradient goes through it.

    Args:
        log_likelihood: (N,) of each token, nats.
        example: (N,) whose it is, in [0, B).
        counts: (B,) tokens of each example.
        reference: (N,) log-likelihoods under the reference model.
        beta, alpha: exponents; alpha = 0 is TNPO.
        weights: (N,) factors on the tokens in the mean; default: 1.
        reduction: "mean" over the examples, or "none".

    Returns:
        () the mean loss, or (B,) losses.

    Source: Wang et al. 2025, arXiv 2502.19301 (WTNPO).
    """
    fixed = log_likelihood.detach()
    weight = 2 * torch.sigmoid(beta * (fixed - reference)) * (alpha * fixed).exp()
    return reduced(token_means(weight * log_likelihood, example, counts, weights), reduction)
