"""Representation misdirection: the hidden states of one layer are led to a random direction, where the later layers can read nothing."""

import torch
from torch import Tensor

from pyunlearn.methods.reduction import reduced, token_means


def rmu(
    hidden: Tensor, example: Tensor, counts: Tensor, direction: Tensor, *, coefficient: float = 6.5, reduction: str = "mean"
) -> Tensor:  # fmt: skip
    """Leads the hidden states of one layer to one random vector, the same for every token of every text.

        loss_i = mean over its tokens of || h_t - c u ||^2 / D

    Only positions that predict a scored token count: neither prompt nor padding.

    Args:
        hidden: (N, D) what the layer gives out there.
        example: (N,) whose it is, in [0, B).
        counts: (B,) positions of each example.
        direction: (D,) the unit vector u: `steering_direction`.
        coefficient: c, the length that they are led to; 6.5 was chosen for Zephyr-7B, `adaptive_rmu` measures it.
        reduction: "mean" over the examples, or "none".

    Returns:
        () the mean loss, or (B,) losses.

    Source: Li et al. 2024, arXiv 2403.03218, section 4 (RMU); the mean over D is their code's.
    """
    apart = (hidden - coefficient * direction).square().mean(dim=-1)
    return reduced(token_means(apart, example, counts), reduction)


def representation_drift(
    hidden: Tensor, reference: Tensor, example: Tensor, counts: Tensor, *, reduction: str = "mean"
) -> Tensor:
    """The retain term of RMU: hidden states stay where they were.

        loss_i = mean over its tokens of || h_t - h_t(reference) ||^2 / D

    Args:
        hidden, reference: (N, D) what the layer gives out, and what it gave out before.
        example, counts, reduction: as in `rmu`.

    Returns:
        () the mean loss, or (B,) losses.

    Source: arXiv 2403.03218, section 4.
    """
    return reduced(token_means((hidden - reference).square().mean(dim=-1), example, counts), reduction)


def steering_direction(size: int, seed: int) -> Tensor:
    """(size,) float32: a vector drawn uniformly from [0, 1)^size, made one long. Not Gaussian: all its parts are 0 or more, as in the authors' code."""
    drawn = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (drawn / drawn.norm()).float()
