"""RMU: representation misdirection, which moves the hidden states of one layer to a random direction."""

import torch
from torch import Tensor

from pyunlearn.methods.reduction import reduced, token_means


def rmu(
    hidden: Tensor,
    example: Tensor,
    counts: Tensor,
    direction: Tensor,
    *,
    coefficient: float = 6.5,
    reduction: str = "mean",
) -> Tensor:
    """Move the hidden states of one layer to one random vector, the same for every token of every text.

        loss_i = mean over its tokens of || h_t - c u ||^2 / D

    Args:
        hidden: (N, D) output of the layer at the positions that predict a scored token.
        example: (N,) index of the example of each row, in [0, B).
        counts: (B,) rows of each example.
        direction: (D,) the unit vector u, see `steering_direction`.
        coefficient: c, the norm of the target; 6.5 was chosen for Zephyr-7B, `adaptive_rmu` measures it.
        reduction: "mean" over the examples, or "none".

    Returns:
        () the mean loss, or (B,) losses, in squared units of the hidden states.

    Raises:
        ArgumentError: another reduction.

    Source: Li et al. 2024, arXiv 2403.03218, section 4 (RMU); the mean over D is that of their code.

    >>> hidden, direction = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([1.0, 0.0])
    >>> rmu(hidden, torch.tensor([0, 0]), torch.tensor([2]), direction, coefficient=2.0)
    tensor(2.)
    """
    distances = (hidden - coefficient * direction).square().mean(dim=-1)  # (N,)
    return reduced(token_means(distances, example, counts), reduction)


def representation_drift(
    hidden: Tensor, reference: Tensor, example: Tensor, counts: Tensor, *, reduction: str = "mean"
) -> Tensor:
    """Compute the retain term of RMU, which holds the hidden states at their original values.

        loss_i = mean over its tokens of || h_t - h_t(original) ||^2 / D

    Args:
        hidden: (N, D) output of the layer.
        reference: (N, D) output of the layer of the original model.
        example: (N,) index of the example of each row, in [0, B).
        counts: (B,) rows of each example.
        reduction: "mean" over the examples, or "none".

    Returns:
        () the mean loss, or (B,) losses, in squared units of the hidden states.

    Raises:
        ArgumentError: another reduction.

    Source: arXiv 2403.03218, section 4.

    >>> representation_drift(torch.ones(1, 4), torch.zeros(1, 4), torch.tensor([0]), torch.tensor([1]))
    tensor(1.)
    """
    return reduced(token_means((hidden - reference).square().mean(dim=-1), example, counts), reduction)


def steering_direction(size: int, seed: int) -> Tensor:
    """Return (size,) float32: a random unit vector, drawn uniformly from [0, 1)^size and normalized.

    All components are 0 or more, as in the authors' code, and not Gaussian.

    >>> float((steering_direction(3, seed=0) >= 0).sum())
    3.0
    """
    sample = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (sample / sample.norm()).float()
