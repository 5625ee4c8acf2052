"""Top tests of several comparisons of the same texts, which share one level: one p-value for each, adjusted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyunlearn.metrics._check import Floats
from pyunlearn.metrics.exposure_tests import WEIGHTS, tail

_AT_ONCE = 2**22  # numbers in memory at a time
_FEWEST_DRAWS, _MOST_DRAWS = 2_000, 20_000
_NUMBERS = 1_000_000  # drawn in between: at 5 % a p-value must hardly depend on the seed
_TIE = 1e-9  # below the difference of any two p-values that matter


class Comparison(NamedTuple):
    """One way in which texts are compared with non-members."""

    scores: Floats
    """(n + m,) of the texts, then of the non-members; low = stands out."""
    size: Floats
    """(n + m,) how far each lies out: of two sets of texts that stand out alike, that with the larger one does more."""
    texts: int
    """How many of the n texts are compared, the first ones: the others count on neither side."""


def joint_top_tests(comparisons: Sequence[Comparison], n: int, *, seed: int = 0) -> Floats:
    """Compute the p-values of several top tests: for at most 5 % of sets of unseen texts any of them is 5 % or less.

    The statistic of a comparison is that of `exposure_top_test`, the smallest P(K_j >= k_j) with its factor. If the n
    texts and m non-members are exchangeable, any n of the n + m could have been the texts; p is the share of such
    choices, drawn at random, for which the smallest statistic of all comparisons is as small as this one's. So the
    comparisons pay only for what they do not have in common. A single text has a p-value of 1/20 among 19 non-members
    where it lies farther out in one of them, by `size`, than each non-member does in any.

    Args:
        comparisons: one or more.
        n: texts.
        seed: of the choices. One text's are not drawn: all n + m are tried.

    Returns:
        (comparisons,) p-values.

    Source: Westfall and Young 1993, Resampling-Based Multiple Testing, ISBN 978-0-471-55761-6, single-step min-p.

    >>> scores = np.array([-99.0, *range(19)])
    >>> joint_top_tests([Comparison(scores, -scores, 1), Comparison(-scores, scores, 1)], 1).tolist()
    [0.05, 1.0]
    """
    total = len(comparisons[0].scores)
    prepared = [_Statistic(c, total - n) for c in comparisons]
    own: list[Floats] = []
    null = []
    for chosen in _choices(n, total, seed):
        statistics = np.stack([statistic(chosen) for statistic in prepared])
        own = own or list(statistics[:, 0])
        null.append(statistics.min(axis=0))
    return np.array([float(np.mean(np.concatenate(null) <= statistic)) for statistic in own])


def _choices(n: int, total: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yield (draws, n) choices of n of the numbers below `total`, in random order, first of all 0 to n - 1."""
    yield np.arange(n)[None]
    if n == 1:
        yield np.arange(1, total)[:, None]
        return
    rng, draws = np.random.default_rng(seed), min(_MOST_DRAWS, max(_FEWEST_DRAWS, _NUMBERS // total))
    for start in range(0, draws, step := max(1, _AT_ONCE // total)):
        yield np.argsort(rng.random((min(step, draws - start), total)), axis=1)[:, :n]


class _Statistic:
    """The statistic of a comparison, low = stands out, for any choice of the texts."""

    def __init__(self, comparison: Comparison, m: int) -> None:
        scores, self.size, self.texts = comparison
        self.reached = np.searchsorted(np.sort(scores), scores, side="right")
        """(n + m,) how many have a score as low, or lower."""
        self.tails = {j: factor * tail(j, self.texts, m, True) for j, factor in WEIGHTS.items() if j <= m}

    def __call__(self, chosen: NDArray[np.int64]) -> Floats:
        """Compute the statistics of (draws, n) choices."""
        non_members, n = self.reached[chosen], chosen.shape[1]
        order = np.argsort(non_members, axis=1)
        non_members = np.take_along_axis(non_members, order, axis=1)
        ends = np.where(np.diff(non_members, append=len(self.size) + 1) > 0, np.arange(1, n + 1), n)
        texts = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]  # chosen ones with a score as low, or lower
        non_members = np.where(order < self.texts, non_members - texts, len(self.size))
        smallest = np.ones(len(chosen))
        for j, chance in self.tails.items():
            np.minimum(smallest, chance[(non_members < j).sum(axis=1)], out=smallest)
        farthest: Floats = self.size[chosen[:, : self.texts]].max(axis=1)
        return smallest - _TIE * farthest
