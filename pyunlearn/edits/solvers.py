"""Matrix-free solvers of linear systems: conjugate gradients and LiSSA, with a check for divergence."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import NamedTuple

from pyunlearn.edits.curvature import Vector, dot, norm
from pyunlearn.errors import TrainingError

_GROWTH = 10.0  # times the smallest residual: the solver diverges


class Solution(NamedTuple):
    """The solution `x`, the number of products it took, and True where the residual came below the tolerance."""

    x: Vector
    iterations: int
    converged: bool


def conjugate_gradients(
    product: Callable[[Vector], Vector],
    b: Vector,
    *,
    tolerance: float,
    max_iterations: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Solution:
    """Solve A x = b for a positive A, with the stopping rule ||b - A x|| <= tolerance ||b||.

    Raises TrainingError where A is not positive along a direction, or the residual is not finite or ten times as large
    as its smallest value.

    Source: Hestenes and Stiefel 1952.

    >>> import torch
    >>> a = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    >>> solution = conjugate_gradients(lambda v: [a @ v[0]], [a @ torch.ones(2)], tolerance=1e-6, max_iterations=5)
    >>> [round(float(x), 4) for x in solution.x[0]], solution.converged
    ([1.0, 1.0], True)
    """
    x, r = [0 * v for v in b], [v.clone() for v in b]
    p, square = [v.clone() for v in r], dot(r, r)
    goal, least = tolerance**2 * square, square
    for iteration in range(max_iterations):
        if square <= goal:
            return Solution(x, iteration, True)
        ap = product(p)
        curvature = dot(p, ap)
        if isfinite(curvature) and curvature <= 0:
            raise TrainingError(
                f"conjugate gradients met negative curvature ({curvature / dot(p, p):.2g}) in step {iteration + 1}: "
                'take curvature="gauss-newton", or a damping above that'
            )
        step = square / curvature
        for xi, ri, pi, api in zip(x, r, p, ap, strict=True):
            xi.add_(pi, alpha=step)
            ri.add_(api, alpha=-step)
        after = dot(r, r)
        _require_convergence(after**0.5, least**0.5, "conjugate gradients", iteration)
        p = [ri + (after / square) * pi for ri, pi in zip(r, p, strict=True)]
        square, least = after, min(least, after)
        advance(1)
    return Solution(x, max_iterations, square <= goal)


def lissa(
    product: Callable[[Vector, int], Vector],
    b: Vector,
    *,
    scale: float,
    tolerance: float,
    max_iterations: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Solution:
    """Solve A x = b by u <- u + (b - A u / scale) from u = b, and x = u / scale; step j may use the A of one batch.

    It converges where every eigenvalue of A / scale lies between 0 and 2, the faster the nearer to 1. The residual
    b - A u / scale is the step itself; with one batch per step it stays about as large as the batches differ.

    Raises TrainingError where the residual is not finite or ten times as large as its smallest value.

    Source: Agarwal et al. 2017, arXiv 1602.03943; as in arXiv 2108.11577, whose damping is in A here.

    >>> import torch
    >>> solution = lissa(lambda u, j: [2 * v for v in u], [torch.ones(1)], scale=3.0, tolerance=1e-6, max_iterations=99)
    >>> round(float(solution.x[0]), 4), solution.converged
    (0.5, True)
    """
    u, least, residual, goal = [v.clone() for v in b], norm(b), norm(b), tolerance * norm(b)
    for iteration in range(max_iterations):
        if residual <= goal:
            return Solution([v / scale for v in u], iteration, True)
        au = product(u, iteration)
        step = [v - a / scale for v, a in zip(b, au, strict=True)]
        residual = norm(step)
        _require_convergence(residual, least, "LiSSA", iteration)
        for ui, si in zip(u, step, strict=True):
            ui.add_(si)
        least = min(least, residual)
        advance(1)
    return Solution([v / scale for v in u], max_iterations, residual <= goal)


def _require_convergence(residual: float, least: float, solver: str, iteration: int) -> None:
    """Raise TrainingError for a residual that is not finite or has grown tenfold."""
    if not isfinite(residual) or residual > _GROWTH * least:
        state = f"grew to {residual / least:.3g} times its smallest" if isfinite(residual) else "is not finite"
        raise TrainingError(
            f"{solver} does not converge: the residual {state} in step {iteration + 1}, and nothing was changed; "
            "take a larger damping or scale"
        )
