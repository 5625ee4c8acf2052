"""A step along the inverse of the Fisher information's diagonal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyunlearn.edits.base import Editing, EditResult, require_positive, require_retain, wide
from pyunlearn.edits.curvature import norm, widened
from pyunlearn.edits.fisher_information import DAMPING, direction, drawn_loss
from pyunlearn.errors import TrainingError
from pyunlearn.models.scoring import batches_on, evaluation_mode
from pyunlearn.probes.gradients import visited


def fisher_step(
    model: Any, forget: Any, *, retain: Any = None, tokenizer: Any = None, rate: float = 0.01, damping: float | None = None,
    training_texts: int | None = None, samples: int = 1, batch_size: int = 8, truncate: bool = False, workspace: int | None = None,
    seed: int = 0, progress: bool | None = None,
) -> EditResult:  # fmt: skip
    """One step away from the forget texts, each weight as far as the retain texts can spare it.

        theta' = theta + rate (D + damping)^-1 v,   v = |F| / n (mean over F of grad l - mean over R of grad l)
        D_i = mean over R of T (d l~ / d theta_i)^2     l~: NLL a token of labels drawn from the model, T: tokens of the text

    D is the diagonal of the true Fisher information, that is of the Gauss-Newton matrix, and not of the "empirical" one that the texts' own
    labels would give.

    Args:
        model: a transformers language model, or a path; changed in place. With adapters (PEFT) only what trains. 16-bit weights stand in float32 while it
            lasts.
        forget, retain: texts, in the forms that `pyunlearn.unlearn` takes; retain is needed: a sample of the remaining training data.
        tokenizer, truncate, workspace: as in `pyunlearn.unlearn`.
        rate: above 0; 1 is the whole step, which is Newton's where the loss is quadratic and far too long where it is not: search upwards.
        damping: added to D, in its unit, above 0; default 0.1 of D's mean.
        training_texts: n, the texts that the model was trained on; default: as many as forget and retain have.
        samples: drawings of labels for each retain text.
        batch_size: texts in one pass for v; D takes one text in each.
        seed: of the labels drawn.
        progress: as in `pyunlearn.unlearn`.

    Returns:
        EditResult; `diagnostics`: `step_norm`, ||theta' - theta||_2, and `damping`.

    Raises:
        ArgumentError: no retain, or a number out of range. TrainingError: D is 0 or not finite, and no damping is given. DataError, ModelError: as in
            `pyunlearn.unlearn`. The weights are then what they were.

    Source: Jia et al. 2023, arXiv 2304.04934, influence unlearning; the true Fisher information after Kunstner et al. 2019, arXiv 1905.12558.
    """
    given = {"training_texts": training_texts, "damping": damping}
    require_positive(rate=rate, samples=samples, **{k: v for k, v in given.items() if v is not None})
    sources = {"forget": forget, "retain": retain}
    with Editing("fisher_step", model, sources, tokenizer, batch_size=batch_size, truncate=truncate, workspace=workspace, progress=progress) as edit:  # fmt: skip
        require_retain(edit.tokens, edit.name, "on which the Fisher information is taken")
        with widened(edit.model):
            step, fisher = direction(edit, training_texts), _diagonal(edit, int(samples), seed)
        if damping is None:
            damping = (
                DAMPING * sum(float(d.double().sum()) for d in fisher.values()) / sum(map(torch.numel, step.values()))
            )
            if not 0 < damping < float("inf"):
                raise TrainingError(
                    f"the Fisher information on the retain texts is {damping}, and nothing was changed: give a damping"
                )
        for name in edit.parameters:
            step[name] /= fisher.pop(name) + damping
            edit.add(name, step[name], rate)
        return edit.done(step_norm=rate * norm(list(step.values())), damping=damping)


def _diagonal(edit: Editing, samples: int, seed: int) -> dict[str, Tensor]:
    tokens, generator = edit.tokens["retain"], torch.Generator().manual_seed(seed)
    found = {name: torch.zeros_like(p, dtype=wide(p).dtype) for name, p in edit.parameters.items()}

    def visit(name: str, gradient: Tensor) -> None:
        found[name].addcmul_(gradient, gradient, value=1 / (len(tokens) * samples))

    edit.progress.begin("Fisher information", len(tokens) * samples)
    with evaluation_mode(edit.model), visited(edit.parameters, visit):
        for _ in range(samples):
            for _, batch in batches_on(edit.model, tokens, 1):  # one text each: squares of sums are no sums of squares
                drawn_loss(edit, batch, generator).backward()  # type: ignore[no-untyped-call]
                edit.progress.advance(1)
    return found
