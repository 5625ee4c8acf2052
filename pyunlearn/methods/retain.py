"""The retain losses: what an optimizer step does for the text that must keep working.

    nll             the mean negative log-likelihood a token: go on training on it
    hold            mean over examples of max(0, NLL - NLL before the run): only undo what the run has cost it
    kl              the mean divergence a token from the reference model: keep its whole distributions
    representation  alpha times the mean squared distance of the hidden states from where they were (RMU)

Each function gives the share of some examples in the loss of the step, so that micro-batches add up.
"""

import torch
from torch import Tensor


def retain_nll(log_likelihood: Tensor, weight: float, tokens: int) -> Tensor:
    """Return (b,) -weight * log_likelihood / tokens, for examples of a step with `tokens` scored tokens in all.

    >>> retain_nll(torch.tensor([-2.0, -4.0]), 1.0, 3)
    tensor([0.6667, 1.3333])
    """
    return -weight / tokens * log_likelihood


def retain_hold(log_likelihood: Tensor, lengths: Tensor, initial: Tensor, weight: float, examples: int) -> Tensor:
    """Return (b,) weight / examples * max(0, rise of the mean negative log-likelihood a token above `initial`).

    Args:
        log_likelihood: (b,) summed, nats.
        lengths: (b,) scored tokens.
        initial: (b,) mean negative log-likelihoods a token before the first step.
        weight: factor on the loss.
        examples: examples in the whole step.
    """
    return weight / examples * torch.relu(-log_likelihood / lengths - initial)


def retain_kl(divergence: Tensor, weight: float, tokens: int) -> Tensor:
    """Return () weight / tokens * the summed divergence (n,) from the reference model, nats."""
    return weight / tokens * divergence.sum()


def retain_representation(drift: Tensor, weight: float, alpha: float, examples: int) -> Tensor:
    """Return () weight * alpha / examples * the summed drift (b,) of the hidden states (arXiv 2403.03218)."""
    return weight * alpha / examples * drift.sum()
