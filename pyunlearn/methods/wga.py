"""Weighted gradient ascent."""

from torch import Tensor

from pyunlearn.methods.reduction import reduced, token_means


def wga(
    log_likelihood: Tensor,
    example: Tensor,
    counts: Tensor,
    *,
    beta: float = 1.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute the gradient-ascent loss with a weight that is small for tokens that are already improbable.

        loss_i = mean over its tokens of p^beta log p,   p = exp(log_likelihood)

    The weight is a constant: no gradient goes through it.

    Args:
        log_likelihood: (N,) log-likelihoods of the tokens, nats.
        example: (N,) index of the example of each token, in [0, B).
        counts: (B,) tokens of each example.
        beta: exponent of the weight; 0 is gradient ascent. The larger, the less an improbable token counts.
        weights: (N,) factors on the tokens in the mean; None: all 1.
        reduction: "mean" over the examples, or "none".

    Returns:
        () the mean loss, or (B,) losses, nats per token.

    Raises:
        ArgumentError: another reduction.

    Source: Wang et al. 2025, arXiv 2502.19301 (WGA).

    >>> import torch
    >>> wga(torch.tensor([-0.5, -3.0]), torch.tensor([0, 1]), torch.tensor([1, 1]), reduction="none")
    tensor([-0.3033, -0.1494])
    """
    weight = (beta * log_likelihood.detach()).exp()
    return reduced(token_means(weight * log_likelihood, example, counts, weights), reduction)
