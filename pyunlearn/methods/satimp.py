"""SatImp: saturation and importance weights."""

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
    """Ascend on tokens that are neither improbable already nor certain.

        loss_i = mean over its tokens of p^beta1 (1 - p)^beta2 log p,   p = exp(log_likelihood)

    The weight is a constant: no gradient goes through it.

    Args:
        log_likelihood: (N,) log-likelihoods of the tokens, nats.
        example: (N,) index of the example of each token, in [0, B).
        counts: (B,) tokens of each example.
        beta1: exponent of the saturation weight: the larger, the less an improbable token counts.
        beta2: exponent of the importance weight: the larger, the less a certain token counts.
        weights: (N,) factors on the tokens in the mean; None: all 1.
        reduction: "mean" over the examples, or "none".

    Returns:
        () the mean loss, or (B,) losses, nats per token.

    Raises:
        ArgumentError: another reduction.

    Source: Yang et al. 2025, arXiv 2505.11953 (SatImp).

    >>> log_likelihood = torch.tensor([0.9, 0.5, 0.01]).log()
    >>> satimp(log_likelihood, torch.tensor([0, 1, 2]), torch.ones(3, dtype=torch.long), beta1=1.0, reduction="none")
    tensor([-0.0095, -0.1733, -0.0456])
    """
    detached = log_likelihood.detach()
    weight = (beta1 * detached).exp() * (-torch.expm1(detached)).clamp(min=0) ** beta2
    return reduced(token_means(weight * log_likelihood, example, counts, weights), reduction)
