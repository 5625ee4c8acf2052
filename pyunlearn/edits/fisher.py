"""Fisher step: one step along the inverse of the diagonal of the Fisher information."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyunlearn.edits.base import COUNT, POSITIVE, Editing, EditResult, require_optional, wide
from pyunlearn.edits.config import EditConfig
from pyunlearn.edits.curvature import widened
from pyunlearn.edits.fisher_information import DAMPING, NEEDS, direction, drawn_loss
from pyunlearn.errors import TrainingError
from pyunlearn.models.scoring import evaluation_mode
from pyunlearn.ops._portable import to_float64
from pyunlearn.options import accepts, require
from pyunlearn.probes.gradients import visited


@accepts(EditConfig)
def fisher_step(
    model: Any,
    forget: Any,
    *,
    retain: Any = None,
    tokenizer: Any = None,
    rate: float = 0.01,
    damping: float | None = None,
    training_texts: int | None = None,
    samples: int = 1,
    progress: bool | None = None,
    config: EditConfig | str | Path | None = None,
    **settings: Any,
) -> EditResult:
    """Take one step away from the forget texts, smaller for the weights to which the retain texts are sensitive.

        theta' = theta + rate (D + damping)^-1 v,   v = |F| / n (mean over F of grad l - mean over R of grad l)
        D_i = mean over R of T (d l~ / d theta_i)^2     l~: NLL per token of labels drawn from the model, T: its tokens

    D is the diagonal of the true Fisher information, which is the Gauss-Newton matrix, and not of the "empirical"
    Fisher information that the labels of the texts themselves would give. `batch_size` is for v: D takes one text in
    each pass. `seed` draws the labels.

    Args:
        model: a transformers language model, or a path; changed in place. With adapters (PEFT) only these change.
            16-bit weights are float32 during the computation.
        forget, retain: texts, in the forms that `pyunlearn.unlearn` takes; retain is required: a sample of the
            remaining training data.
        tokenizer: the model's; None: loaded from where the model came from.
        rate: above 0; 1 is the whole step, which is Newton's where the loss is quadratic and far too long where it is
            not: search upwards from a small rate.
        damping: added to D, in its unit, above 0; default 0.1 times D's mean.
        training_texts: n, the number of texts that the model was trained on; default: the number of forget and retain
            texts.
        samples: number of labels drawn for each token of the retain texts.
        progress: show a progress bar; None: on a terminal only.
        config: an EditConfig, or a file that holds one; the options below override it.
        {options}

    Returns:
        EditResult. `diagnostics`: `step_norm`, ||theta' - theta||_2 as the weights were written, and `damping`.

    Raises:
        ArgumentError: no retain, or an option out of range. TrainingError: D is 0 or not finite, and no damping is
            given. DataError, ModelError: as in `pyunlearn.unlearn`. After an error the weights are the original ones.

    Source: Jia et al. 2023, arXiv 2304.04934, influence unlearning; the true Fisher information after Kunstner et al.
    2019, arXiv 1905.12558.
    """
    config = EditConfig.of(config, settings, "fisher_step")
    require(POSITIVE, rate=rate)
    require(COUNT, samples=samples)
    require_optional(POSITIVE, damping=damping)
    require_optional(COUNT, training_texts=training_texts)
    sources = {"forget": forget, "retain": retain}
    with Editing("fisher_step", model, sources, tokenizer, config, progress=progress, needs=NEEDS) as edit:
        with widened(edit.model):
            step, fisher = direction(edit, training_texts), _diagonal(edit, samples, config.seed)
        if damping is None:
            total = sum(float(to_float64(d).sum()) for d in fisher.values())
            damping = DAMPING * total / sum(map(torch.numel, step.values()))
            if not 0 < damping < float("inf"):
                raise TrainingError(
                    f"the Fisher information on the retain texts is {damping}, and nothing was changed: give a damping"
                )
        for name in edit.parameters:
            edit.add(name, step.pop(name).div_(fisher.pop(name).add_(damping)), rate)
        return edit.finish(step_norm=edit.step_norm, damping=damping)


def _diagonal(edit: Editing, samples: int, seed: int) -> dict[str, Tensor]:
    """Return name -> the part of D that belongs to the parameter."""
    tokens, shares, generator = edit.tokens["retain"], edit.shares["retain"], torch.Generator().manual_seed(seed)
    diagonal = {name: torch.zeros_like(p, dtype=wide(p).dtype) for name, p in edit.parameters.items()}

    def visit(name: str, gradient: Tensor) -> None:
        diagonal[name].addcmul_(gradient, gradient, value=1 / (edit.count("retain") * samples))

    edit.progress.begin("Fisher information", len(tokens) * samples)
    with evaluation_mode(edit.model), visited(edit.parameters, visit):
        for _ in range(samples):
            for (i,), batch in edit.lm.batches(tokens, 1):  # one text each: a square of a sum is no sum of squares
                drawn_loss(edit, batch, [shares[i]], generator).backward()  # type: ignore[no-untyped-call]
                edit.progress.advance(1)
    return diagonal
