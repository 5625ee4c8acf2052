"""Retain losses: the terms of an optimizer step that preserve the text that must keep working.

    nll             mean negative log-likelihood per token: training continues on the retain set
    hold            mean over examples of max(0, NLL - NLL before the run): only a loss of utility is reversed
    kl              mean divergence per token from the reference model: whole distributions are preserved
    representation  alpha times the mean squared distance of the hidden states from their original values (RMU)

Each function returns the share of some examples in the loss of the step, so that micro-batches add up.
"""

import torch
from torch import Tensor

_ROUNDING = 1e-4  # nats a token


def retain_nll(log_likelihood: Tensor, weight: float, tokens: int) -> Tensor:
    """Return (b,) the negative log-likelihood's share in the loss of a step.

        loss_i = -weight * log_likelihood_i / tokens

    Args:
        log_likelihood: (b,) summed, nats.
        weight: factor on the loss.
        tokens: scored tokens of the whole step.

    >>> retain_nll(torch.tensor([-2.0, -4.0]), 1.0, 3)
    tensor([0.6667, 1.3333])
    """
    return -weight / tokens * log_likelihood


def retain_hold(log_likelihood: Tensor, lengths: Tensor, initial: Tensor, weight: float, examples: int) -> Tensor:
    """Return (b,) the terms of a step's loss that penalize a rise of each example's NLL since the run began.

        loss_i = weight / examples * max(0, -log_likelihood_i / lengths_i - initial_i)

    A rise below 0.0001 nats, which rounding can make, is none: it would train on text that lost nothing.

    Args:
        log_likelihood: (b,) summed, nats.
        lengths: (b,) scored tokens.
        initial: (b,) mean negative log-likelihoods per token before the first step, nats.
        weight: factor on the loss.
        examples: examples in the whole step.

    >>> retain_hold(torch.tensor([-6.0, -2.0]), torch.tensor([2, 2]), torch.tensor([2.0, 2.0]), 1.0, 2)
    tensor([0.5000, 0.0000])
    """
    rise = -log_likelihood / lengths - initial
    return weight / examples * torch.where(rise > _ROUNDING, rise, 0.0)


def retain_kl(divergence: Tensor, weight: float, tokens: int) -> Tensor:
    """Return () the term that the KL divergence from the reference model adds to a step's loss.

        loss = weight / tokens * sum of divergence_t

    Args:
        divergence: (n,) KL(reference || model) of each token, nats.
        weight: factor on the loss.
        tokens: scored tokens of the whole step.

    >>> retain_kl(torch.tensor([0.5, 1.0]), 2.0, 3)
    tensor(1.)
    """
    return weight / tokens * divergence.sum()


def retain_representation(drift: Tensor, weight: float, alpha: float, examples: int) -> Tensor:
    """Return () the share in the loss of a step of the drift of the hidden states.

        loss = weight * alpha / examples * sum of drift_i

    Args:
        drift: (b,) losses of `pyunlearn.methods.rmu.representation_drift`.
        weight: factor on the loss.
        alpha: RMU's own factor.
        examples: examples in the whole step.

    Source: arXiv 2403.03218, section 4.

    >>> retain_representation(torch.tensor([0.5, 1.0]), 1.0, 4.0, 2)
    tensor(3.)
    """
    return weight * alpha / examples * drift.sum()
