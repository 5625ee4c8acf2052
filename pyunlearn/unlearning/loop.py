"""Training loop: ascend on memorized examples and stop each at the level of text that was not trained on.

A round takes every active example once (16 optimizer steps at most), then scores the forget set and the texts of the
budgets. A round that may exceed a budget or over-unlearns an example is rolled back, and the learning rate is halved.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyunlearn.probes.non_members import NO_LIKELIER
from pyunlearn.progress import Progress
from pyunlearn.unlearning.budget import Rise
from pyunlearn.unlearning.checkpoint import Checkpoint
from pyunlearn.unlearning.config import LoopConfig
from pyunlearn.unlearning.distributed import Processes
from pyunlearn.unlearning.interrupt import DeferredInterrupt
from pyunlearn.unlearning.objectives import ForgetTerm, RetainTerm, finite
from pyunlearn.unlearning.optimizer import TrainedWeights
from pyunlearn.unlearning.schedule import Schedule
from pyunlearn.unlearning.setup import Session
from pyunlearn.unlearning.stopping import Measurement

Indices = NDArray[np.int64]

MAX_HALVINGS = 6
"""Largest number of halvings of the learning rate before a run ends."""

CHECKPOINT_SECONDS = 300
"""Least time between two checkpoints."""


class StepParts(NamedTuple):
    """Parts of a run that an optimizer step uses."""

    accelerator: Any
    processes: Processes
    schedule: Schedule
    forget_term: ForgetTerm
    retain_term: RetainTerm
    weights: TrainedWeights
    optimizer: Any  # the optimizer of the weights, prepared by the accelerator


def ascend(
    session: Session,
    weights: TrainedWeights,
    optimizer: Any,
    config: LoopConfig,
    checkpoint: Checkpoint,
    interrupt: DeferredInterrupt,
    bar: Progress,
) -> str:
    """Run rounds until every memorized example is forgotten, a limit is reached, or Ctrl-C.

    The model ends in the best state within the budget. `session.state.history` gets one record per step.

    Returns:
        The reason why it ended, see `Result.stopped`.
    """
    state, stopping, schedule = session.state, session.stopping, session.schedule
    learning_rate = config.learning_rate or 0.0
    parts = StepParts(
        session.accelerator,
        session.processes,
        schedule,
        session.forget_term,
        session.retain_term,
        weights,
        optimizer,
    )
    weights.set_learning_rate(learning_rate / 2**state.halvings)
    rejection_reason: str | None = None
    last_saved = time.monotonic()
    snapshot = state.snapshot()
    try:
        while state.step < config.max_steps and state.halvings <= MAX_HALVINGS:
            round_batches = schedule.round_batches(stopping.active, state.round_number, config.max_steps - state.step)
            if not round_batches:
                break
            records: list[dict[str, Any]] = []
            snapshot = state.snapshot()
            for forget_indices in round_batches:
                step = state.step + len(records)
                started = time.perf_counter()
                l1 = config.l1 * (1 - step / config.max_steps)
                record = optimizer_step(parts, forget_indices, step, max_grad_norm=config.max_grad_norm, l1=l1)
                state.visits[forget_indices] += 1
                interrupt.check()
                step_record = {
                    "step": step + 1,
                    "round": state.round_number,
                    "examples": [int(i) for i in forget_indices],
                    **record,
                    "learning_rate": learning_rate / 2**state.halvings,
                    "seconds": time.perf_counter() - started,
                }
                records.append(step_record)

            measurement = measure(session)
            rejection_reason, left_out = stopping.rejection_reason(measurement), []
            if rejection_reason is None:
                weights.accept()
                stopping.current = measurement
            else:
                weights.rollback()
                left_out = stopping.leave_out(measurement) if state.halvings else []  # first try a smaller rate
                state.halvings += not left_out  # without them the round may succeed at this rate
                weights.set_learning_rate(learning_rate / 2**state.halvings)
                state.restore(snapshot)
            records[-1] |= _round_record(session, measurement, rejection_reason) | {"left_out": left_out}
            state.step, state.round_number = state.step + len(records), state.round_number + 1
            state.history += records
            snapshot = state.snapshot()
            _show(session, bar)
            if session.processes.is_main and time.monotonic() - last_saved > CHECKPOINT_SECONDS:
                checkpoint.save(weights, state)
                last_saved = time.monotonic()
            interrupt.check()
    except KeyboardInterrupt:
        weights.rewind()
        state.restore(snapshot)
        if session.processes.is_main:
            checkpoint.save(weights, state)
        return "interrupted"
    if not stopping.memorized.any():
        return "nothing memorized"
    if not stopping.active.size:
        reached = NO_LIKELIER if stopping.non_members.grade == "self-sampled" else "forgotten"
        return "still extracted" if stopping.extracted.any() else reached
    return rejection_reason if state.halvings > MAX_HALVINGS and rejection_reason else "max_steps"


def optimizer_step(
    parts: StepParts, forget_indices: Indices, step: int, *, max_grad_norm: float, l1: float = 0.0
) -> dict[str, float | None]:
    """Take one optimizer step on some forget examples and the retain examples of step number `step`.

    Args:
        parts: the two terms of the loss, the weights, the optimizer and the processes.
        forget_indices: the forget examples.
        step: number of the step, from 0, which selects the retain examples.
        max_grad_norm: gradients are clipped to this norm.
        l1: strength of the l1 penalty in this step.

    Returns:
        The step's record for the history: forget_loss, the retain loss, gradient_norm.
    """
    accelerator, processes, schedule, forget_term, retain_term, weights, optimizer = parts
    # ------------------------------------------------------------------------------------------------
    optimizer.zero_grad()

    # forget term: gradients accumulate over micro-batches; it precedes the retain term, so only one graph is in memory
    forget_loss = 0.0
    for micro_batch in schedule.micro_batches(processes.shard(forget_indices)):
        with accelerator.autocast():
            loss = forget_term(micro_batch) / len(forget_indices)
        accelerator.backward(loss)
        forget_loss += loss.item()

    # retain term
    retain_batch, retain_total = None, 0.0
    if retain_term.active:
        retain_batch = retain_term.batch(schedule.retain_indices(step), forget_indices)
    if retain_batch is not None:
        for micro_batch in schedule.micro_batches(processes.shard(retain_batch.indices)):
            with accelerator.autocast():
                loss, amount = retain_term(micro_batch, retain_batch)
            accelerator.backward(loss)
            retain_total += amount

    # update: gradients are summed over processes, masked and clipped; the l1 penalty is a step of its own
    processes.sum_gradients(weights.parameters.values())
    weights.mask_gradients()
    gradient_norm = accelerator.clip_grad_norm_(weights.parameters.values(), max_grad_norm)
    optimizer.step()
    weights.shrink(l1)
    weights.restore_masked()
    # ------------------------------------------------------------------------------------------------
    losses = {"forget_loss": finite(processes.sum(forget_loss))}
    losses |= retain_term.report(processes.sum(retain_total), retain_batch)
    return losses | {"gradient_norm": finite(float(gradient_norm))}


def measure(session: Session) -> Measurement:
    """Score the forget set and the budgets' texts; when all exposures are at the target, measure extraction too."""
    scorer, texts, stopping = session.scorer, session.texts, session.stopping
    log_likelihood = scorer.mean_log_likelihood(texts.forget)
    utility = -scorer.mean_log_likelihood(texts.utility.tokens)
    holdout = -scorer.mean_log_likelihood(texts.holdout) if texts.holdout else None
    measurement = stopping.measurement(log_likelihood, utility, holdout)
    near = stopping.near_target(measurement)
    if not (near.size and stopping.all_near_target(measurement)):
        return measurement
    return stopping.with_extraction(measurement, near, scorer.greedy_match([texts.forget[i] for i in near]))


def _round_record(session: Session, measurement: Measurement, rejection_reason: str | None) -> dict[str, Any]:
    """Return the record of a round for the history."""
    return {
        "accepted": rejection_reason is None,
        "rejection_reason": rejection_reason,
        "active": len(session.stopping.active),
        **_rise_record("utility", measurement.utility),
        **_rise_record("holdout", measurement.holdout),
        "mean_log_likelihood": [finite(x) for x in measurement.log_likelihood],
        "exposure": [finite(x) for x in measurement.exposure.lower],
        "extraction": [finite(x) for x in measurement.extraction],
    }


def _rise_record(name: str, rise: Rise | None) -> dict[str, float | None]:
    """Return the rise of some texts and the upper end of its interval; None where they have no budget."""
    values = (None, None) if rise is None else (finite(rise.estimate), finite(rise.upper))
    return dict(zip((f"{name}_rise", f"{name}_rise_upper"), values, strict=True))


def _show(session: Session, bar: Progress) -> None:
    """Update the progress bar."""
    state, stopping = session.state, session.stopping
    memorized, active = int(stopping.memorized.sum()), len(stopping.active)
    costs = [(budget.name.split()[0], rise.upper, budget.allowed) for budget, rise in stopping.budgets]
    bar.update(state.step, memorized, active, costs, state.halvings)
