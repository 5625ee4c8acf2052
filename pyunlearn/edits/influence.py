"""Influence: the weights that training on the corrected data would have led to, to first and to second order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pyunlearn.data import Tokens
from pyunlearn.edits.base import Editing, EditResult, require_positive, require_retain, wide
from pyunlearn.edits.curvature import Curvature, Vector, largest_eigenvalue, norm, widened
from pyunlearn.edits.solvers import Solution, conjugate_gradients, lissa
from pyunlearn.errors import ArgumentError
from pyunlearn.probes.gradients import mean_gradient

_DAMPING = 0.01  # of the largest eigenvalue, where none is given


def first_order_influence(
    model: Any, forget: Any, *, corrected: Any = None, retain: Any = None, tokenizer: Any = None, rate: float = 1e-3, batch_size: int = 8,
    truncate: bool = False, workspace: int | None = None, seed: int = 0, progress: bool | None = None,
) -> EditResult:  # fmt: skip
    """One gradient step that takes the forget texts out, or puts corrected ones in their place.

        G = sum over i of [ grad l(corrected_i) - grad l(forget_i) ],   theta' = theta - rate G

    l is a text's NLL a token. Without `corrected` its term falls away: one step of gradient ascent on the forget set.

    Args:
        model: a transformers language model, or a path; changed in place. With adapters (PEFT) only what trains.
        forget: texts, in the forms that `pyunlearn.unlearn` takes; one that was trained on twelve times may be given twelve times.
        corrected: for each forget text what should have stood there, in the same order: the secret replaced, say.
        retain: texts that are measured, and enter the diagnostic.
        tokenizer, truncate, workspace: as in `pyunlearn.unlearn`.
        rate: the source's tau, above 0.
        batch_size: texts in one pass.
        seed: unused, for nothing is drawn.
        progress: as in `pyunlearn.unlearn`.

    Returns:
        EditResult; `diagnostics`: `step_norm`, ||theta' - theta||_2; with retain or corrected texts also `gradient_norm_before` and `gradient_norm_after`, || grad of
        the mean loss over both ||_2: 0 where training on the corrected data has converged. A diagnostic: no certificate follows.

    Raises:
        ArgumentError: rate, or another number of corrected texts. DataError, ModelError, TrainingError: as in `pyunlearn.unlearn`.

    Source: Warnecke et al. 2023, arXiv 2108.11577, eq. 4 to 6.
    """
    require_positive(rate=rate)
    sources = {"forget": forget, "retain": retain, "corrected": corrected}
    with Editing("first_order_influence", model, sources, tokenizer, batch_size=batch_size, truncate=truncate, workspace=workspace, progress=progress) as edit:  # fmt: skip
        data, step = _corrected_data(edit), _difference(edit)
        before = _gradient_norm(edit, data)
        for (name, _), g in zip(edit.parameters.items(), step, strict=True):
            edit.add(name, g, -rate)
        return edit.done(step_norm=rate * norm(step), **before, **_gradient_norm(edit, data, "after"))


def second_order_influence(
    model: Any, forget: Any, *, corrected: Any = None, retain: Any = None, tokenizer: Any = None, curvature: str = "gauss-newton",
    solver: str = "cg", damping: float | None = None, scale: float | None = None, training_texts: int | None = None, tolerance: float = 1e-3,
    max_iterations: int = 50, batch_size: int = 8, truncate: bool = False, workspace: int | None = None, seed: int = 0,
    progress: bool | None = None,
) -> EditResult:  # fmt: skip
    """One Newton step towards the minimum that the corrected data have.

        theta' = theta - (n (H + damping I))^-1 G,   G as in `first_order_influence`

    H is the curvature of the mean loss over retain and corrected texts, and n the number of texts the model was trained on: n H is that of
    the total loss. Nothing is inverted: the system is solved by products with H, each two backward passes over these texts.

    Args:
        model, forget, corrected, tokenizer, batch_size, truncate, workspace, progress: as in `first_order_influence`. 16-bit weights stand in float32
            while it lasts.
        retain: needed: a sample of the remaining training data.
        curvature: "gauss-newton", which is never negative, or "hessian", which away from a minimum may be.
        solver: "cg" (conjugate gradients), or "lissa", with one batch of texts for each product.
        damping: added to H, in its unit, 0 or more; default 0.01 of H's largest eigenvalue, found by 8 products.
        scale: of LiSSA, above half the largest eigenvalue of H + damping I; default 1.1 times the one found.
        training_texts: n; default: as many as retain and corrected have.
        tolerance: of the residual, relative to G.
        max_iterations: of the solver.
        seed: of the order of LiSSA's batches and of the power iteration.

    Returns:
        EditResult; `diagnostics` as in `first_order_influence`, and `iterations`, `converged` (the solver's own residual, for LiSSA that of its last batch, is within the
        tolerance), `relative_residual` (over all texts), `damping`, `scale` (None for cg).

    Raises:
        ArgumentError: no retain, an unknown curvature or solver, a number out of range. TrainingError: the residual grows or is not finite, or the curvature is negative;
            nothing was changed then. DataError, ModelError: as in `pyunlearn.unlearn`.

    Source: Warnecke et al. 2023, arXiv 2108.11577, eq. 7 to 9; the Gauss-Newton product after Schraudolph 2002.
    """
    for name, value, known in (
        ("curvature", curvature, ("gauss-newton", "hessian")),
        ("solver", solver, ("cg", "lissa")),
    ):
        if value not in known:
            raise ArgumentError(f'{name} must be "{known[0]}" or "{known[1]}", got {value!r}')
    given = {"scale": scale, "training_texts": training_texts, "damping": damping or None}
    require_positive(
        tolerance=tolerance, max_iterations=max_iterations, **{k: v for k, v in given.items() if v is not None}
    )
    sources = {"forget": forget, "retain": retain, "corrected": corrected}
    with Editing("second_order_influence", model, sources, tokenizer, batch_size=batch_size, truncate=truncate, workspace=workspace, progress=progress) as edit:  # fmt: skip
        require_retain(edit.tokens, edit.name, "on which the curvature is taken")
        data = _corrected_data(edit)
        n = training_texts or len(data)
        with widened(edit.model):
            step, before = _difference(edit), _gradient_norm(edit, data)
            h = Curvature(edit, data, curvature)
            if damping is None or (solver == "lissa" and scale is None):
                edit.progress.begin("largest eigenvalue", 8)
                largest = largest_eigenvalue(h, seed=seed)
                damping = _DAMPING * largest if damping is None else damping
                scale = 1.1 * (largest + damping) if scale is None else scale
            h.damping = damping
            edit.progress.begin(f"products ({solver})", max_iterations)
            found = _solve(edit, h, step, solver, scale or 1.0, tolerance, max_iterations, seed)
            left = norm([g - a for g, a in zip(step, h(found.x), strict=True)]) / max(norm(step), 1e-300)
        for (name, _), x in zip(edit.parameters.items(), found.x, strict=True):
            edit.add(name, x, -1 / n)
        return edit.done(
            step_norm=norm(found.x) / n, iterations=found.iterations, converged=found.converged, relative_residual=left, damping=damping,
            scale=scale if solver == "lissa" else None, **before, **_gradient_norm(edit, data, "after"),
        )  # fmt: skip


def _solve(
    edit: Editing, h: Curvature, b: Vector, solver: str, scale: float, tolerance: float, max_iterations: int, seed: int
) -> Solution:
    if solver == "cg":
        return conjugate_gradients(
            h, b, tolerance=tolerance, max_iterations=max_iterations, advance=edit.progress.advance
        )
    parts, order = h.parts(), random.Random(seed)
    drawn = [i for _ in range(-(-max_iterations // len(parts))) for i in order.sample(range(len(parts)), len(parts))]
    return lissa(
        lambda u, j: h.of_part(parts[drawn[j]], u), b, scale=scale, tolerance=tolerance, max_iterations=max_iterations, advance=edit.progress.advance
    )  # fmt: skip


def _corrected_data(edit: Editing) -> list[Tokens]:
    """The texts that remain, those corrected among them. Raises ArgumentError unless each forget text has its own."""
    wanted, got = len(edit.tokens["forget"]), len(edit.tokens.get("corrected", ()))
    if got not in (0, wanted):
        raise ArgumentError(
            f"corrected must have a text for each of the {wanted} forget texts, in their order, got {got}"
        )
    return [*edit.tokens.get("retain", ()), *edit.tokens.get("corrected", ())]


def _difference(edit: Editing) -> Vector:
    """G: the sum of the corrected texts' gradients, less the sum of the forget texts'."""
    total = [-g for g in _summed(edit, edit.tokens["forget"])]
    if "corrected" in edit.tokens:
        for t, g in zip(total, _summed(edit, edit.tokens["corrected"]), strict=True):
            t.add_(g)
    return total


def _summed(edit: Editing, tokens: Sequence[Tokens]) -> Vector:
    found: dict[str, Tensor] = mean_gradient(edit.model, tokens, batch_size=edit.batch_size, workspace=edit.workspace)
    return [(found[name] * len(tokens)).to(wide(p).dtype) for name, p in edit.parameters.items()]


def _gradient_norm(edit: Editing, data: Sequence[Tokens], when: str = "before") -> dict[str, float]:
    if not data:
        return {}
    return {f"gradient_norm_{when}": norm([g / len(data) for g in _summed(edit, data)])}
