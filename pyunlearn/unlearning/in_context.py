"""Exact unlearning without touching a weight: the examples in the prompt, chosen so that a deletion can be certified (ERASE).

A model that is adapted by examples in its prompt has "trained" on the choice of those examples alone. They are chosen by quantized k-means: of each cluster the example
nearest to its centroid. A deletion almost never moves a quantized centroid; that it did not is checked from sums kept for each iteration, at a cost that does not depend on
the number of examples, and then nothing else can have changed.

Sources: ERASE, Muresanu et al. 2024, arXiv 2402.00751, algorithm 1; quantized k-means, Ginart et al. 2019, arXiv 1907.05012.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import inf
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyunlearn.errors import ArgumentError

__all__ = ["Deletion", "InContextSelection", "break_even_inferences", "holistic_cost", "retrain_bound"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_UNIT = (
    2.0**-36
)  # embeddings are kept as multiples of it, so that a sum less one example is, to the last bit, the sum without it
_LARGEST = 2.0**26  # of the number of examples times the largest coordinate: their sums fit 64 bits


class Deletion(NamedTuple):
    """What a deletion took."""

    reclustered: bool
    """The clustering had to be made anew, at the cost of the first; else the cost did not depend on the number of examples."""
    reason: str | None
    """seed: the example was one that the clustering began from. centroid: a quantized centroid moved. None: neither."""


class InContextSelection:
    """k examples for a prompt, and exact deletion: after `delete`, all is as if the example had never been there.

        Q_t(m) = epsilon (round(m / epsilon + u_t - 1/2) - (u_t - 1/2)),   u_t uniform on [0, 1)^d, drawn anew in each iteration

    Each iteration takes the mean of each cluster and quantizes it. A cluster of fewer than M = gamma n / k examples is drawn towards its previous
    quantized centroid p first: (c / M) mean + (1 - c / M) p for c examples, so that no small cluster makes one example weigh much.

    Exact, not approximately so: the seeds (k-means++) are chosen by a race of exponential variables, one for each example's id and draw, which a
    loser's absence leaves as it was; phases depend on nothing; sums are integers; and the number of iterations is fixed, for to stop by the loss would
    be a decision that a deletion can change. What stays open is only what the embeddings themselves know: make them with a model, and a reduction of
    their dimension, that was not fitted to these examples.

    How likely a deletion is to recluster, over the seed: at most the chance that it began a cluster, k / n on average over the examples, plus the sum over iterations, clusters and
    dimensions of |shift of the mean| / epsilon (`retrain_bound` for the worst case), for a cell of width epsilon with a uniform phase parts two points that
    far apart with that probability. So few dimensions and a coarse epsilon make deletions cheap.

    Args:
        embeddings: (n, d), one row for each example, on a common scale; kept in steps of 2^-36.
        k: examples in the prompt, 1 to n. Fewer are chosen where a cluster ends empty.
        epsilon: width of the quantization's cells, above 0, in the unit of the embeddings. Wide: cheap deletions, coarser clusters.
        gamma: clusters below this share of the mean size n / k are drawn towards where they were, 0 to 1.
        iterations: of k-means, 1 or more.
        seed: of everything random.
        ids: (n,) a whole number, 0 or more, for each example that stays its own; default 0 to n - 1. Equal embeddings, seed and ids give equal choices.

    Raises:
        ArgumentError: shapes that do not fit, values that are not finite or too large, an option out of range, an id that occurs twice.
    """

    def __init__(
        self, embeddings: ArrayLike, k: int, *, epsilon: float, gamma: float = 0.2, iterations: int = 10, seed: int = 0, ids: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        x = np.asarray(embeddings, dtype=np.float64)
        if x.ndim != 2 or 0 in x.shape or not np.isfinite(x).all():
            raise ArgumentError(f"embeddings must be (n, d), with finite values, got shape {x.shape}")
        if np.abs(x).max() * len(x) > _LARGEST:
            raise ArgumentError(
                f"embeddings times their number must stay below {_LARGEST:.0f}, and reach {np.abs(x).max() * len(x):.3g}: scale them down"
            )
        for name, number, most in (("k", k, len(x)), ("iterations", iterations, inf)):
            if not isinstance(number, (int, np.integer)) or not 1 <= number <= most:
                raise ArgumentError(f"{name} must be a whole number from 1 to {most}, got {number!r}")
        if not 0 < epsilon < inf or not 0 <= gamma <= 1:
            raise ArgumentError(f"epsilon must be above 0 and gamma lie between 0 and 1, got {epsilon!r} and {gamma!r}")
        numbers = np.arange(len(x)) if ids is None else np.asarray(ids)
        if numbers.shape != (len(x),) or numbers.dtype.kind not in "iu" or (numbers < 0).any() or len(set(numbers.tolist())) < len(x):  # fmt: skip
            raise ArgumentError("ids must be a different whole number, 0 or more, for each row of embeddings")
        self.k, self.epsilon, self.gamma, self.seed = int(k), float(epsilon), float(gamma), int(seed)
        self.phases = np.random.default_rng(seed).random((iterations, x.shape[1]))
        self._ids: Integers = numbers.astype(np.int64)
        self._row = {int(i): row for row, i in enumerate(self._ids)}
        self._steps: Integers = np.rint(x / _UNIT).astype(np.int64)
        self._there = np.ones(len(x), dtype=np.bool_)
        self._cluster()

    @property
    def chosen(self) -> list[int]:
        """The ids of the examples for the prompt, by cluster."""
        for order in self._orders:
            while order and not self._there[order[0]]:  # each is passed once: constant time, over all deletions
                order.popleft()
        return [int(self._ids[order[0]]) for order in self._orders if order]

    def __len__(self) -> int:
        """Examples that are there."""
        return int(self._there.sum())

    def delete(self, identity: int) -> Deletion:
        """Takes one example out. Raises ArgumentError when it is not there, or when fewer than k would be left; nothing has changed then."""
        row = self._row.get(identity)
        if row is None or not self._there[row]:
            raise ArgumentError(f"there is no example {identity!r} to delete")
        if len(self) - 1 < self.k:
            raise ArgumentError(f"{self.k} examples are to be chosen, so {len(self)} cannot lose one")
        reason = "seed" if row in self._seeds else "centroid" if self._moved_without(row) else None
        self._there[row] = False
        if reason is not None:
            self._cluster()
        else:
            for t, (sums, sizes) in enumerate(zip(self._sums, self._sizes, strict=True)):
                sums[self._members[t, row]] -= self._steps[row]
                sizes[self._members[t, row]] -= 1
        return Deletion(reason is not None, reason)

    # -- the clustering

    def _cluster(self) -> None:
        rows = np.flatnonzero(self._there)
        x: Floats = (self._steps[rows] * _UNIT).astype(np.float64)
        seeds = self._seed_rows(x, self._ids[rows])
        self._seeds = {int(rows[s]) for s in seeds}
        self._start: Floats = x[seeds]  # (k, d)
        iterations, n = len(self.phases), len(self._steps)
        self._members = np.full((iterations, n), -1)
        self._sums = np.zeros((iterations, self.k, x.shape[1]), dtype=np.int64)
        self._sizes = np.zeros((iterations, self.k), dtype=np.int64)
        self._centroids = np.zeros((iterations, self.k, x.shape[1]))
        before: Floats = self._start
        nearest = _distances(x, before).argmin(0)
        for t in range(iterations):
            self._members[t, rows] = nearest
            np.add.at(self._sums[t], nearest, self._steps[rows])
            self._sizes[t] = np.bincount(nearest, minlength=self.k)
            self._centroids[t] = before = self._quantized(t, self._sums[t], self._sizes[t], before, len(rows))
            nearest = _distances(x, before).argmin(0)
        far = _distances(x, before)[nearest, np.arange(len(rows))]
        order = np.lexsort((self._ids[rows], far))
        self._orders = [deque(rows[order[nearest[order] == j]].tolist()) for j in range(self.k)]  # the nearest first

    def _seed_rows(self, x: Floats, ids: Integers) -> list[int]:
        """k-means++: each next one with a probability that is proportional to its squared distance from those before. The first to ring wins."""
        weight, chosen = np.ones(len(x)), list[int]()
        nearest = np.full(len(x), inf)
        for draw in range(self.k):
            rings = _exponentials(self.seed, draw, ids)
            with np.errstate(divide="ignore"):
                times = rings / weight if weight.any() else rings  # all that is left lies where a seed is: any will do
            times[chosen] = inf
            chosen.append(int(times.argmin()))
            nearest = np.minimum(nearest, _distances(x, x[chosen[-1:]])[0])
            weight = nearest
        return chosen

    def _quantized(self, t: int, sums: Integers, sizes: Integers, before: Floats, n: int) -> Floats:
        """(..., d) quantized centroids of clusters with these sums and sizes."""
        least, c = self.gamma * n / self.k, sizes[..., None]
        mean = sums * _UNIT / np.maximum(c, 1)
        share = np.minimum(1.0, c / least) if least else (c > 0) * 1.0
        drawn = np.where(share < 1, share * mean + (1 - share) * before, mean)
        shift = self.phases[t] - 0.5
        return self.epsilon * (np.rint(drawn / self.epsilon + shift) - shift)

    def _moved_without(self, row: int) -> bool:
        """Whether any quantized centroid would be another. Clusters below gamma's size depend on the number of examples, so they are looked at too."""
        n = len(self)
        before: Floats = self._start
        for t, (sums, sizes) in enumerate(zip(self._sums, self._sizes, strict=True)):
            own = self._members[t, row]
            look = np.flatnonzero(sizes < self.gamma * n / self.k)
            look = look if own in look else np.append(look, own)
            mine = look == own
            left = sums[look] - mine[:, None] * self._steps[row]
            moved = self._quantized(t, left, sizes[look] - mine, before[look], n - 1) != self._centroids[t, look]
            if moved.any():
                return True
            before = self._centroids[t]
        return False


def retrain_bound(
    n: int, d: int, k: int, *, epsilon: float, spread: float, gamma: float = 0.2, iterations: int = 10
) -> float:
    """The largest probability with which deleting an example drawn at random makes `InContextSelection` cluster anew.

        k / n + T d R / epsilon (2 k / (gamma (n - 1)) + (k + 1) / (n - 1)),   R = spread + T epsilon

    The first part: it was a seed. The other: in each iteration and dimension its own cluster's centroid shifts by 2 R k / (gamma (n - 1)) at most, each small one, whose
    pull depends on n, by R / (n - 1), and a wall of a cell of width epsilon lies in between with probability |shift| / epsilon. It falls as 1 / n; the shifts of
    real data are far smaller than this worst case.

    Args:
        n: examples. d: dimensions. k: clusters.
        epsilon, gamma, iterations: as in `InContextSelection`.
        spread: largest minus smallest value of a dimension, at most.

    Returns:
        0 to 1. Raises ArgumentError unless all are above 0 and n is 2 or more.

    Source: our derivation, after Ginart et al. 2019, arXiv 1907.05012.
    """
    if n < 2 or min(d, k, epsilon, spread, gamma, iterations) <= 0:
        raise ArgumentError("n must be 2 or more, and d, k, epsilon, spread, gamma and iterations above 0")
    reach = spread + iterations * epsilon
    return min(1.0, k / n + iterations * d * reach / epsilon * (2 * k / (gamma * (n - 1)) + (k + 1) / (n - 1)))


def holistic_cost(unlearning: float, inference: float, inferences: float) -> float:
    """What a way of unlearning costs from one request to the next: unlearning + inferences * inference.

    A prompt with k examples is cheap to unlearn and dear to run, since each inference reads the examples again.

    Args:
        unlearning: cost of one request, in FLOPs, seconds or money.
        inference: cost of one inference, in the same unit.
        inferences: how many there are between two requests.

    Raises ArgumentError for a negative number. Source: Muresanu et al. 2024, arXiv 2402.00751; the formula is ours.
    """
    if min(unlearning, inference, inferences) < 0:
        raise ArgumentError(
            f"costs and numbers must be 0 or more, got {unlearning!r}, {inference!r} and {inferences!r}"
        )
    return unlearning + inferences * inference


def break_even_inferences(
    unlearning: float, inference: float, other_unlearning: float, other_inference: float
) -> float:  # fmt: skip
    """Below how many inferences between two requests the first way is the cheaper one.

        (other_unlearning - unlearning) / (inference - other_inference)

    Args:
        unlearning, inference: costs of the first way (examples in the prompt, say), see `holistic_cost`.
        other_unlearning, other_inference: of the second (retraining a shard, SISA, say), in the same unit.

    Returns:
        Infinity where the first is nowhere dearer; 0 where it is nowhere cheaper. Where the second is the cheaper one below the break-even, and the first above
        it, swap them: that is refused. Raises ArgumentError then, and for a negative cost.
    """
    if min(unlearning, inference, other_unlearning, other_inference) < 0:
        raise ArgumentError("costs must be 0 or more")
    saved, dearer = other_unlearning - unlearning, inference - other_inference
    if saved < 0 and dearer < 0:
        raise ArgumentError(
            "the first way is dearer to unlearn and cheaper to run, so it wins above a number, not below: swap the two"
        )
    if dearer <= 0:
        return inf
    return max(0.0, saved / dearer)


def _distances(x: Floats, centroids: Floats) -> Floats:
    """(k, n) squared distances; each has the same bits whatever other rows there are, which a matrix product does not promise."""
    return np.stack([np.square(x - c).sum(axis=1) for c in centroids])


def _exponentials(seed: int, draw: int, ids: Integers) -> Floats:
    """(n,) independent exponential variables, each a function of seed, draw and id alone (splitmix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        z = ids.astype(np.uint64)
        for part in (seed, draw):
            z = _mixed(z * np.uint64(0x9E3779B97F4A7C15) + np.uint64(part % 2**64))
    return -np.log((z >> np.uint64(11)).astype(np.float64) * 2.0**-53 + 2.0**-54)


def _mixed(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
