"""Influence steps of first and second order: towards the weights that training on the corrected data would give."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from pyunlearn.edits.base import COUNT, POSITIVE, Editing, EditResult, require_optional, wide
from pyunlearn.edits.config import EditConfig
from pyunlearn.edits.curvature import Curvature, Vector, largest_eigenvalue, norm, widened
from pyunlearn.edits.solvers import Solution, conjugate_gradients, lissa
from pyunlearn.errors import ArgumentError
from pyunlearn.options import Choice, Number, accepts, require

_DAMPING = 0.01  # times the largest eigenvalue, where none is given
_POWER_ITERATIONS = 8
_DATA = ("retain", "corrected")  # roles of what training on the corrected data would see


@accepts(EditConfig)
def first_order_influence(
    model: Any,
    forget: Any,
    *,
    corrected: Any = None,
    retain: Any = None,
    tokenizer: Any = None,
    rate: float = 1e-3,
    progress: bool | None = None,
    config: EditConfig | str | Path | None = None,
    **settings: Any,
) -> EditResult:
    """Take one gradient step that removes the forget texts, or puts corrected texts in their place.

        G = sum over i of [ grad l(corrected_i) - grad l(forget_i) ],   theta' = theta - rate G

    l is a text's NLL per token; a long text counts once, over all its windows. Without `corrected` its term is left
    out: one step of gradient ascent on the forget set. Nothing is random: `seed` has no effect.

    Args:
        model: a transformers language model, or a path; changed in place. With adapters (PEFT) only these change.
        forget: texts, in the forms that `pyunlearn.unlearn` takes; a text that was trained on twelve times may occur
            twelve times.
        corrected: a replacement for each forget text, in the same order: the text with the secret replaced, for
            example.
        retain: texts that are measured, and enter the diagnostic.
        tokenizer: the model's; None: loaded from where the model came from.
        rate: the source's tau, above 0.
        progress: show a progress bar; None: on a terminal only.
        config: an EditConfig, or a file that holds one; the options below override it.
        {options}

    Returns:
        EditResult. `diagnostics`: `step_norm`, ||theta' - theta||_2 as the weights were written; with retain or
        corrected texts also `gradient_norm_before` and `gradient_norm_after`, || grad of the mean loss over both ||_2:
        0 where training on the corrected data has converged. It is a diagnostic, and no certificate.

    Raises:
        ArgumentError: rate, or another number of corrected texts. DataError, ModelError, TrainingError: as in
            `pyunlearn.unlearn`.

    Source: Warnecke et al. 2023, arXiv 2108.11577, eq. 4 to 6.
    """
    config = EditConfig.of(config, settings, "first_order_influence")
    require(POSITIVE, rate=rate)
    sources = {"forget": forget, "retain": retain, "corrected": corrected}
    with Editing("first_order_influence", model, sources, tokenizer, config, progress=progress) as edit:
        _require_corrected(edit)
        step, before = _difference(edit), _gradient_norm(edit, "before")
        for name, g in zip(edit.parameters, step, strict=True):
            edit.add(name, g, -rate)
        return edit.finish(step_norm=edit.step_norm, **before, **_gradient_norm(edit, "after"))


@accepts(EditConfig)
def second_order_influence(
    model: Any,
    forget: Any,
    *,
    corrected: Any = None,
    retain: Any = None,
    tokenizer: Any = None,
    curvature: str = "gauss-newton",
    solver: str = "cg",
    damping: float | None = None,
    scale: float | None = None,
    training_texts: int | None = None,
    tolerance: float = 1e-3,
    max_iterations: int = 50,
    progress: bool | None = None,
    config: EditConfig | str | Path | None = None,
    **settings: Any,
) -> EditResult:
    """Take one Newton step towards the minimum of the loss on the corrected data.

        theta' = theta - (n (H + damping I))^-1 G,   G as in `first_order_influence`

    H is the curvature of the mean loss over retain and corrected texts, n the number of texts the model was trained on:
    n H is the curvature of the total loss. Nothing is inverted: the system is solved by products with H, each two
    backward passes over these texts. `seed` sets the order of LiSSA's batches and the start of the power iteration.

    Args:
        model, forget, corrected, tokenizer, progress, config: as in `first_order_influence`. 16-bit weights are float32
            during the computation.
        retain: required: a sample of the remaining training data.
        curvature: "gauss-newton", which is never negative, or "hessian", which away from a minimum may be.
        solver: "cg" (conjugate gradients), or "lissa", with one batch of texts for each product.
        damping: added to H, in its unit, 0 or more; default 0.01 times H's largest eigenvalue, estimated by 8 products.
        scale: of LiSSA, above half the largest eigenvalue of H + damping I; default 1.1 times its estimate.
        training_texts: n; default: the number of retain and corrected texts.
        tolerance: of the residual, relative to G.
        max_iterations: of the solver.
        {options}

    Returns:
        EditResult. `diagnostics` as in `first_order_influence`, and `iterations`, `converged` (the residual that the
        solver sees, for LiSSA that of its last batch, is within the tolerance), `relative_residual` (over all texts),
        `damping`, `scale` (None for cg).

    Raises:
        ArgumentError: no retain, or an option out of range. TrainingError: the residual grows or is not finite, or the
            curvature is negative; nothing was changed then. DataError, ModelError: as in `pyunlearn.unlearn`.

    Source: Warnecke et al. 2023, arXiv 2108.11577, eq. 7 to 9; the Gauss-Newton product after Schraudolph 2002.
    """
    config = EditConfig.of(config, settings, "second_order_influence")
    require(Choice(("gauss-newton", "hessian")), curvature=curvature)
    require(Choice(("cg", "lissa")), solver=solver)
    require(POSITIVE, tolerance=tolerance)
    require(COUNT, max_iterations=max_iterations)
    require_optional(POSITIVE, scale=scale)
    require_optional(Number(0), damping=damping)
    require_optional(COUNT, training_texts=training_texts)
    sources, needs = {"forget": forget, "retain": retain, "corrected": corrected}, {"retain": "for the curvature"}
    with Editing("second_order_influence", model, sources, tokenizer, config, progress=progress, needs=needs) as edit:
        _require_corrected(edit)
        n = training_texts or edit.count(*_DATA)
        with widened(edit.model):
            step, before = _difference(edit), _gradient_norm(edit, "before")
            h = Curvature(edit, _DATA, curvature)
            h.damping, scale = _damping_and_scale(h, damping, scale, solver)
            edit.progress.begin(f"products ({solver})", max_iterations)
            solution = _solve(h, step, solver, scale or 1.0, tolerance, max_iterations)
            residual = norm([g - a for g, a in zip(step, h(solution.x), strict=True)]) / max(norm(step), 1e-300)
        for name, x in zip(edit.parameters, solution.x, strict=True):
            edit.add(name, x, -1 / n)
        return edit.finish(
            step_norm=edit.step_norm,
            iterations=solution.iterations,
            converged=solution.converged,
            relative_residual=residual,
            damping=h.damping,
            scale=scale if solver == "lissa" else None,
            **before,
            **_gradient_norm(edit, "after"),
        )


def _damping_and_scale(
    h: Curvature, damping: float | None, scale: float | None, solver: str
) -> tuple[float, float | None]:
    """Return both with their defaults, for which the largest eigenvalue is estimated; scale is for LiSSA alone."""
    if damping is None or (solver == "lissa" and scale is None):
        h.edit.progress.begin("largest eigenvalue", _POWER_ITERATIONS)
        largest = largest_eigenvalue(h, iterations=_POWER_ITERATIONS, seed=h.edit.config.seed)
        damping = _DAMPING * largest if damping is None else damping
        scale = 1.1 * (largest + damping) if scale is None else scale
    return damping, scale


def _solve(h: Curvature, b: Vector, solver: str, scale: float, tolerance: float, max_iterations: int) -> Solution:
    """Solve (H + damping I) x = b by the named solver."""
    advance = h.edit.progress.advance
    if solver == "cg":
        return conjugate_gradients(h, b, tolerance=tolerance, max_iterations=max_iterations, advance=advance)
    parts, order = h.parts(), random.Random(h.edit.config.seed)
    drawn = [i for _ in range(-(-max_iterations // len(parts))) for i in order.sample(range(len(parts)), len(parts))]

    def product(u: Vector, step: int) -> Vector:
        return h.of_part(parts[drawn[step]], u)

    return lissa(product, b, scale=scale, tolerance=tolerance, max_iterations=max_iterations, advance=advance)


def _require_corrected(edit: Editing) -> None:
    """Raise ArgumentError unless each forget record has its corrected text, or none has."""
    wanted, count = edit.count("forget"), edit.count("corrected")
    if count not in (0, wanted):
        raise ArgumentError(
            f"corrected must have a text for each of the {wanted} forget records, in their order, got {count}"
        )


def _difference(edit: Editing) -> Vector:
    """Return G: the sum of the corrected texts' gradients, minus the sum of the forget texts' gradients."""
    total = [g.neg_() for g in _summed(edit, "forget")]
    if "corrected" in edit.tokens:
        for t, g in zip(total, _summed(edit, "corrected"), strict=True):
            t.add_(g)
    return total


def _summed(edit: Editing, *roles: str) -> Vector:
    """Return the sum over records of the gradient of the NLL per token, a tensor for each parameter."""
    mean, count = edit.gradient(*roles), edit.count(*roles)
    return [mean.pop(name).mul_(count).to(wide(p).dtype) for name, p in edit.parameters.items()]


def _gradient_norm(edit: Editing, when: str) -> dict[str, float]:
    """Return the diagnostic gradient_norm_before or gradient_norm_after; nothing where there is no other data."""
    count = edit.count(*_DATA)
    if not count:
        return {}
    return {f"gradient_norm_{when}": norm([g.div_(count) for g in _summed(edit, *_DATA)])}
