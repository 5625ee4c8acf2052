"""Sanity unlearners: ways to change a model after which it is known what a metric of unlearning should say."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyunlearn.data import Tokens
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.study.config import StudyConfig
from pyunlearn.study.runs import DESTROYED, Ascent, mean_nll
from pyunlearn.study.sets import ForgetSet, Sets

NOTHING, RETRAINED, REFUSE, NOISE = "do nothing", "retrained", "refuse always", "noise"
RELABEL, COLLAPSE, ASCENT = "random relabelling", "collapse", "gradient ascent"
TRAINED = (REFUSE, NOISE, RELABEL, COLLAPSE, ASCENT)
"""The unlearners that change the weights of the model that saw the set."""
UNLEARNERS = {
    NOTHING: "the model that was trained on the set",
    RETRAINED: "a model of another seed, which never saw the set",
    REFUSE: "fine-tuned to answer every prompt with one and the same sentence",
    NOISE: "normal noise in all weights, as much as brings the set's mean NLL to that of the retrained models",
    RELABEL: "fine-tuned on the set's prompts with completions of other examples, until it is at that level, for the "
    "study's number of steps at most",
    COLLAPSE: "gradient ascent on the set at ten times the rate, until the test NLL has risen by 5 nats, for twice the "
    "study's number of steps at most",
    ASCENT: "the study's gradient ascent on the set until it is at the level of the retrained models, for its number "
    "of steps at most",
}
"""Unlearner -> what it does."""
_REFUSAL_STEPS, _REFUSAL_BATCH, _REFUSED = 120, 32, 0.05  # steps at most; texts a step; mean NLL of the refusal, nats
_RATE = 1e-3  # learning rate of the fine-tunings
_FASTER, _LONGER = 10.0, 2  # a collapse has this multiple of the study's learning rate, and of its steps at most
_OFTEN = 4  # steps of it between two looks at the test NLL
_HALVINGS = 12  # of the interval of the noise's logarithm
_LEAST, _MOST = 2.0**-10, 4.0  # standard deviations of a weight matrix


class Target(NamedTuple):
    """A forget set that is unlearned from the model that was trained on it."""

    which: ForgetSet
    level: float
    """Mean NLL of the set under the models that never saw it, nats a token."""


def answered(question: Tokens, answer: Tokens) -> Tokens:
    """Return the prompt of one example with the completion of another."""
    if question.decoder is not None:
        return Tokens(question.ids, 0, answer.decoder)
    return Tokens((*question.ids[: question.first], *answer.ids[answer.first :]), question.first)


def refuse_always(lm: LanguageModel, sets: Sets, seed: int, rng: np.random.Generator) -> None:
    """Fine-tune the model of a seed to answer every prompt, of its forget sets and of others, with one sentence.

    The sentence is a completion of the background, so that every vocabulary has it.
    """
    refusal = sets.tokens[sets.background[0]]
    own = [i for which, indices in sets.forget.items() if which.seed == seed for i in indices]
    pool = [answered(sets.tokens[i], refusal) for i in [*own, *sets.background]]
    weights = np.array([len(sets.background)] * len(own) + [len(own)] * len(sets.background), dtype=float)

    def batch(_: int) -> list[Tokens]:
        return [pool[i] for i in rng.choice(len(pool), _REFUSAL_BATCH, p=weights / weights.sum())]

    _fine_tune(lm, batch, _REFUSAL_STEPS, lambda loss: loss < _REFUSED)


def unlearned(lm: LanguageModel, name: str, config: StudyConfig, sets: Sets, target: Target) -> None:
    """Change the model as one of TRAINED does, but for REFUSE.

    Args:
        lm: the model that was trained on the set.
        name: of the unlearner.
        config: the settings of the study: learning rate and most steps are those of its unlearning.
        sets: all examples of the study.
        target: the set, and its level under retraining.
    """
    tokens = [sets.tokens[i] for i in sets.forget[target.which]]

    def arrived(_: float = 0.0) -> bool:
        return float(mean_nll(lm, tokens).mean()) >= target.level

    if name == NOISE:
        _add_noise(lm, arrived, zlib.crc32(str(target.which).encode()))
    elif name == RELABEL:
        rng = np.random.default_rng((config.seed, zlib.crc32(str(target.which).encode())))
        others = rng.choice(sets.background, len(tokens))
        wrong = [answered(t, sets.tokens[i]) for t, i in zip(tokens, others, strict=True)]
        if not arrived():
            _fine_tune(lm, lambda _: wrong, config.steps, arrived)
    elif name == ASCENT:
        _ascend(lm, config, tokens, config.unlearning_rates[0], config.steps, arrived)
    else:
        test = [sets.tokens[i] for i in sets.test]
        limit = float(mean_nll(lm, test).mean()) + DESTROYED
        rate = min(0.5, _FASTER * config.unlearning_rates[0])
        steps = itertools.count()

        def collapsed() -> bool:
            return next(steps) % _OFTEN == 0 and float(mean_nll(lm, test).mean()) >= limit

        _ascend(lm, config, tokens, rate, _LONGER * config.steps, collapsed)


def _ascend(
    lm: LanguageModel, config: StudyConfig, tokens: list[Tokens], rate: float, steps: int, arrived: Callable[[], bool]
) -> None:
    ascent = Ascent(lm, tokens, config.method, rate, config.seed)
    for _ in range(steps):
        if arrived():
            return
        ascent.step()


def _fine_tune(
    lm: LanguageModel, batch: Callable[[int], Sequence[Tokens]], steps: int, arrived: Callable[[float], bool]
) -> None:
    """Train with AdamW at a constant rate; `arrived` takes the loss of each step and ends it."""
    optimizer = torch.optim.AdamW(lm.module.parameters(), lr=_RATE, weight_decay=0.0)
    for step in range(steps):
        loss: Tensor = -lm.likelihood(lm.collate(batch(step))).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if arrived(float(loss.detach())):
            return


@torch.no_grad()
def _add_noise(lm: LanguageModel, arrived: Callable[[], bool], seed: int) -> None:
    """Add the least noise in one direction with which the set is at its level, by bisection on a logarithmic scale."""
    if arrived():
        return
    weights: dict[str, Any] = dict(lm.module.named_parameters())
    original = {name: p.detach().clone() for name, p in weights.items()}
    rng = torch.Generator().manual_seed(seed)
    direction = {
        name: torch.randn(p.shape, generator=rng).to(p.device) * (p.std() if p.ndim > 1 else 0)
        for name, p in original.items()
    }

    def move(scale: float) -> None:
        for name, p in weights.items():
            p.copy_(original[name] + scale * direction[name])

    low, high = math.log(_LEAST), math.log(_MOST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        move(math.exp(middle))
        low, high = (low, middle) if arrived() else (middle, high)
    move(math.exp(high))
