"""WoodFisher: a step along the inverse of the whole empirical Fisher information, by the Woodbury identity and without a matrix of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyunlearn.edits.base import Editing, EditResult, require_positive, require_retain, wide
from pyunlearn.edits.curvature import norm, widened
from pyunlearn.edits.fisher_information import DAMPING, direction
from pyunlearn.edits.solvers import conjugate_gradients
from pyunlearn.errors import TrainingError
from pyunlearn.models.scoring import batches_on, evaluation_mode
from pyunlearn.probes.gradients import gradient_inner_products, gradient_norms, visited


def woodfisher_step(
    model: Any, forget: Any, *, retain: Any = None, tokenizer: Any = None, rate: float = 0.01, damping: float | None = None,
    training_texts: int | None = None, tolerance: float = 1e-3, max_iterations: int = 50, batch_size: int = 8, truncate: bool = False,
    workspace: int | None = None, seed: int = 0, progress: bool | None = None,
) -> EditResult:  # fmt: skip
    """One step away from the forget texts, shortened along every direction in which a retain text is sensitive.

        theta' = theta + rate (A + damping I)^-1 v,   v as in `fisher_step`
        A = 1/m sum over the m retain texts of g g^T,   g = grad of the text's NLL a token

        (A + damping I)^-1 v = 1/damping (v - G^T (m damping I + G G^T)^-1 G v),   G (m, weights), its rows the g

    The inverse is that which WoodFisher's recursion over the texts forms; the recursion would have to keep m vectors as large as the model. Here the
    system of m equations is solved by conjugate gradients, whose product with G G^T takes the texts' gradients one at a time.

    Args:
        model, forget, retain, tokenizer, rate, training_texts, truncate, workspace, progress: as in `fisher_step`.
        damping: above 0; default 0.1 of the mean of A's eigenvalues that are not 0. Orthogonally to all g the step is v / damping.
        tolerance: of the residual of the m equations, relative to G v.
        max_iterations: of conjugate gradients, each m backward passes of one text and one over all; m + 1 would end exactly.
        batch_size: texts in one pass, where no text's own gradient is needed.
        seed: unused, for nothing is drawn.

    Returns:
        EditResult; `diagnostics`: `step_norm`, ||theta' - theta||_2, `damping`, `iterations`, and `converged`, whether the residual came below the tolerance.

    Raises:
        As `fisher_step`.

    Source: Singh and Alistarh 2020, arXiv 2004.14340, eq. 6; for unlearning, Jia et al. 2023, arXiv 2304.04934, whose code keeps one vector for the m of the
    recursion and so shortens the step along the first retain text alone.
    """
    given = {"training_texts": training_texts, "damping": damping}
    require_positive(
        rate=rate, tolerance=tolerance, max_iterations=max_iterations, **{k: v for k, v in given.items() if v is not None}
    )  # fmt: skip
    sources = {"forget": forget, "retain": retain}
    with Editing("woodfisher_step", model, sources, tokenizer, batch_size=batch_size, truncate=truncate, workspace=workspace, progress=progress) as edit:  # fmt: skip
        m = len(require_retain(edit.tokens, edit.name, "on which the Fisher information is taken"))
        with widened(edit.model):
            v = direction(edit, training_texts)
            if damping is None:
                norms = gradient_norms(edit.model, edit.tokens["retain"], workspace=edit.workspace)
                damping = DAMPING * float((norms**2).sum()) / m**2  # the trace of A, over its rank at most
                if not 0 < damping < float("inf"):
                    raise TrainingError(
                        f"the retain texts' gradients have the mean square {damping}, and nothing was changed: give a damping"
                    )
            edit.progress.begin("products", int(max_iterations))
            found = conjugate_gradients(
                lambda c: [m * damping * c[0] + _inner(edit, _combined(edit, c[0]))], [_inner(edit, v)],
                tolerance=tolerance, max_iterations=int(max_iterations), advance=edit.progress.advance,
            )  # fmt: skip
            spared = _combined(edit, found.x[0])
        for name in edit.parameters:
            v[name] = (v[name] - spared[name]) / damping
            edit.add(name, v[name], rate)
        return edit.done(
            step_norm=rate * norm(list(v.values())), damping=damping, iterations=found.iterations, converged=found.converged
        )  # fmt: skip


def _inner(edit: Editing, vector: dict[str, Tensor]) -> Tensor:
    """G v: (m,) float64."""
    parts = gradient_inner_products(edit.model, edit.tokens["retain"], vector, workspace=edit.workspace)
    return torch.from_numpy(np.sum(list(parts.values()), axis=0))


def _combined(edit: Editing, c: Tensor) -> dict[str, Tensor]:
    """G^T c: by parameter."""
    found = {name: torch.zeros_like(p, dtype=wide(p).dtype) for name, p in edit.parameters.items()}

    def visit(name: str, gradient: Tensor) -> None:
        found[name].add_(gradient)

    with evaluation_mode(edit.model), visited(edit.parameters, visit):
        for places, batch in batches_on(edit.model, edit.tokens["retain"], edit.batch_size):
            mine = c[places].float().to(batch.ids.device)
            edit.likelihood.objective(batch, lambda sums, counts, c: -c * sums / counts, mine).loss.backward()
    return found
