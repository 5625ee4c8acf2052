"""Unlearning runs: gradient ascent on one forget set, with every measurement along the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator

from pyunlearn.data import Tokens
from pyunlearn.errors import ArgumentError
from pyunlearn.methods import METHODS
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.scoring import Scorer
from pyunlearn.study.config import StudyConfig
from pyunlearn.study.folder import Folder
from pyunlearn.study.models import load_model
from pyunlearn.study.reference_models import score, translation_bleu
from pyunlearn.study.sets import ForgetSet, Sets
from pyunlearn.unlearning.distributed import Processes
from pyunlearn.unlearning.loop import StepParts, optimizer_step
from pyunlearn.unlearning.objectives import ForgetTerm, RetainTerm
from pyunlearn.unlearning.optimizer import TrainedWeights
from pyunlearn.unlearning.reference import Reference
from pyunlearn.unlearning.schedule import Schedule

_MEASURES = ("steps", "nll", "accuracy", "non_member_nll", "test_nll", "bleu", "moved")
_DESTROYED = 5.0  # nats by which the test NLL may rise before a run ends


class Job(NamedTuple):
    """One unlearning run."""

    which: ForgetSet
    rate: float

    @property
    def file(self) -> str:
        """The name of its trajectory in the folder."""
        return f"runs/{self.which}-lr{self.rate:g}.safetensors"


def jobs(config: StudyConfig, sets: Sets) -> list[Job]:
    """Return a job for every forget set at every learning rate; those of one rate and model together."""
    return [Job(which, rate) for rate in config.unlearning_rates for which in sets.forget]


def require_method(name: str) -> None:
    """Raise ArgumentError unless the method needs nothing but the forget text, and perhaps the model before the run."""
    usable = [
        m.name
        for m in METHODS.values()
        if m.roles == ("forget",) and m.kind in ("example", "token") and set(m.needs) <= {"reference"}
    ]
    if name not in usable:
        raise ArgumentError(f"method must be one that reads the forget text alone ({', '.join(usable)}), got {name!r}")


def run_all(
    folder: Folder, config: StudyConfig, tokenizer: Any, sets: Sets, device: str, say: Callable[[str], None]
) -> None:
    """Make every trajectory that is not finished: see `unlearn_set`."""
    lm, loaded = None, None
    todo = [job for job in jobs(config, sets) if not folder.has(job.file)]
    for number, job in enumerate(todo, 1):
        name = f"main-{job.which.draw}"
        if loaded != name:
            lm, loaded = load_model(folder.path / "models" / name, tokenizer, device), name
            original = {k: v.clone() for k, v in lm.module.state_dict().items()}
        assert lm is not None
        lm.module.load_state_dict(original)
        say(f"run {number} of {len(todo)}: {job.which}, rate {job.rate:g}")
        folder.arrays(job.file, **unlearn_set(lm, config, sets, job))


def unlearn_set(lm: LanguageModel, config: StudyConfig, sets: Sets, job: Job) -> dict[str, Any]:
    """Unlearn one forget set, and measure the model at every few steps.

    Minibatches of the set come in an order drawn from the seed; AdamW at a constant rate, without weight decay or
    clipping; no retain term; dropout off. A run ends after `steps`, or before where a number is not finite or the test
    NLL has risen by 5 nats. The model is changed.

    Returns an array for each measure, with a row for each of T measurements:
        steps (T,); nll, accuracy (T, n) of the forget examples; non_member_nll (T, m); test_nll (T,);
        bleu (T,), NaN where it was not taken; moved (T,), Euclidean distance of the weights from the start
    """
    ascent = Ascent(lm, [sets.tokens[i] for i in sets.forget[job.which]], config.method, job.rate, config.seed)
    trajectory = _Trajectory(lm, config, sets, job.which)
    seed = (config.seed, job.which.draw, job.which.repetitions)
    minibatches = _minibatches(len(ascent.tokens), config.unlearning_batch, seed)
    for step in range(config.steps + 1):
        due = step % config.every == 0 or step == config.steps
        if due and trajectory.measure(step):
            break
        ascent.step(next(minibatches))
    return trajectory.arrays()


def _minibatches(count: int, size: int, seed: tuple[int, ...]) -> Iterator[list[int]]:
    """Yield minibatches of indices without end: each epoch a new permutation, less an incomplete last batch."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(count).tolist()
        while len(order) >= min(size, count):
            yield order[:size]
            order = order[size:]


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
        self.tokens = tokens
        self.parts = StepParts(
            accelerator,
            Processes(accelerator),
            Schedule(batch_size=len(tokens), micro_batch_size=None, retain_examples=0, seed=seed),
            ForgetTerm(lm, forget_loss, {}, {"forget": tokens}, reference=reference, visits=visits),
            RetainTerm(lm, None, 0.0, None, reference=reference),
            weights,
            weights.optimizer,
        )

    def step(self, indices: list[int]) -> None:
        """Take one optimizer step on the mean forget loss of the examples at `indices`, without clipping."""
        optimizer_step(self.parts, np.array(indices), 0, max_grad_norm=_NO_CLIPPING)


class _Trajectory:
    """The measurements of one run."""

    def __init__(self, lm: LanguageModel, config: StudyConfig, sets: Sets, which: ForgetSet) -> None:
        self.lm, self.config, self.sets = lm, config, sets
        self.n, self.m = len(sets.forget[which]), len(sets.non_members[which.kind])
        self.indices = [*sets.forget[which], *sets.non_members[which.kind], *sets.test]
        self.original = [p.detach().clone() for p in lm.module.parameters()]
        self.rows: list[dict[str, Any]] = []

    def measure(self, step: int) -> bool:
        """Measure the model after `step` steps; return True where the run has to end here."""
        n, m = self.n, self.m
        nll, accuracy = score(self.lm, [self.sets.tokens[i] for i in self.indices])
        if not np.isfinite(nll).all():
            return True
        test_nll = float(nll[n + m :].mean())
        first = self.rows[0]["test_nll"] if self.rows else test_nll
        last = step == self.config.steps or test_nll > first + _DESTROYED
        translates = last or len(self.rows) % self.config.bleu_every == 0
        self.rows.append(
            {
                "steps": step,
                "nll": nll[:n],
                "accuracy": accuracy[:n],
                "non_member_nll": nll[n : n + m],
                "test_nll": test_nll,
                "bleu": translation_bleu(self.lm, self.sets, self.config) if translates else math.nan,
                "moved": self._moved(),
            }
        )
        return last

    def arrays(self) -> dict[str, Any]:
        """Return name -> the values of all measurements, (T, ...)."""
        return {name: np.array([row[name] for row in self.rows]) for name in _MEASURES}

    def _moved(self) -> float:
        pairs = zip(self.lm.module.parameters(), self.original, strict=True)
        return math.sqrt(sum(float((p.detach() - before).square().sum()) for p, before in pairs))
