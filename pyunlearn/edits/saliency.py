"""The saliency mask (SalUn): which weights an unlearning run may change, by the gradient of the forget loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyunlearn.data import Tokens
from pyunlearn.edits.base import Editing
from pyunlearn.edits.weight_scores import largest
from pyunlearn.errors import ArgumentError, TrainingError
from pyunlearn.probes.gradients import mean_gradient


def saliency_mask(
    model: Any, forget: Any, *, share: float = 0.5, tokenizer: Any = None, batch_size: int = 8, truncate: bool = False,
    workspace: int | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """True at the weights on which the forget loss depends most.

        m = 1 where | sum over the forget texts of grad of the NLL a token | is among the largest `share` of all weights that train

    For `pyunlearn.unlearn(model, forget, mask=saliency_mask(model, forget))`, with any method: all other weights keep their bits. The sum is over
    whole texts before the absolute value is taken, and the ranking is over all parameters together.

    Args:
        model: a transformers language model, or a path; left as it is. With adapters (PEFT) only what trains.
        forget: texts, in the forms that `pyunlearn.unlearn` takes.
        share: of all weights that train, above 0 and at most 1; exactly that many, rounded.
        tokenizer, truncate, workspace: as in `pyunlearn.unlearn`.
        batch_size: texts in one pass.

    Returns:
        name -> bool tensor like the parameter, on its device, for each that trains. One backward pass over the forget set, and 4 bytes a weight
        while it lasts.

    Raises:
        ArgumentError: a share out of range. TrainingError: a gradient that is not finite. DataError, ModelError: as in `pyunlearn.unlearn`.

    Source: Fan et al. 2024, arXiv 2310.12508, eq. 3.
    """
    if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 < share <= 1:
        raise ArgumentError(f"share must be a number above 0 and at most 1, got {share!r}")
    edit = Editing("saliency_mask", model, {"forget": forget}, tokenizer, batch_size=batch_size, truncate=truncate, workspace=workspace)  # fmt: skip
    return salient(edit.model, edit.tokens["forget"], share, batch_size=batch_size, workspace=workspace)


def salient(
    model: Any, tokens: Sequence[Tokens], share: float, *, batch_size: int, workspace: int | None
) -> dict[str, Tensor]:
    """The mask, of texts that are encoded."""
    gradient = mean_gradient(model, tokens, batch_size=batch_size, workspace=workspace)
    if bad := next((n for n, g in gradient.items() if not bool(torch.isfinite(g).all())), None):
        raise TrainingError(f"the forget loss has a gradient in {bad} that is infinite or NaN: its weights are broken")
    size = sum(g.numel() for g in gradient.values())
    return largest(gradient, max(1, round(share * size)))
