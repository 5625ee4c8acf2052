"""Token-wise negative preference optimization."""

import torch
from torch import Tensor

from pyunlearn.methods.reduction import reduced, token_means


def tnpo(
    log_likelihood: Tensor,
    example: Tensor,
    counts: Tensor,
    reference: Tensor,
    *,
    beta: float = 4.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """NPO of every token by itself: it lets go of a token as it falls below the reference.

        loss_i = mean over its tokens of 2 p^beta / (p^beta + q^beta) log p,   p, q = exp(log_likelihood), exp(reference)

    The weight is a constant: no gradient goes through it.

    Args:
        log_likelihood: (N,) of each token, nats.
        example: (N,) whose it is, in [0, B).
        counts: (B,) tokens of each example.
        reference: (N,) log-likelihoods under the reference model.
        beta: how soon it lets go, per nat.
        weights: (N,) factors on the tokens in the mean; default: 1.
        reduction: "mean" over the examples, or "none".

    Returns:
        () the mean loss, or (B,) losses.

    Source: Wang et al. 2025, arXiv 2502.19301 (TNPO).
    """
    weight = 2 * torch.sigmoid(beta * (log_likelihood.detach() - reference))
    return reduced(token_means(weight * log_likelihood, example, counts, weights), reduction)
