"""PDU: flat logits on the forget set, under a constraint on the retain set."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from pyunlearn.errors import ArgumentError
from pyunlearn.methods.reduction import reduced, token_means
from pyunlearn.models.distributions import Distributions


def pdu(
    model: Distributions,
    example: Tensor,
    counts: Tensor,
    *,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute the squared logit margin, which is 0 for the uniform distribution.

        loss_i = mean over its tokens of (max over v of z[v] - mean over v of z[v])^2

    Args:
        model: the model's distributions at N scored rows; z are their logits.
        example: (N,) index of the example of each row, in [0, B), ascending.
        counts: (B,) tokens of each example.
        weights: (N,) factors on the tokens in the mean; None: all 1.
        reduction: "mean" over the examples, or "none".

    Returns:
        () the mean loss, or (B,) losses, in squared logits.

    Raises:
        ArgumentError: another reduction.

    Source: Entesari et al. 2025, arXiv 2506.05314, logit-margin flattening.

    >>> import torch
    >>> pdu(Distributions(torch.tensor([[3.0, 0.0, 0.0]]), None), torch.tensor([0]), torch.tensor([1]))
    tensor(4.)
    """
    return reduced(token_means(model.margin().square(), example, counts, weights), reduction)


@dataclass
class Multiplier:
    """The dual variable of PDU: a weight of the retain loss that grows while the loss is above its bound.

        value <- max(0, value + step_size (retain loss - bound)),    after the first `warmup` steps

    Args:
        value: initial weight, 0 or more.
        step_size: step size of the dual ascent, 0 or more.
        bound: upper bound on the retain loss, in its unit.
        warmup: steps without an update, 0 or more.
        steps: steps done.

    Raises:
        ArgumentError: a value that is not a finite number, or a negative value, step_size or warmup.

    Source: arXiv 2506.05314, the dual update.

    >>> multiplier = Multiplier(1.0, 0.5, 2.0, 0)
    >>> multiplier.update(4.0)
    >>> multiplier.value
    2.0
    """

    value: float
    step_size: float
    bound: float
    warmup: int
    steps: int = 0

    def __post_init__(self) -> None:
        for name in ("value", "step_size", "bound", "warmup"):
            x = getattr(self, name)
            if not isinstance(x, (int, float)) or not math.isfinite(x) or (x < 0 and name != "bound"):
                raise ArgumentError(
                    f"PDU's multiplier needs a number for its {name}, 0 or more (any for the bound), got {x!r}"
                )

    def update(self, retain_loss: float) -> None:
        """Update the value with the retain loss of one step; a loss that is not finite changes nothing."""
        self.steps += 1
        if self.steps > self.warmup and math.isfinite(retain_loss):
            self.value = max(0.0, self.value + self.step_size * (retain_loss - self.bound))
