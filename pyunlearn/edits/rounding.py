"""Rounding of a step to the weights' dtype: how much of the step was written."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from pyunlearn.ops._portable import to_float64

_WRITTEN = 0.9  # share of a step; less is noted


class Rounding:
    """Squared length of a step, of what was written of it, and their inner product, summed over the parameters.

    >>> rounding = Rounding()
    >>> rounding.add(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0]))
    >>> rounding.note({torch.bfloat16})[:75]
    'Rounding the weights to bfloat16 left 36 % of the step (its norm is 3, not '
    """

    def __init__(self) -> None:
        self.step = self.written = self.common = 0.0

    def add(self, step: Tensor, written: Tensor) -> None:
        """Add a parameter's part."""
        step, written = to_float64(step.flatten()), to_float64(written.flatten())
        self.step += float(step.dot(step))
        self.written += float(written.dot(written))
        self.common += float(step.dot(written.to(step.device)))

    def note(self, dtypes: Collection[torch.dtype]) -> str | None:
        """Return a sentence where less than 90 % of the step was written, measured along the step."""
        if self.common >= _WRITTEN * self.step:
            return None
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        wider = ", or edit the model in float32 (--dtype float32)" if any(d.itemsize < 4 for d in dtypes) else ""
        return (
            f"Rounding the weights to {names} left {100 * max(self.common, 0) / self.step:.0f} % of the step (its norm "
            f"is {self.written**0.5:.3g}, not {self.step**0.5:.3g}): take a longer step{wider}."
        )
