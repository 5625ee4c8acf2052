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
    """Compute TNPO with an additional weight that is small for tokens that are already improbable.

        loss_i = mean over its tokens of 2 p^(beta + alpha) / (p^beta + q^beta) log p

    Here p = exp(log_likelihood) and q = exp(reference). The weight is a constant: no gradient goes through it.

    Args:
        log_likelihood: (N,) log-likelihoods of the tokens, nats.
        example: (N,) index of the example of each token, in [0, B).
        counts: (B,) tokens of each example.
        reference: (N,) the same under the reference model.
        beta: slope of TNPO's weight, per nat; the larger, the sooner the weight vanishes.
        alpha: exponent of the additional weight p^alpha; 0 is TNPO.
        weights: (N,) factors on the tokens in the mean; None: all 1.
        reduction: "mean" over the examples, or "none".

    Returns:
        () the mean loss, or (B,) losses, nats per token.

    Raises:
        ArgumentError: another reduction.

    Source: Wang et al. 2025, arXiv 2502.19301 (WTNPO).

    >>> log_likelihood, reference = torch.tensor([-1.0, -1.5]), torch.tensor([-1.0, -1.0])
    >>> wtnpo(log_likelihood, torch.tensor([0, 1]), torch.tensor([1, 1]), reference, reduction="none")
    tensor([-0.2231, -0.0377])
    """
    detached = log_likelihood.detach()
    weight = 2 * torch.sigmoid(beta * (detached - reference)) * (alpha * detached).exp()
    return reduced(token_means(weight * log_likelihood, example, counts, weights), reduction)
