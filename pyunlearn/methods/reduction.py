"""The end of every method: one loss for each example, or their mean."""

from torch import Tensor

from pyunlearn.errors import ArgumentError


def reduced(losses: Tensor, reduction: str) -> Tensor:
    """() their mean, or (B,) the losses as they are. Raises ArgumentError for another reduction than "mean" or "none"."""
    if reduction not in ("mean", "none"):
        raise ArgumentError(f'reduction must be "mean" or "none", got {reduction!r}')
    return losses.mean() if reduction == "mean" else losses


def token_means(values: Tensor, example: Tensor, counts: Tensor, weights: Tensor | None = None) -> Tensor:
    """(b,) mean of each example's values (n,), times `weights` if there are any, which stand example by example: over its own tokens, never over padding."""
    values = values if weights is None else weights * values
    return values.new_zeros(len(counts)).index_add(0, example, values) / counts.clamp(min=1)
