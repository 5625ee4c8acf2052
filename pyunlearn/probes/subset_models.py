"""Models trained with and without each example, and what each of them knows: the ground truth of memorization."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pyunlearn import models
from pyunlearn.data import Tokens
from pyunlearn.errors import ArgumentError
from pyunlearn.models.scoring import batches_on, by_example, evaluation_mode

Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]


class SubsetScores(NamedTuple):
    """What K models know of n examples, each trained on some of them."""

    included: Booleans
    """(K, n) true where model k was trained on example i."""
    accuracy: Floats
    """(K, n) share of the example's scored tokens that are the model's first choice, 0 to 1: for `counterfactual_memorization`."""
    log_likelihood: Floats
    """(K, n) mean log-likelihood a token, nats."""


def subset_masks(examples: int, *, count: int, fraction: float = 0.5, seed: int = 0) -> Booleans:
    """Which of `count` models trains on which example: each example in exactly round(count * fraction) of them, at random.

    So every example is in and out at least once, and all have the same precision; the subsets' sizes then differ a little.

    Args:
        examples: n, 1 or more.
        count: K models, 2 or more.
        fraction: of the models that train on an example, such that it is neither none nor all of them; the source has 0.25 of 400.
        seed: of the draw.

    Returns:
        (K, n).

    Raises:
        ArgumentError: no example, or a count and fraction that leave an example in no model or in every one.
    """
    inside = round(count * fraction)
    if examples < 1 or not 1 <= inside <= count - 1:
        raise ArgumentError(
            f"each example must be in at least one model and out of one: of {count} models a fraction of {fraction} is {inside}, "
            f"for {examples} example(s)."
        )
    rng = np.random.default_rng(seed)
    return rng.permuted(np.arange(count)[:, None] < np.full((1, examples), inside), axis=0)


def subset_models(
    train: Callable[[list[int], int], Any], examples: Sequence[Tokens], *, count: int = 8, fraction: float = 0.5,
    seed: int = 0, batch_size: int = 8,
) -> SubsetScores:  # fmt: skip
    """Trains models on random subsets of the examples, one after the other, and scores every example under each.

    Args:
        train: takes the places of the examples to train on (a list, rising) and the model's number, 0 to K - 1, and returns the trained
            transformers model. The number is the seed to give it where models are to differ in more than their data.
        examples: n of them, as tokens.
        count, fraction, seed: as in `subset_masks`.
        batch_size: examples in one pass when scoring.

    Returns:
        SubsetScores. Only one model lives at a time.

    Raises:
        ArgumentError: as `subset_masks`; a model that gives NaN.

    Source: arXiv 2112.12938.
    """
    included = subset_masks(len(examples), count=count, fraction=fraction, seed=seed)
    trained = (train(np.flatnonzero(row).tolist(), number) for number, row in enumerate(included))
    return score_models(trained, included, examples, batch_size=batch_size)


def score_models(
    trained: Iterable[Any], included: Booleans, examples: Sequence[Tokens], *, batch_size: int = 8
) -> SubsetScores:
    """The same for models that are there already, with the mask of what each was trained on.

    Args:
        trained: K transformers models; a generator that loads one at a time will do.
        included: (K, n).
        examples, batch_size: as in `subset_models`.

    Returns:
        SubsetScores.

    Raises:
        ArgumentError: a mask that does not fit the models or the examples, a model that gives NaN.
    """
    mask = np.asarray(included, dtype=np.bool_)
    found = [_score(model, examples, batch_size, number) for number, model in enumerate(trained)]
    if mask.shape != (len(found), len(examples)):
        raise ArgumentError(f"included must be {(len(found), len(examples))}, models by examples, and is {mask.shape}.")
    return SubsetScores(mask, np.stack([a for a, _ in found]), np.stack([x for _, x in found]))


@torch.no_grad()
def _score(model: Any, examples: Sequence[Tokens], batch_size: int, number: int) -> tuple[Floats, Floats]:
    accuracy, log_likelihood = np.zeros(len(examples)), np.zeros(len(examples))
    likelihood = models.Likelihood(model)
    with evaluation_mode(model):
        for places, batch in batches_on(model, examples, batch_size):
            statistics = likelihood.statistics(batch)
            for values, into in (((statistics.rank == 0), accuracy), (statistics.log_likelihood, log_likelihood)):
                into[places] = [float(part.double().mean()) for part in by_example(values, examples, places)]
    if not np.isfinite(log_likelihood).all():
        raise ArgumentError(
            f"train must return models that give finite log-likelihoods, and model {number} gives NaN or Inf."
        )
    return accuracy, log_likelihood
