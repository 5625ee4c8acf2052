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
    """Gradient ascent that leaves alone what is already improbable.

        loss_i = mean over its tokens of p^beta log p,   p = exp(log_likelihood)

    The weight is a constant: no gradient goes through it.

    Args:
        log_likelihood: (N,) of each token, nats.
        example: (N,) whose it is, in [0, B).
        counts: (B,) tokens of each example.
        beta: 0 is gradient ascent; the larger, the more only the certain tokens count.
        weights: (N,) factors on the tokens in the mean; default: 1.
        reduction: "mean" over the examples, or "none".

    Returns:
        () the mean loss, or (B,) losses.

    Source: Wang et al. 2025, arXiv 2502.19301 (WGA).
    """
    weight = (beta * log_likelihood.detach()).exp()
    return reduced(token_means(weight * log_likelihood, example, counts, weights), reduction)
