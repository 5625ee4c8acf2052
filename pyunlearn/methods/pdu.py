"""PDU: flat logits on the forget set, under a constraint on the retain set."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from pyunlearn.errors import ArgumentError
from pyunlearn.methods.reduction import reduced, token_means
from pyunlearn.models.distributions import Distributions


def pdu(model: Distributions, example: Tensor, counts: Tensor, *, reduction: str = "mean") -> Tensor:
    """How far the logits are from flat: 0 for the uniform distribution.

        loss_i = mean over its tokens of (max over v of z[v] - mean over v of z[v])^2

    Args:
        model: the model's distributions at N scored rows; z are their logits.
        example: (N,) whose each is, in [0, B), ascending.
        counts: (B,) tokens of each example.
        reduction: "mean" over the examples, or "none".

    Returns:
        () the mean loss, or (B,) losses.

    Source: Entesari et al. 2025, arXiv 2506.05314, logit-margin flattening.
    """
    return reduced(token_means(model.margin().square(), example, counts), reduction)


@dataclass
class Multiplier:
    """The weight of the retain loss in PDU: it grows while the constraint is broken and shrinks while there is room.

        value <- max(0, value + step_size (retain loss - bound)),    after the first `warmup` steps

    Raises ArgumentError where one of these is no finite number, or value, step_size or warmup is negative.

    Source: arXiv 2506.05314, the dual update.
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
                    f"PDU's multiplier needs a number for its {name}, 0 or more (the bound any), got {x!r}"
                )

    def update(self, retain_loss: float) -> None:
        """Takes in the retain loss of one step; one that is not finite changes nothing."""
        self.steps += 1
        if self.steps > self.warmup and math.isfinite(retain_loss):
            self.value = max(0.0, self.value + self.step_size * (retain_loss - self.bound))
