"""WoodFisher step: one step along the inverse of the whole empirical Fisher information, by the Woodbury identity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyunlearn.edits.base import COUNT, POSITIVE, Editing, EditResult, require_optional, wide
from pyunlearn.edits.config import EditConfig
from pyunlearn.edits.curvature import widened
from pyunlearn.edits.fisher_information import DAMPING, NEEDS, direction
from pyunlearn.edits.solvers import conjugate_gradients
from pyunlearn.errors import TrainingError
from pyunlearn.models.scoring import evaluation_mode
from pyunlearn.options import accepts, require
from pyunlearn.probes.gradients import gradient_inner_products, gradient_norms, visited


@accepts(EditConfig)
def woodfisher_step(
    model: Any,
    forget: Any,
    *,
    retain: Any = None,
    tokenizer: Any = None,
    rate: float = 0.01,
    damping: float | None = None,
    training_texts: int | None = None,
    tolerance: float = 1e-3,
    max_iterations: int = 50,
    progress: bool | None = None,
    config: EditConfig | str | Path | None = None,
    **settings: Any,
) -> EditResult:
    """Take one step away from the forget texts, shorter along the directions to which a retain text is sensitive.

        theta' = theta + rate (A + damping I)^-1 v,   v as in `fisher_step`
        A = 1/m sum over the m retain texts of g g^T,   g = grad of the text's NLL per token

        (A + damping I)^-1 v = 1/damping (v - G^T (m damping I + G G^T)^-1 G v),   G (m, weights) with rows g

    The inverse is the one that WoodFisher's recursion over the texts forms; the recursion would have to store m vectors
    of the size of the model. Here the system of m equations is solved by conjugate gradients, whose product with G G^T
    computes the texts' gradients one at a time. `batch_size` is for passes that need no gradient of a single text.
    Of a long text, each window is a row of G, times the root of its share of the text's tokens. Nothing is random:
    `seed` has no effect.

    Args:
        model, forget, retain, tokenizer, rate, training_texts, progress, config: as in `fisher_step`.
        damping: above 0; default 0.1 times the mean of A's eigenvalues that are not 0. Orthogonally to all g the step
            is v / damping.
        tolerance: of the residual of the m equations, relative to G v.
        max_iterations: of conjugate gradients, each m backward passes of one text and one over all; m + 1 iterations
            would end exactly. In addition two over all, m of one text, and m more for the default damping.
        {options}

    Returns:
        EditResult. `diagnostics`: `step_norm`, ||theta' - theta||_2 as the weights were written, `damping`,
        `iterations`, and `converged`, which says that the residual came below the tolerance.

    Raises:
        The errors of `fisher_step`.

    Source: Singh and Alistarh 2020, arXiv 2004.14340, eq. 6; for unlearning, Jia et al. 2023, arXiv 2304.04934, whose
    code stores one vector for the m of the recursion, and so shortens the step along the first retain text alone.
    """
    config = EditConfig.of(config, settings, "woodfisher_step")
    require(POSITIVE, rate=rate, tolerance=tolerance)
    require(COUNT, max_iterations=max_iterations)
    require_optional(POSITIVE, damping=damping)
    require_optional(COUNT, training_texts=training_texts)
    sources = {"forget": forget, "retain": retain}
    with Editing("woodfisher_step", model, sources, tokenizer, config, progress=progress, needs=NEEDS) as edit:
        with widened(edit.model):
            v = direction(edit, training_texts)
            damping = _default_damping(edit) if damping is None else damping
            spared, iterations, converged = _spared(edit, v, damping, tolerance, max_iterations)
        for name in edit.parameters:
            edit.add(name, v.pop(name).sub_(spared.pop(name)).div_(damping), rate)
        return edit.finish(step_norm=edit.step_norm, damping=damping, iterations=iterations, converged=converged)


def _default_damping(edit: Editing) -> float:
    """Return 0.1 times the trace of A over m, the largest rank that A can have without long texts."""
    edit.progress.say("norms of the gradients")
    norms = gradient_norms(edit.model, edit.tokens["retain"], workspace=edit.config.workspace)  # (texts,)
    damping = DAMPING * float((np.array(edit.shares["retain"]) * norms**2).sum()) / edit.count("retain") ** 2
    if not 0 < damping < float("inf"):
        raise TrainingError(
            f"the retain texts' gradients have the mean square {damping}, and nothing was changed: give a damping"
        )
    return damping


def _spared(
    edit: Editing, v: dict[str, Tensor], damping: float, tolerance: float, max_iterations: int
) -> tuple[dict[str, Tensor], int, bool]:
    """Return (G^T (m damping I + G G^T)^-1 G v as name -> tensor, iterations, whether they converged)."""
    m = edit.count("retain")
    edit.progress.begin("products", max_iterations + 2)
    right = _inner(edit, v)
    edit.progress.advance(1)
    solution = conjugate_gradients(
        lambda c: [m * damping * c[0] + _inner(edit, _combined(edit, c[0]))],
        [right],
        tolerance=tolerance,
        max_iterations=max_iterations,
        advance=edit.progress.advance,
    )
    spared = _combined(edit, solution.x[0])
    edit.progress.advance(1)
    return spared, solution.iterations, solution.converged


def _inner(edit: Editing, vector: dict[str, Tensor]) -> Tensor:
    """Return the inner products of the rows of G with a vector v: (texts,) float64."""
    groups = gradient_inner_products(edit.model, edit.tokens["retain"], vector, workspace=edit.config.workspace)
    return torch.from_numpy(np.sqrt(edit.shares["retain"]) * np.sum(list(groups.values()), axis=0))


def _combined(edit: Editing, c: Tensor) -> dict[str, Tensor]:
    """Return G^T c as a dict, parameter name -> tensor."""
    c = c * torch.tensor(edit.shares["retain"], dtype=c.dtype).sqrt()
    total = {name: torch.zeros_like(p, dtype=wide(p).dtype) for name, p in edit.parameters.items()}

    def visit(name: str, gradient: Tensor) -> None:
        total[name].add_(gradient)

    with evaluation_mode(edit.model), visited(edit.parameters, visit):
        for indices, batch in edit.batches(edit.tokens["retain"]):
            weights = c[indices].float().to(batch.ids.device)
            edit.lm.likelihood.objective(batch, lambda sums, counts, c: -c * sums / counts, weights).loss.backward()
    return total
