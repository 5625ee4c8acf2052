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
    """Compute NPO for each token: a token's weight vanishes as it becomes less likely than under the reference model.

        loss_i = mean over its tokens of 2 p^beta / (p^beta + q^beta) log p

    Here p = exp(log_likelihood) and q = exp(reference). The weight is a constant: no gradient goes through it.

    Args:
        log_likelihood: (N,) log-likelihoods of the tokens, nats.
        example: (N,) index of the example of each token, in [0, B).
        counts: (B,) tokens of each example.
        reference: (N,) the same under the reference model.
        beta: slope, per nat; the larger, the sooner the weight vanishes.
        weights: (N,) factors on the tokens in the mean; None: all 1.
        reduction: "mean" over the examples, or "none".

    Returns:
        () the mean loss, or (B,) losses, nats per token.

    Raises:
        ArgumentError: another reduction.

    Source: Wang et al. 2025, arXiv 2502.19301 (TNPO).

    >>> log_likelihood, reference = torch.tensor([-1.0, -3.0]), torch.tensor([-1.0, -1.0])
    >>> tnpo(log_likelihood, torch.tensor([0, 1]), torch.tensor([1, 1]), reference, reduction="none")
    tensor([-1.0000, -0.0020])
    """
    weight = 2 * torch.sigmoid(beta * (log_likelihood.detach() - reference))
    return reduced(token_means(weight * log_likelihood, example, counts, weights), reduction)
