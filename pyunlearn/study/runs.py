"""Unlearning runs: gradient ascent on one forget set, with every measurement along the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator

from pyunlearn.data import Tokens
from pyunlearn.errors import ArgumentError
from pyunlearn.methods import METHODS
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.scoring import Scorer
from pyunlearn.study.config import StudyConfig
from pyunlearn.study.sets import ForgetSet, Sets
from pyunlearn.unlearning.distributed import Processes
from pyunlearn.unlearning.loop import StepParts, optimizer_step
from pyunlearn.unlearning.objectives import ForgetTerm, RetainTerm
from pyunlearn.unlearning.optimizer import TrainedWeights
from pyunlearn.unlearning.reference import Reference
from pyunlearn.unlearning.schedule import Schedule

DESTROYED = 5.0
"""Nats by which the test NLL may rise before a run ends."""
_BATCH_SIZE = 128  # texts scored together


class Job(NamedTuple):
    """One unlearning run."""

    which: ForgetSet
    rate: float

    @property
    def file(self) -> str:
        """The name of its trajectory in the folder."""
        return f"runs/{self.which}-lr{self.rate:g}.safetensors"


def jobs(config: StudyConfig, sets: Sets, seed: int) -> list[Job]:
    """Return a job for every forget set of a seed at every learning rate."""
    return [Job(which, rate) for rate in config.unlearning_rates for which in sets.forget if which.seed == seed]


def require_method(name: str) -> None:
    """Raise ArgumentError unless the method needs nothing but the forget text, and perhaps the model before the run."""
    usable = [
        m.name
        for m in METHODS.values()
        if m.roles == ("forget",) and m.kind in ("example", "token") and set(m.needs) <= {"reference"}
    ]
    if name not in usable:
        raise ArgumentError(f"method must be one that reads the forget text alone ({', '.join(usable)}), got {name!r}")


def measured_steps(steps: int) -> list[int]:
    """Return the steps after which a run is measured: 0 to 4, then two in each doubling, and the last.

    >>> measured_steps(20)
    [0, 1, 2, 3, 4, 6, 8, 12, 16, 20]
    """
    grid, step = [0, 1, 2, 3], 4
    while step <= steps:
        grid += [step, step * 3 // 2]
        step *= 2
    return sorted({s for s in grid if s <= steps} | {steps})


def mean_nll(lm: LanguageModel, tokens: Sequence[Tokens]) -> Any:
    """Return (n,) mean NLL, nats per token."""
    return -Scorer(lm, _BATCH_SIZE).mean_log_likelihood(tokens)


def unlearn_set(lm: LanguageModel, config: StudyConfig, sets: Sets, job: Job) -> dict[str, Any]:
    """Unlearn one forget set, and measure the model along the way.

    Every step takes the whole set; AdamW at a constant rate, without weight decay or clipping; no retain term; dropout
    off. A run ends after `steps`, or before where a number is not finite or the test NLL has risen by 5 nats. The model
    gives every text a finite number before; it is changed.

    Returns an array for each measure, with a row for each of T measurements:
        steps (T,); nll (T, n) of the forget examples; non_member_nll (T, m); test_nll (T,), nats per token
    """
    which = job.which
    groups = [sets.forget[which], sets.non_members(which.kind, which.seed, config.non_members), sets.test]
    tokens, edges = [sets.tokens[i] for group in groups for i in group], np.cumsum([len(g) for g in groups])[:-1]
    ascent = Ascent(lm, tokens[: edges[0]], config.method, job.rate, config.seed)
    rows: list[tuple[Any, ...]] = []
    for step in range(config.steps + 1):
        if step in measured_steps(config.steps):
            nll = mean_nll(lm, tokens)
            if not np.isfinite(nll).all():
                break
            forget, non_members, test = np.split(nll, edges)
            rows.append((step, forget, non_members, test.mean()))
            if step == config.steps or rows[-1][3] > rows[0][3] + DESTROYED:
                break
        ascent.step()
    names = ("steps", "nll", "non_member_nll", "test_nll")
    return {name: np.array(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}


_NO_CLIPPING = 1e12  # norm of gradients


class Ascent:
    """Gradient ascent on the examples of one forget set, by the optimizer step of `pyunlearn.unlearn`.

    Args:
        lm: the model, in evaluation mode; all its parameters are trained.
        tokens: the forget examples.
        method: the name of the forget loss, with its default options.
        rate: the learning rate of AdamW, constant.
        seed: seed of the schedule.
    """

    def __init__(self, lm: LanguageModel, tokens: list[Tokens], method: str, rate: float, seed: int) -> None:
        accelerator, forget_loss, reference = Accelerator(mixed_precision="no"), METHODS[method], Reference()
        if "reference" in forget_loss.needs:
            scorer = Scorer(lm, batch_size=1)
            reference.read_log_likelihoods(scorer, lm.likelihood, forget_loss, {"forget": tokens}, None)
        visits = np.zeros(len(tokens), dtype=np.int64)
        weights = TrainedWeights(lm.module, rate, momentum=0.9)
        self.indices = np.arange(len(tokens))
        self.parts = StepParts(
            accelerator,
            Processes(accelerator),
            Schedule(batch_size=len(tokens), micro_batch_size=None, retain_examples=0, seed=seed),
            ForgetTerm(lm, forget_loss, {}, {"forget": tokens}, reference=reference, visits=visits),
            RetainTerm(lm, None, 0.0, None, reference=reference),
            weights,
            weights.optimizer,
        )

    def step(self) -> None:
        """Take one optimizer step on the mean forget loss of all examples, without clipping."""
        optimizer_step(self.parts, self.indices, 0, max_grad_norm=_NO_CLIPPING)
