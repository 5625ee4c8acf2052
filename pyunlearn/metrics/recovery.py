"""Recovery: whether a text comes back under any of several attacks, more than unseen text under the same attacks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyunlearn.errors import ArgumentError
from pyunlearn.metrics._check import Floats, as_floats

_LOW = 0.1  # quantile by which the spread below the median is measured, on the side of text that comes back
_NORMAL = 1.2816  # that quantile of a normal law, in standard deviations below the median


class Recovery(NamedTuple):
    """Outcome of recovery."""

    pvalue: Floats
    """(n,) that a text which no model saw stands out as much under its strongest attack; NaN where none was tried."""
    strongest: NDArray[np.int64]
    """(n,) index of the attack under which the text stands out most; -1 where none was tried."""
    compared: NDArray[np.int64]
    """(n,) number of the non-members that the text was compared with; 0 where none was tried."""


def recovery(scores: ArrayLike, non_member_scores: ArrayLike) -> Recovery:
    """Compute one p-value for each text from its scores under several attacks, without a price for their number.

        z_a(x) = (median - score_a(x)) / scale,    T(x) = max over attacks of z_a(x)
        p = (1 + #{j : T(non_member_j) >= T(text)}) / (m + 1)

    Median and scale, the distance from there to the lowest tenth, are those of the m non-members and the text together,
    so that the text and the non-members are treated alike: if they are exchangeable under all attacks at once,
    P(p <= x) <= x, for all laws of the scores and however the attacks depend on each other (full conformal
    inference). A minimum of the attacks' own p-values would have to be multiplied by their number. A text is compared
    with the m non-members on which all its attacks were tried.

    Args:
        scores: (a, n) of n texts under a attacks, low where a text is likely; NaN where an attack was not tried on a
            text, for a reason that does not depend on its scores.
        non_member_scores: (a, m) of m non-members under the same attacks; NaN as in `scores`.

    Returns:
        Recovery(pvalue, strongest, compared).

    Raises:
        ArgumentError: shapes that do not match, Inf, or a text without a non-member on which all its attacks were
            tried.

    Example:
        >>> non_members = np.stack([np.linspace(1, 2, 99), np.linspace(3, 4, 99)])
        >>> recovery([[1.5, 1.5], [3.5, 0.5]], non_members).pvalue.round(2).tolist()
        [0.51, 0.01]

    See Also:
        discoveries: which of the texts stand out, at a false discovery rate.

    Source: ours; full conformal p-values after Vovk et al. 2005, Algorithmic Learning in a Random World.
    """
    s, r = as_floats("scores", scores), as_floats("non_member_scores", non_member_scores)
    if s.ndim != 2 or r.ndim != 2 or not r.shape[1] or len(r) != len(s):
        raise ArgumentError(
            f"recovery needs scores of shape (a, n) and non_member_scores of shape (a, m), got {s.shape} and {r.shape}"
        )
    tried = ~np.isnan(s)
    if np.isinf(s).any() or np.isinf(r).any():
        raise ArgumentError("recovery needs finite scores, or NaN where an attack was not tried, got Inf")
    n = s.shape[1]
    pvalue, strongest, compared = np.full(n, np.nan), np.full(n, -1), np.zeros(n, dtype=np.int64)
    for i in np.flatnonzero(tried.any(axis=0)):
        own = tried[:, i]
        unseen = r[own]  # (attacks tried, non-members)
        unseen = unseen[:, ~np.isnan(unseen).any(axis=0)]
        compared[i] = unseen.shape[1]
        if not compared[i]:
            raise ArgumentError(
                "recovery needs a non-member with a finite score under every attack that was tried on a text, and text "
                f"{i + 1} has none"
            )
        z = _outlyingness(np.column_stack([s[own, i], unseen]))  # (attacks tried, 1 + m)
        statistic = z.max(axis=0)
        pvalue[i] = (statistic >= statistic[0]).mean()  # the text itself is counted
        strongest[i] = np.flatnonzero(own)[z[:, 0].argmax()]
    return Recovery(pvalue, strongest, compared)


def _outlyingness(pool: Floats) -> Floats:
    """Return how far each score lies below the median of its row, (a, m), in robust standard deviations."""
    low, middle = np.quantile(pool, [_LOW, 0.5], axis=1, keepdims=True)
    scale = (middle - low) / _NORMAL
    scale = np.where(scale > 0, scale, pool.std(axis=1, keepdims=True))
    distance: Floats = (middle - pool) / np.where(scale > 0, scale, 1.0)
    return distance
