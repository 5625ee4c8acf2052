"""Exact unlearning without changing a weight: examples in the prompt, chosen so that deletions are certified (ERASE).

A model that is adapted by examples in its prompt has "trained" on the choice of these examples alone. They are chosen
by quantized k-means: of each cluster the example nearest to its centroid. A deletion almost never moves a quantized
centroid. Sums stored for each iteration show that it did not, at a cost that does not depend on the number of examples,
and then nothing else can have changed.

Sources: ERASE, Muresanu et al. 2024, arXiv 2402.00751, algorithm 1; quantized k-means, Ginart et al. 2019,
arXiv 1907.05012.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import inf
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyunlearn.errors import ArgumentError
from pyunlearn.options import Number, Whole, require

__all__ = ["Deletion", "InContextSelection", "break_even_inferences", "holistic_cost", "retrain_bound"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# embeddings are stored as multiples of it, so that a sum minus one example is exactly the sum without the example
_UNIT = 2.0**-36
_LARGEST = 2.0**26  # of the number of examples times the largest coordinate: their sums fit 64 bits
_ABOVE_0 = Number(above=0)
_SHARE = Number(0, 1)


class Deletion(NamedTuple):
    """The outcome of a deletion.

    `reclustered`  True where the clustering was computed again, at the cost of the first one; else the cost did not
                   depend on the number of examples
    `reason`       "seed": the clustering started from the deleted example; "centroid": a quantized centroid moved; None
                   where nothing was computed again
    """

    reclustered: bool
    reason: str | None


class InContextSelection:
    """Choice of k examples for a prompt, with exact deletion: afterwards all is as if the example had never existed.

        Q_t(m) = epsilon (round(m / epsilon + u_t - 1/2) - (u_t - 1/2)),   u_t uniform on [0, 1)^d, for iteration t

    Each iteration computes the mean of each cluster and quantizes it. A cluster of fewer than M = gamma n / k examples
    is first moved towards its previous quantized centroid p: (c / M) mean + (1 - c / M) p for c examples, so that no
    small cluster gives one example a large weight.

    Deletions are exact, not approximate: the seeds (k-means++) are chosen by a race of exponential variables, one for
    each example's id and draw, which the absence of a loser does not change; the phases u_t depend on no example; sums
    are integers; and the number of iterations is fixed, since stopping by the loss would be a decision that a deletion
    can change. One dependence remains, in the embeddings: compute them with a model, and a reduction of their
    dimension, that was not fitted to these examples.

    The probability that a deletion computes the clustering again, over the seed, is at most the probability that the
    example started a cluster, k / n on average over the examples, plus the sum over iterations, clusters and dimensions
    of |shift of the mean| / epsilon (`retrain_bound` for the worst case): a cell of width epsilon with a uniform phase
    separates two points at that distance with that probability. So few dimensions and a coarse epsilon make deletions
    cheap.

    Args:
        embeddings: (n, d), one row for each example, on a common scale; stored in steps of 2^-36.
        k: examples in the prompt, 1 to n. Fewer are chosen where a cluster ends empty.
        epsilon: width of the quantization's cells, above 0, in the unit of the embeddings. Wide: cheap deletions,
            coarser clusters.
        gamma: clusters below this share of the mean size n / k are moved towards their previous centroid, 0 to 1.
        iterations: of k-means, 1 or more.
        seed: seed of all random numbers.
        ids: (n,) a whole number, 0 or more, for each example, which stays the same; default 0 to n - 1. Equal
            embeddings, seed and ids give equal choices.

    Raises:
        ArgumentError: shapes that do not fit, values that are not finite or too large, an option out of range, an id
            that occurs twice.

    >>> selection = InContextSelection([[0.0], [0.1], [5.0], [5.1]], k=2, epsilon=0.5)
    >>> sorted(i // 2 for i in selection.chosen)
    [0, 1]
    >>> selection.delete(selection.chosen[0]).reclustered in (True, False), len(selection)
    (True, 3)
    """

    def __init__(
        self,
        embeddings: ArrayLike,
        k: int,
        *,
        epsilon: float,
        gamma: float = 0.2,
        iterations: int = 10,
        seed: int = 0,
        ids: Sequence[int] | None = None,
    ) -> None:
        x = _require_embeddings(embeddings)
        require(Whole(1), k=k, iterations=iterations)
        require(_ABOVE_0, epsilon=epsilon)
        require(_SHARE, gamma=gamma)
        require(Whole(), seed=seed)
        if k > len(x):
            raise ArgumentError(f"k must be a whole number from 1 to {len(x)}, the number of embeddings, got {k}")
        numbers = np.arange(len(x)) if ids is None else _require_ids(ids, len(x))
        self.k, self.epsilon, self.gamma, self.seed = int(k), float(epsilon), float(gamma), int(seed)
        self.phases = np.random.default_rng(seed).random((iterations, x.shape[1]))
        self._ids: Integers = numbers.astype(np.int64)
        self._row = {int(i): row for row, i in enumerate(self._ids)}
        self._steps: Integers = np.rint(x / _UNIT).astype(np.int64)
        self._present = np.ones(len(x), dtype=np.bool_)
        self._cluster()

    @property
    def chosen(self) -> list[int]:
        """The ids of the examples for the prompt, one for each cluster that is not empty."""
        for order in self._orders:
            while order and not self._present[order[0]]:  # each is skipped once: constant time, over all deletions
                order.popleft()
        return [int(self._ids[order[0]]) for order in self._orders if order]

    def __len__(self) -> int:
        """Return the number of examples that are not deleted."""
        return int(self._present.sum())

    def delete(self, identity: int) -> Deletion:
        """Delete the example with an id.

        Raises ArgumentError where no example has the id, or fewer than k would remain; nothing has changed then.
        """
        require(Whole(), identity=identity)
        row = self._row.get(identity)
        if row is None or not self._present[row]:
            raise ArgumentError(f"there is no example {identity!r} to delete")
        if len(self) - 1 < self.k:
            raise ArgumentError(f"k={self.k} examples are chosen for the prompt, so {len(self)} cannot lose one")
        reason = "seed" if row in self._seeds else "centroid" if self._moved_without(row) else None
        self._present[row] = False
        if reason is not None:
            self._cluster()
        else:
            for t, (sums, sizes) in enumerate(zip(self._sums, self._sizes, strict=True)):
                sums[self._members[t, row]] -= self._steps[row]
                sizes[self._members[t, row]] -= 1
        return Deletion(reason is not None, reason)

    # -- the clustering

    def _cluster(self) -> None:
        """Cluster the examples: initial centers, clusters, centroids, and the order of the examples in each cluster."""
        rows = np.flatnonzero(self._present)
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
        """Choose the k rows of k-means++: each with probability proportional to its squared distance from those before.

        Each example waits for an exponential time divided by its weight, and the first one is chosen.
        """
        weight, chosen = np.ones(len(x)), list[int]()
        nearest = np.full(len(x), inf)
        for draw in range(self.k):
            waits = _exponentials(self.seed, draw, ids)
            with np.errstate(divide="ignore"):
                times = waits / weight if weight.any() else waits  # all others equal a seed: any of them will do
            times[chosen] = inf
            chosen.append(int(times.argmin()))
            nearest = np.minimum(nearest, _distances(x, x[chosen[-1:]])[0])
            weight = nearest
        return chosen

    def _quantized(self, t: int, sums: Integers, sizes: Integers, before: Floats, n: int) -> Floats:
        """Return the (..., d) quantized centroids of clusters with these sums and sizes."""
        least, c = self.gamma * n / self.k, sizes[..., None]
        mean = sums * _UNIT / np.maximum(c, 1)
        share = np.minimum(1.0, c / least) if least else (c > 0) * 1.0
        moved = np.where(share < 1, share * mean + (1 - share) * before, mean)
        shift = self.phases[t] - 0.5
        return self.epsilon * (np.rint(moved / self.epsilon + shift) - shift)

    def _moved_without(self, row: int) -> bool:
        """Return True where any quantized centroid would differ without the example in a row.

        Clusters below gamma's size depend on the number of examples, so their centroids are compared too.
        """
        n = len(self)
        before: Floats = self._start
        for t, (sums, sizes) in enumerate(zip(self._sums, self._sizes, strict=True)):
            own = self._members[t, row]
            clusters = np.flatnonzero(sizes < self.gamma * n / self.k)
            clusters = clusters if own in clusters else np.append(clusters, own)
            is_own = clusters == own
            remaining = sums[clusters] - is_own[:, None] * self._steps[row]
            centroids = self._quantized(t, remaining, sizes[clusters] - is_own, before[clusters], n - 1)
            if (centroids != self._centroids[t, clusters]).any():
                return True
            before = self._centroids[t]
        return False


def retrain_bound(
    n: int, d: int, k: int, *, epsilon: float, spread: float, gamma: float = 0.2, iterations: int = 10
) -> float:
    """Return an upper bound on the probability that deleting a random example makes `InContextSelection` recluster.

        k / n + T d R / epsilon (2 k / (gamma (n - 1)) + (k + 1) / (n - 1)),   R = spread + T epsilon

    The first part: the example was a seed. The second: in each of T iterations and each dimension, the centroid of its
    own cluster shifts by 2 R k / (gamma (n - 1)) at most, each small cluster, whose centroid depends on n, by
    R / (n - 1), and a border between cells of width epsilon lies in between with probability |shift| / epsilon. The
    bound falls as 1 / n; the shifts of real data are far smaller than this worst case.

    Args:
        n: number of examples, 2 or more.
        d: number of dimensions.
        k: number of clusters.
        epsilon, gamma, iterations: as in `InContextSelection`; gamma above 0.
        spread: upper bound on the largest minus the smallest value of a dimension, above 0.

    Returns:
        A probability, 0 to 1.

    Raises:
        ArgumentError: a number out of range.

    Source: our derivation, after Ginart et al. 2019, arXiv 1907.05012.

    >>> round(retrain_bound(100_000, 2, 4, epsilon=0.5, spread=1.0, iterations=3), 4)
    0.0135
    """
    require(Whole(2), n=n)
    require(Whole(1), d=d, k=k, iterations=iterations)
    require(_ABOVE_0, epsilon=epsilon, spread=spread, gamma=gamma)
    reach = spread + iterations * epsilon
    return min(1.0, k / n + iterations * d * reach / epsilon * (2 * k / (gamma * (n - 1)) + (k + 1) / (n - 1)))


def holistic_cost(unlearning: float, inference: float, inferences: float) -> float:
    """Return the cost of a way of unlearning from one request to the next: unlearning + inferences * inference.

    A prompt with k examples makes unlearning cheap and inference expensive, since each inference reads the examples.

    Args:
        unlearning: cost of one request, in FLOPs, seconds or money.
        inference: cost of one inference, in the same unit.
        inferences: number of inferences between two requests.

    Returns:
        The cost, in the same unit.

    Raises:
        ArgumentError: a negative number.

    Source: Muresanu et al. 2024, arXiv 2402.00751; the formula is ours.

    >>> holistic_cost(10, 3, 100)
    310
    """
    require(Number(0), unlearning=unlearning, inference=inference, inferences=inferences)
    return unlearning + inferences * inference


def break_even_inferences(
    unlearning: float, inference: float, other_unlearning: float, other_inference: float
) -> float:
    """Return the number of inferences per deletion request below which the first way of unlearning is cheaper.

        (other_unlearning - unlearning) / (inference - other_inference)

    Args:
        unlearning, inference: costs of the first way (examples in the prompt, for example), see `holistic_cost`.
        other_unlearning, other_inference: of the second (retraining a shard, SISA, for example), in the same unit.

    Returns:
        Infinity where the first is nowhere more expensive; 0 where it is nowhere cheaper.

    Raises:
        ArgumentError: a negative cost, or a first way that is cheaper above the break-even number instead of below:
            swap the two.

    >>> break_even_inferences(10, 3, 1000, 2)
    990.0
    """
    require(
        Number(0),
        unlearning=unlearning,
        inference=inference,
        other_unlearning=other_unlearning,
        other_inference=other_inference,
    )
    saved_per_request, extra_per_inference = other_unlearning - unlearning, inference - other_inference
    if saved_per_request < 0 and extra_per_inference < 0:
        raise ArgumentError(
            "the first way costs more for unlearning and less for inference, so it is cheaper above a number of "
            "inferences, not below: swap the two"
        )
    if extra_per_inference <= 0:
        return inf
    return max(0.0, saved_per_request / extra_per_inference)


def _require_embeddings(embeddings: Any) -> Floats:
    """Return them as (n, d) float64. Raises ArgumentError for another shape, or values that cannot be stored."""
    try:
        x = np.asarray(embeddings, dtype=np.float64)
    except (TypeError, ValueError):
        raise ArgumentError(f"embeddings must be (n, d) numbers, got {type(embeddings).__name__}") from None
    if x.ndim != 2 or 0 in x.shape or not np.isfinite(x).all():
        raise ArgumentError(f"embeddings must be (n, d), with finite values, got shape {x.shape}")
    if np.abs(x).max() * len(x) > _LARGEST:
        raise ArgumentError(
            f"embeddings times their number must stay below {_LARGEST:.0f}, and reach {np.abs(x).max() * len(x):.3g}: "
            "scale them down"
        )
    return x


def _require_ids(ids: Any, count: int) -> Integers:
    """Return them as an array. Raises ArgumentError unless they are `count` different whole numbers, 0 or more."""
    numbers = np.asarray(ids)
    shaped = numbers.shape == (count,) and numbers.dtype.kind in "iu"
    if not shaped or (numbers < 0).any() or len(set(numbers.tolist())) < count:
        raise ArgumentError("ids must be a different whole number, 0 or more, for each row of embeddings")
    return numbers


def _distances(x: Floats, centroids: Floats) -> Floats:
    """Return (k, n) squared distances, whose bits do not depend on the other rows, as in a matrix product they may."""
    return np.stack([np.square(x - c).sum(axis=1) for c in centroids])


def _exponentials(seed: int, draw: int, ids: Integers) -> Floats:
    """Return (n,) independent exponential variables, functions of seed, draw and id.

    Source: splitmix64, Steele et al. 2014.
    """
    with np.errstate(over="ignore"):
        z = ids.astype(np.uint64)
        for part in (seed, draw):
            z = _mixed(z * np.uint64(0x9E3779B97F4A7C15) + np.uint64(part % 2**64))
    return -np.log((z >> np.uint64(11)).astype(np.float64) * 2.0**-53 + 2.0**-54)


def _mixed(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the output function of splitmix64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
