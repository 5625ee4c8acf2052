"""Saliency mask (SalUn): the weights that an unlearning run may change, by the gradient of the forget loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyunlearn.edits.base import Editing
from pyunlearn.edits.config import EditConfig
from pyunlearn.edits.weight_scores import largest
from pyunlearn.errors import TrainingError
from pyunlearn.options import Number, require


def saliency_mask(
    model: Any,
    forget: Any,
    *,
    share: float = 0.5,
    tokenizer: Any = None,
    batch_size: int = 8,
    turns: str | None = None,
    template: str | Path = "auto",
    truncate: bool = False,
    workspace: int | None = None,
) -> dict[str, Tensor]:
    """Return a mask that is True at the weights on which the forget loss depends most.

        m = 1 where | sum over the forget texts of grad of the NLL per token | is among the largest `share` of all
        trainable weights

    For `pyunlearn.unlearn(model, forget, mask=saliency_mask(model, forget))`, with any method: all other weights keep
    their bits. The sum is over whole texts before the absolute value is taken, and the ranking is over all parameters
    together.

    Args:
        model: a transformers language model, or a path; left unchanged. With adapters (PEFT) the mask is for these.
        forget: texts, in the forms that `pyunlearn.unlearn` takes.
        share: of all trainable weights, above 0 and at most 1; exactly that number of weights, rounded.
        tokenizer: the model's; None: loaded from where the model came from.
        batch_size: texts in one pass.
        turns: what is scored of records with prompts, as in `pyunlearn.unlearn`.
        template: the form in which the model reads questions with answers and chats, as in `pyunlearn.unlearn`.
        truncate: cut texts that are longer than the model's context, instead of reading them in windows.
        workspace: bytes for cached logits.

    Returns:
        name -> bool tensor like the parameter, on its device, for each trainable one. Costs one backward pass over the
        forget set, and meanwhile 4 bytes per weight.

    Raises:
        ArgumentError: an argument out of range. TrainingError: a gradient that is not finite. DataError, ModelError: as
            in `pyunlearn.unlearn`.

    Source: Fan et al. 2024, arXiv 2310.12508, eq. 3.
    """
    config = EditConfig(batch_size=batch_size, turns=turns, template=template, truncate=truncate, workspace=workspace)
    require(Number(above=0, maximum=1), share=share)
    edit = Editing("saliency_mask", model, {"forget": forget}, tokenizer, config)
    edit.choose_form()
    return salient(edit.gradient("forget"), share)


def salient(gradient: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return the saliency mask for a gradient of the forget loss. Raises TrainingError where it is not finite."""
    if bad := next((n for n, g in gradient.items() if not bool(torch.isfinite(g).all())), None):
        raise TrainingError(f"the forget loss has a gradient in {bad} that is infinite or NaN: its weights are broken")
    size = sum(g.numel() for g in gradient.values())
    return largest(gradient, max(1, round(share * size)))
