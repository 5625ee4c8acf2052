"""Selective synaptic dampening: shrink the weights that matter to the forget set far more than to the retain set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyunlearn.data import Tokens
from pyunlearn.edits.base import POSITIVE, Editing, EditResult, wide
from pyunlearn.edits.config import EditConfig
from pyunlearn.models.scoring import evaluation_mode
from pyunlearn.options import accepts, require
from pyunlearn.probes.gradients import visited


@accepts(EditConfig)
def selective_synaptic_dampening(
    model: Any,
    forget: Any,
    *,
    retain: Any = None,
    tokenizer: Any = None,
    alpha: float = 10.0,
    dampening: float = 1.0,
    progress: bool | None = None,
    config: EditConfig | str | Path | None = None,
    **settings: Any,
) -> EditResult:
    """Shrink the weights whose Fisher information on the forget set exceeds that on the retain set by a factor.

        I_F, I_D = mean over batches of the squared gradient of the batch's mean NLL per token  (elementwise, float32)
        where I_F > alpha I_D:  theta <- theta * min(dampening * I_D / I_F, 1)

    The gradients are those of a batch, as in the authors' code: with batches of one text they are the empirical Fisher
    information. `batch_size` holds for both sets, since a mean over more texts has smaller squares. No optimizer, one
    backward pass over each set. Nothing is random: `seed` has no effect.

    Args:
        model: a transformers language model, or a path; changed in place. With adapters (PEFT) only these change.
        forget, retain: texts, in the forms that `pyunlearn.unlearn` takes; retain is required, and is best a sample of
            the training data.
        tokenizer: the model's; None: loaded from where the model came from.
        alpha: minimal ratio I_F / I_D of the dampened weights, above 0; the lower, the more weights are dampened. The
            source takes 10, and 5 for some models.
        dampening: the source's lambda, above 0; the lower, the smaller the dampened weights become.
        progress: show a progress bar; None: on a terminal only.
        config: an EditConfig, or a file that holds one; the options below override it.
        {options}

    Returns:
        EditResult. `diagnostics`: `dampened`, parameter -> number of elements where I_F > alpha I_D and the factor is
        below 1 (elements that are already 0 included), `share`, all of them divided by the number of elements, and
        `batches`, the number of backward passes.

    Raises:
        ArgumentError: no retain, or an option out of range. DataError, ModelError, TrainingError: as in
            `pyunlearn.unlearn`.

    Source: Foster et al. 2023, arXiv 2308.07707, eq. 5 and 6, with the exponent of I_D / I_F at 1.
    """
    config = EditConfig.of(config, settings, "selective_synaptic_dampening")
    require(POSITIVE, alpha=alpha, dampening=dampening)
    sources, needs = {"forget": forget, "retain": retain}, {"retain": "to know which weights all other text needs"}
    with Editing(
        "selective_synaptic_dampening", model, sources, tokenizer, config, progress=progress, needs=needs
    ) as edit:
        forget_tokens, retain_tokens = edit.tokens["forget"], edit.tokens["retain"]
        edit.progress.begin("gradients", len(retain_tokens) + len(forget_tokens))
        on_retain, on_forget = squared_gradients(edit, retain_tokens), squared_gradients(edit, forget_tokens)
        dampened, size = {}, 0
        for name, p in edit.parameters.items():
            i_f, i_d = on_forget.pop(name), on_retain.pop(name)
            factor = dampening * i_d / i_f  # 0 / 0 where no gradient reaches: not chosen
            chosen = (i_f > alpha * i_d) & (factor < 1)
            edit.write(name, torch.where(chosen, wide(p) * factor, wide(p)))
            dampened[name], size = int(chosen.sum()), size + p.numel()
        passes = sum(-(-len(t) // config.batch_size) for t in (retain_tokens, forget_tokens))
        return edit.finish(dampened=dampened, share=sum(dampened.values()) / size, batches=passes)


def squared_gradients(edit: Editing, tokens: Sequence[Tokens]) -> dict[str, Tensor]:
    """Return name -> mean over batches of the squared batch gradient, float32, on the parameter's device."""
    squares = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in edit.parameters.items()}
    count = -(-len(tokens) // edit.config.batch_size)

    def visit(name: str, gradient: Tensor) -> None:
        squares[name].addcmul_(gradient.float(), gradient.float(), value=1 / count)

    with evaluation_mode(edit.model), visited(edit.parameters, visit):
        for indices, batch in edit.batches(tokens):
            share = 1 / len(indices)
            edit.lm.likelihood.objective(
                batch, lambda sums, counts, share=share: -share * sums / counts
            ).loss.backward()
            edit.progress.advance(len(indices))
    return squares
