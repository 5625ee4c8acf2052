"""Reductions that all losses share: token means of each example, then the mean over examples."""

from torch import Tensor

from pyunlearn.errors import ArgumentError


def reduced(losses: Tensor, reduction: str) -> Tensor:
    """Return () the mean of the losses (B,), or the losses themselves.

    Raises ArgumentError for another reduction than "mean" or "none".
    """
    if reduction not in ("mean", "none"):
        raise ArgumentError(f'reduction must be "mean" or "none", got {reduction!r}')
    return losses.mean() if reduction == "mean" else losses


def token_means(values: Tensor, example: Tensor, counts: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return (b,) the mean of each example's values (n,), times `weights` (n,) if given.

    >>> import torch
    >>> token_means(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]), torch.tensor([2, 1]))
    tensor([2., 5.])
    """
    values = values if weights is None else weights * values
    return values.new_zeros(len(counts)).index_add(0, example, values) / counts.clamp(min=1)
