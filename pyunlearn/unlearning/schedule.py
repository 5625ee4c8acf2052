"""Schedule of a run: the examples of each optimizer step, their order and their micro-batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyunlearn.errors import ArgumentError, brief

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

STEPS_PER_ROUND = 16
"""Largest number of optimizer steps between two evaluations."""

SCORED_OTHERS = 64
"""Largest number of forget examples that are scored after a round which did not take them."""

VISITS, LEAST_STEPS = 64, 200
"""Default of max_steps: optimizer steps for each memorized example on average, and the least number."""


ROBUST = 4
"""Factor on both where the run is to be robust."""

FORMS = 2
"""Factor on both where records have other forms: a step on one moves the others too."""


def resolved_steps(
    max_steps: int | None, memorized: int, batch_size: int, *, robust: bool = False, forms: bool = False
) -> int:
    """Return the largest number of optimizer steps of a run."""
    if max_steps is not None:
        return max_steps
    factor = (ROBUST if robust else 1) * (FORMS if forms else 1)
    return max(LEAST_STEPS, VISITS * -(-memorized // batch_size)) * factor


class Schedule:
    """Order in which a run visits its examples. It depends on the seed alone: a resumed run visits the same ones.

    Args:
        batch_size: forget examples in one optimizer step.
        micro_batch_size: examples in one forward and backward pass; None: all of a step.
        retain_examples: size of the retain set, 0 without one.
        order: "random", "easy_first" or "hard_first".
        difficulty: (B,) high = hard; None for random order.
        seed: seed of the shuffles.

    >>> schedule = Schedule(batch_size=2, micro_batch_size=None, retain_examples=3, seed=0)
    >>> [len(batch) for batch in schedule.round_batches(np.arange(5), round_number=0, steps_left=99)]
    [2, 2, 1]
    >>> sorted(schedule.retain_indices(0) + schedule.retain_indices(1))[:3]
    [0, 1, 2]
    """

    def __init__(
        self,
        *,
        batch_size: int,
        micro_batch_size: int | None,
        retain_examples: int,
        order: str = "random",
        difficulty: Floats | None = None,
        seed: int,
    ) -> None:
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size or batch_size
        self.retain_examples, self.order, self.difficulty, self.seed = retain_examples, order, difficulty, seed

    def round_batches(self, active: Indices, round_number: int, steps_left: int) -> list[Indices]:
        """Return the forget examples of each step of a round; a round takes each active example once at most."""
        ordered = in_order(active, self.order, self.difficulty, (self.seed, round_number))
        steps = [ordered[i : i + self.batch_size] for i in range(0, len(ordered), self.batch_size)]
        return steps[: min(STEPS_PER_ROUND, steps_left)]

    def scored(self, taken: Indices, examples: int, round_number: int) -> Indices:
        """Return the sorted examples to score after a round: those that it took, and evenly spaced others.

        Args:
            taken: the examples of the round.
            examples: size of the forget set.
            round_number: number of the round; the rounds take the others in turn.
        """
        others = np.setdiff1d(np.arange(examples), taken)
        stride = max(1, -(-len(others) // SCORED_OTHERS))
        return np.union1d(taken, others[round_number % stride :: stride])

    def retain_indices(self, step: int) -> list[int]:
        """Return the retain examples of a step: an epoch takes each once, shuffled again for the next."""
        return self.in_turn(step, self.retain_examples)

    def in_turn(self, step: int, n: int) -> list[int]:
        """Return which of `n` examples a step takes, a batch of them, in epochs as `retain_indices`."""
        if not n:
            return []
        size = min(self.batch_size, n)
        epoch = np.random.default_rng((self.seed, 1, step * size // n)).permutation(n)
        return [int(epoch[(step * size + i) % n]) for i in range(size)]

    def retain_ahead(self, max_steps: int) -> list[int]:
        """Return the sorted retain examples that a run of `max_steps` steps takes."""
        if not self.retain_examples:
            return []
        one_epoch = -(-self.retain_examples // min(self.batch_size, self.retain_examples))
        return sorted({i for step in range(min(max_steps, one_epoch)) for i in self.retain_indices(step)})

    def micro_batches(self, indices: Iterable[int]) -> list[list[int]]:
        """Split a step's examples into micro-batches for gradient accumulation."""
        examples, size = [int(i) for i in indices], self.micro_batch_size
        return [examples[i : i + size] for i in range(0, len(examples), size)]


def in_order(active: Indices, order: str, difficulty: Floats | None, seed: tuple[int, ...]) -> Indices:
    """Return the indices shuffled, or sorted by difficulty (stable)."""
    if order == "random" or difficulty is None:
        return np.random.default_rng(seed).permutation(active)
    sign = 1.0 if order == "easy_first" else -1.0
    return active[np.argsort(sign * difficulty[active], kind="stable")]


def check_difficulty(values: Any, records: NDArray[np.integer]) -> Floats:
    """Return (B,) difficulties, from those of the examples or from those of the records, which all parts of one have.

    Raises ArgumentError unless there are as many finite numbers.

    Args:
        values: (B,) of the examples, or (R,) of the records.
        records: (B,) index of the record of each forget example, in order.

    >>> check_difficulty([3, 1], np.array([0, 0, 1])).tolist()
    [3.0, 3.0, 1.0]
    """
    examples, count = len(records), len(np.unique(records))
    try:
        difficulty = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        difficulty = np.array(np.nan)
    if difficulty.shape not in ((examples,), (count,)) or not np.isfinite(difficulty).all():
        parts = f", or {examples}, one for each window or other form of them" if examples > count else ""
        size = f"{difficulty.size} numbers" if difficulty.size != count and difficulty.ndim == 1 else brief(values)
        raise ArgumentError(f"difficulty must be {count} numbers, one for each forget example{parts}, got {size}")
    return difficulty if len(difficulty) == examples else difficulty[records]
