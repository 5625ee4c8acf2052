"""Models trained with and without each example, and their scores: the ground truth of memorization."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pyunlearn.data import Tokens
from pyunlearn.errors import ArgumentError
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.scoring import Scorer, by_example, evaluation_mode
from pyunlearn.options import Number, Whole, require

Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]


class SubsetScores(NamedTuple):
    """Scores of n examples under K models, each trained on some of them."""

    included: Booleans
    """(K, n) true where model k was trained on example i."""
    accuracy: Floats
    """(K, n) share of the example's scored tokens that are the model's first choice, 0 to 1: for
    `metrics.counterfactual_memorization`."""
    log_likelihood: Floats
    """(K, n) mean log-likelihood a token, nats."""


def subset_masks(examples: int, *, count: int, fraction: float = 0.5, seed: int = 0) -> Booleans:
    """Draw the training set of each of `count` models: each example is in exactly round(count * fraction) of them.

    So every example is in and out at least once, and all have the same precision; the subsets' sizes differ a little.

    Args:
        examples: n, 1 or more.
        count: K models, 2 or more.
        fraction: of the models that train on an example; it must leave one in and one out. The source has 0.25 of 400.
        seed: seed of the draw.

    Returns:
        (K, n) bool.

    Raises:
        ArgumentError: no example, or a count and fraction that leave an example in no model or in every one.

    >>> subset_masks(5, count=4, fraction=0.5).sum(axis=0)
    array([2, 2, 2, 2, 2])
    """
    require(Whole(1), examples=examples, count=count)
    require(Number(0, 1), fraction=fraction)
    require(Whole(0), seed=seed)
    inside = round(count * fraction)
    if not 1 <= inside <= count - 1:
        raise ArgumentError(
            f"fraction must leave each example in at least one model and out of one: of {count} models {fraction} is "
            f"{inside}"
        )
    rng = np.random.default_rng(seed)
    return rng.permuted(np.arange(count)[:, None] < np.full((1, examples), inside), axis=0)


def subset_models(
    train: Callable[[list[int], int], Any],
    examples: Sequence[Tokens],
    *,
    count: int = 8,
    fraction: float = 0.5,
    seed: int = 0,
    batch_size: int = 8,
) -> SubsetScores:
    """Train models on random subsets of the examples, one after the other, and score every example under each.

    Args:
        train: takes the indices of the examples to train on (a rising list) and the model's number, 0 to K - 1, and
            returns the trained transformers model. The number can seed models that differ in more than their data.
        examples: n of them, as tokens.
        count: K models, as in `subset_masks`.
        fraction: of the models that train on an example, as in `subset_masks`.
        seed: seed of the draw.
        batch_size: examples in one pass when scoring.

    Returns:
        SubsetScores. Only one model is in memory at a time.

    Raises:
        ArgumentError: as `subset_masks`; a model that gives NaN.

    Source: Zhang et al. 2021, arXiv 2112.12938.
    """
    require(Whole(1), batch_size=batch_size)
    included = subset_masks(len(examples), count=count, fraction=fraction, seed=seed)
    trained = (train(np.flatnonzero(row).tolist(), number) for number, row in enumerate(included))
    return score_models(trained, included, examples, batch_size=batch_size)


def score_models(
    trained: Iterable[Any], included: Booleans, examples: Sequence[Tokens], *, batch_size: int = 8
) -> SubsetScores:
    """Score every example under models that exist already.

    Args:
        trained: K transformers models; a generator that loads one at a time saves memory.
        included: (K, n) true where model k was trained on example i.
        examples: n of them, as tokens.
        batch_size: examples in one pass.

    Returns:
        SubsetScores.

    Raises:
        ArgumentError: a mask that does not fit the models or the examples, a model that gives NaN.

    Source: Zhang et al. 2021, arXiv 2112.12938.
    """
    mask = np.asarray(included, dtype=np.bool_)
    scores = [_score(model, examples, batch_size, number) for number, model in enumerate(trained)]
    if mask.shape != (len(scores), len(examples)):
        raise ArgumentError(f"included must be {(len(scores), len(examples))}, models by examples, and is {mask.shape}")
    return SubsetScores(mask, np.stack([a for a, _ in scores]), np.stack([x for _, x in scores]))


@torch.no_grad()
def _score(model: Any, examples: Sequence[Tokens], batch_size: int, number: int) -> tuple[Floats, Floats]:
    accuracy, log_likelihood = np.zeros(len(examples)), np.zeros(len(examples))
    lm = LanguageModel.of(model, needs_tokenizer=False)
    with evaluation_mode(lm.module):
        for indices, batch in Scorer(lm, batch_size).batches(examples):
            statistics = lm.likelihood.statistics(batch)  # one pass for both
            for values, into in (((statistics.rank == 0), accuracy), (statistics.log_likelihood, log_likelihood)):
                into[indices] = [float(part.double().mean()) for part in by_example(values, examples, indices)]
    if not np.isfinite(log_likelihood).all():
        raise ArgumentError(
            f"train must return models that give finite log-likelihoods, and model {number} gives NaN or Inf"
        )
    return accuracy, log_likelihood
