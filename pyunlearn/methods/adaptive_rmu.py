"""Adaptive RMU: representation misdirection with a target norm that is measured on the original model."""

from torch import Tensor

from pyunlearn.methods.reduction import reduced, token_means


def adaptive_rmu(
    hidden: Tensor,
    example: Tensor,
    counts: Tensor,
    direction: Tensor,
    norms: Tensor,
    *,
    beta: float = 5.0,
    reduction: str = "mean",
) -> Tensor:
    """Move the hidden states of one layer to one random direction, scaled to a multiple of their original norm.

        loss_i = mean over its tokens of || h_t - beta n_i u ||^2 / D
        n_i    = mean over its tokens of || h_t(original) ||

    The norms are per example. The authors' code uses the mean over the first batch for all batches.

    Args:
        hidden: (N, D) output of the layer at the positions that predict a scored token.
        example: (N,) index of the example of each row, in [0, B).
        counts: (B,) rows of each example.
        direction: (D,) the unit vector u, see `pyunlearn.methods.rmu.steering_direction`.
        norms: (B,) n_i under the original model.
        beta: factor on the norms.
        reduction: "mean" over the examples, or "none".

    Returns:
        () the mean loss, or (B,) losses, in squared units of the hidden states.

    Raises:
        ArgumentError: another reduction.

    Source: Huu-Tien et al. 2024, arXiv 2408.06223 (Adaptive RMU).

    >>> import torch
    >>> hidden, direction = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([1.0, 0.0])
    >>> adaptive_rmu(hidden, torch.tensor([0, 0]), torch.tensor([2]), direction, torch.tensor([1.0]), beta=1.0)
    tensor(0.5000)
    """
    goal = (beta * norms)[example, None] * direction  # (N, D)
    return reduced(token_means((hidden - goal).square().mean(dim=-1), example, counts), reduction)
