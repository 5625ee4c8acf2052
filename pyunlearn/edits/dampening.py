"""Selective synaptic dampening: weights that matter to the forget set far more than to the rest are shrunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyunlearn.data import Tokens
from pyunlearn.edits.base import Editing, EditResult, require_positive, require_retain, wide
from pyunlearn.models.scoring import batches_on, evaluation_mode
from pyunlearn.probes.gradients import visited


def selective_synaptic_dampening(
    model: Any, forget: Any, *, retain: Any = None, tokenizer: Any = None, alpha: float = 10.0, dampening: float = 1.0, batch_size: int = 8,
    truncate: bool = False, workspace: int | None = None, seed: int = 0, progress: bool | None = None,
) -> EditResult:  # fmt: skip
    """Shrinks the weights whose Fisher information on the forget set exceeds that on the retain set by a factor.

        I_F, I_D = mean over batches of the squared gradient of the batch's mean NLL a token      (elementwise, float32)
        where I_F > alpha I_D:  theta <- theta * min(dampening * I_D / I_F, 1)

    The gradients are those of a batch, as in the authors' code: of a batch of one they are the empirical Fisher information. No
    optimizer, one backward pass over each set.

    Args:
        model: a transformers language model, or a path; changed in place. With adapters (PEFT) only what trains.
        forget, retain: texts, in the forms that `pyunlearn.unlearn` takes; retain is needed, and is best a sample of the training data.
        tokenizer, truncate, workspace: as in `pyunlearn.unlearn`.
        alpha: how many times as important to the forget set, above 0; the lower, the more weights are dampened. 10 in the source, 5 for some.
        dampening: the source's lambda, above 0; the lower, the harder.
        batch_size: texts in one gradient; both sets must be taken with the same, since a mean over more texts has smaller squares.
        seed: unused, for nothing is drawn.
        progress: as in `pyunlearn.unlearn`.

    Returns:
        EditResult; `diagnostics`: `dampened`, parameter -> elements where I_F > alpha I_D and the factor is below 1 (those that are 0 already included),
        `share`, all of them over all elements, and `batches`, the backward passes.

    Raises:
        ArgumentError: no retain, alpha or dampening not above 0. DataError, ModelError, TrainingError: as in `pyunlearn.unlearn`.

    Source: Foster et al. 2023, arXiv 2308.07707, eq. 5 and 6, with the exponent of I_D / I_F at 1.
    """
    require_positive(alpha=alpha, dampening=dampening)
    sources = {"forget": forget, "retain": retain}
    with Editing("selective_synaptic_dampening", model, sources, tokenizer, batch_size=batch_size, truncate=truncate, workspace=workspace, progress=progress) as edit:  # fmt: skip
        kept = require_retain(edit.tokens, edit.name, "to know which weights everything else needs")
        edit.progress.begin("gradients", len(kept) + len(edit.tokens["forget"]))
        every, of_forget = squared_gradients(edit, kept), squared_gradients(edit, edit.tokens["forget"])
        dampened, size = {}, 0
        for name, p in edit.parameters.items():
            i_f, i_d = of_forget.pop(name), every.pop(name)
            factor = dampening * i_d / i_f  # 0 / 0 where no gradient reaches: not chosen
            chosen = (i_f > alpha * i_d) & (factor < 1)
            edit.write(name, torch.where(chosen, wide(p) * factor, wide(p)))
            dampened[name], size = int(chosen.sum()), size + p.numel()
        passes = sum(-(-len(t) // batch_size) for t in (kept, edit.tokens["forget"]))
        return edit.done(dampened=dampened, share=sum(dampened.values()) / size, batches=passes)


def squared_gradients(edit: Editing, tokens: Sequence[Tokens]) -> dict[str, Tensor]:
    """name -> mean over batches of the squared batch gradient, float32, on the parameter's device."""
    found = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in edit.parameters.items()}
    number = -(-len(tokens) // edit.batch_size)

    def visit(name: str, gradient: Tensor) -> None:
        found[name].addcmul_(gradient.float(), gradient.float(), value=1 / number)

    with evaluation_mode(edit.model), visited(edit.parameters, visit):
        for places, batch in batches_on(edit.model, tokens, edit.batch_size):
            share = 1 / len(places)
            edit.likelihood.objective(batch, lambda sums, counts, share=share: -share * sums / counts).loss.backward()
            edit.progress.advance(len(places))
    return found
