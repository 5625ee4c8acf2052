"""Training loop: ascend on memorized examples and stop each at the level of text that was not trained on.

A round takes every active example once (16 optimizer steps at most) and trains on those that went too far, then scores
these, some others and the texts of the budgets. A round that may exceed a budget is rolled back. The step size
grows while rounds are cheap and is halved where they are not, see `step_size`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pyunlearn.probes.non_members import NO_LIKELIER
from pyunlearn.progress import Progress, logger
from pyunlearn.unlearning.budget import Rise
from pyunlearn.unlearning.checkpoint import Checkpoint
from pyunlearn.unlearning.config import LoopConfig
from pyunlearn.unlearning.distributed import Processes
from pyunlearn.unlearning.endings import explained, require_gradient
from pyunlearn.unlearning.forecast import Forecast, Pace, duration, share_done
from pyunlearn.unlearning.interrupt import DeferredInterrupt
from pyunlearn.unlearning.measuring import compare_with_non_members, measure, refresh
from pyunlearn.unlearning.objectives import ForgetTerm, RetainBatch, RetainTerm, finite
from pyunlearn.unlearning.optimizer import TrainedWeights
from pyunlearn.unlearning.schedule import Schedule
from pyunlearn.unlearning.setup import Session
from pyunlearn.unlearning.step_size import LARGEST_EXPONENT, NEAR, StepSize
from pyunlearn.unlearning.stopping import Measurement, StoppingRule

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

ROUNDS_PER_ANCHOR = 8
"""Rounds between two scores of the non-members."""

_NO_MEMORY = ("out of memory", "can't allocate memory")


class StepParts(NamedTuple):
    """Parts of a run that an optimizer step uses."""

    accelerator: Any
    processes: Processes
    schedule: Schedule
    forget_term: ForgetTerm
    retain_term: RetainTerm
    weights: TrainedWeights
    optimizer: Any  # the optimizer of the weights, prepared by the accelerator
    unseen_term: RetainTerm | None = None  # holds the model's answers to prompts that no record has


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
    state, stopping, schedule, robustness = session.state, session.stopping, session.schedule, session.robustness
    learning_rate = config.learning_rate or 0.0
    parts = StepParts(
        session.accelerator, session.processes, schedule, session.forget_term, session.retain_term, weights, optimizer,
        session.unseen_term,
    )  # fmt: skip
    weights.set_learning_rate(state.step_size.rate(learning_rate))
    rejection_reason: str | None = None
    pace = Pace(Forecast.of(session), share_done(session))
    if session.processes.is_main:
        logger.info(pace.forecast.line)
    _show(session, bar, pace)
    last_saved, interval = time.monotonic(), 60 * config.checkpoint_every
    snapshot = state.snapshot()
    try:
        while state.step < session.max_steps and not state.step_size.exhausted:
            try:
                if robustness is not None and robustness.due(state.round_number):
                    robustness.probe(weights, state)
                order, steps_left = robustness or schedule, session.max_steps - state.step
                round_batches = order.round_batches(stopping.unsettled, state.round_number, steps_left)
                if not round_batches:
                    break
                snapshot = state.snapshot()
                taken = np.concatenate(round_batches)
                scored = schedule.scored(taken, len(session.texts.forget), state.round_number)
                records = _round(session, parts, round_batches, config, interrupt)
                if not state.history:
                    require_gradient(records)
                measurement = measure(session, scored)
            except RuntimeError as error:
                if not _with_less_memory(session, error):
                    raise explained(error) from error.__cause__
                _rewind(session, weights, snapshot)
                continue
            rejection_reason = stopping.rejection_reason(measurement)
            with interrupt.shielded():  # scores, weights and state change together, or a result would mix two rounds
                if rejection_reason is None:
                    step_size = _accept(session, measurement, scored, taken)
                else:
                    step_size = state.step_size.after(accepted=False)
                _store(session, weights, step_size, None if rejection_reason is None else snapshot)
                weights.set_learning_rate(step_size.rate(learning_rate))
                records[-1] |= _round_record(session, measurement, scored, rejection_reason)
                state.step, state.round_number = state.step + len(records), state.round_number + 1
                state.history += records
                snapshot = state.snapshot()
            _show(session, bar, pace, records)
            if session.processes.writes(due=time.monotonic() - last_saved > interval):
                with interrupt.shielded():
                    checkpoint.save(weights, state)
                last_saved = time.monotonic()
            interrupt.check(session.processes.any)
    except BaseException as error:
        with interrupt.shielded():
            _rewind(session, weights, snapshot)
            if session.processes.writes_after(error):
                checkpoint.save(weights, state)
        if not isinstance(error, KeyboardInterrupt):
            raise
        return "interrupted"  # the numbers are those of the last round, see `refresh`
    refresh(session)
    weights.optimizer.zero_grad(set_to_none=True)
    if session.processes.writes():
        checkpoint.save(weights, state)  # until the result is on the disk
    return _ending(session, rejection_reason)


def _ending(session: Session, rejection_reason: str | None) -> str:
    """Return why a run ended; `rejection_reason` is that of its last round."""
    state, stopping = session.state, session.stopping
    if not stopping.memorized.any():
        return "nothing memorized"
    if not stopping.unsettled.size:
        reached = NO_LIKELIER if stopping.non_members.grade == "self-sampled" else "forgotten"
        return "still extracted" if stopping.extracted.any() else reached
    return rejection_reason if state.step_size.exhausted and rejection_reason else "max_steps"


def _store(session: Session, weights: TrainedWeights, step_size: StepSize, before: tuple[Any, Any] | None) -> None:
    """Store the weights and scores of an accepted round, or return to those of the snapshot `before` a rejected one."""
    state = session.state
    if before is None:
        weights.accept()
        state.scores = session.stopping.scores | ({} if session.robustness is None else session.robustness.scores)
    else:
        weights.rollback()
        state.restore(before)
    state.step_size = step_size


def _rewind(session: Session, weights: TrainedWeights, snapshot: tuple[Any, Any]) -> None:
    """Return to the last accepted state, from which a run resumes; the model holds no gradients then."""
    weights.rewind()
    weights.optimizer.zero_grad(set_to_none=True)
    session.state.restore(snapshot)


def _with_less_memory(session: Session, error: RuntimeError) -> bool:
    """Halve the examples of a pass after an error for lack of memory; return False where that is impossible."""
    size = session.schedule.micro_batch_size
    lack = isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _NO_MEMORY)
    if not lack or size == 1 or session.processes.count > 1:  # other processes would wait for this one
        return False
    session.schedule.micro_batch_size = -(-size // 2)
    session.scorer.batch_size = max(1, session.scorer.batch_size // 2)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    logger.warning(f"out of memory: the run continues with {session.schedule.micro_batch_size} examples in a pass")
    return True


def _round(
    session: Session,
    parts: StepParts,
    round_batches: list[Indices],
    config: LoopConfig,
    interrupt: DeferredInterrupt,
) -> list[dict[str, Any]]:
    """Take the optimizer steps of a round; return their records for the history."""
    state, stopping, overshot = session.state, session.stopping, session.stopping.overshot
    # "nll" alone would learn the retain set by heart while the forget term is weak, unless it is known by heart already
    learns = session.retain_term.active and session.retain_term.loss == "nll" and not session.texts.utility.known
    forget_weight = 1.0 if learns else stopping.forget_weight
    forget_weight *= state.step_size.forget_weight
    scale = parts.forget_term.scale(stopping.current.log_likelihood, stopping.active)
    above, returning = np.zeros_like(overshot), stopping.returning
    above[stopping.active] = True
    settled = overshot | returning & ~above  # to be held at the level of the non-members
    parts.forget_term.aim(stopping.level, stopping.likely)
    records: list[dict[str, Any]] = []
    for indices in round_batches:
        step = state.step + len(records)
        started = time.perf_counter()
        restored, again = indices[settled[indices]], indices[returning[indices]]
        begin = None
        if session.robustness is not None and again.size:
            begin = partial(
                session.robustness.backward,
                parts.weights,
                parts.forget_term,
                again,
                round_number=state.round_number,
                step=step,
                factor=forget_weight / parts.forget_term.divisor(indices),
            )
        record = optimizer_step(
            parts,
            indices[~settled[indices]],
            step,
            max_grad_norm=config.max_grad_norm,
            l1=config.l1 * (1 - step / session.max_steps),
            forget_weight=scale * forget_weight,
            restored=restored,
            begin=begin,
        )
        state.visits[indices] += 1
        interrupt.check(session.processes.any)
        step_record = {
            "step": step + 1,
            "round": state.round_number,
            "examples": [int(i) for i in indices],
            "restored": [int(i) for i in restored],
            **record,
            "learning_rate": state.step_size.rate(config.learning_rate or 0.0),
            "forget_weight": finite(scale * forget_weight),
            "seconds": time.perf_counter() - started,
        }
        records.append(step_record)
    return records


def _accept(session: Session, measurement: Measurement, scored: Indices, taken: Indices) -> StepSize:
    """Take the measurement of an accepted round as the present state; return the step size of the next round."""
    state, stopping = session.state, session.stopping
    used_before, before = stopping.budget_used, stopping.current.log_likelihood
    settled, unsettled = stopping.accept(measurement, scored)
    step_size = state.step_size.after(
        accepted=True,
        budget_used=stopping.budget_used,
        round_cost=stopping.budget_used - used_before,
        moved=_moved(stopping, measurement.log_likelihood - before, taken),
        settled=settled,
        unsettled=unsettled,
        active=len(stopping.active) + int(stopping.returning.sum()),
    )
    if not stopping.unsettled.size:
        refresh(session)
    elif state.round_number % ROUNDS_PER_ANCHOR == ROUNDS_PER_ANCHOR - 1:
        compare_with_non_members(session)
    return step_size


def _moved(stopping: StoppingRule, change: Floats, taken: Indices) -> float:
    """Return by how much a round moved its examples, nats a token; a returning one counts as moved by NEAR at least."""
    return float(np.maximum(np.abs(change), NEAR * stopping.returning)[taken].mean())


def optimizer_step(
    parts: StepParts,
    forget_indices: Indices,
    step: int,
    *,
    max_grad_norm: float,
    l1: float = 0.0,
    forget_weight: float = 1.0,
    restored: Indices | None = None,
    begin: Callable[[], None] | None = None,
) -> dict[str, float | None]:
    """Take one optimizer step on some forget examples and the retain examples of step number `step`.

    Args:
        parts: the two terms of the loss, the weights, the optimizer and the processes.
        forget_indices: the forget examples.
        step: number of the step, from 0, which selects the retain examples.
        max_grad_norm: gradients are clipped to this norm.
        l1: strength of the l1 penalty in this step.
        forget_weight: factor on the forget loss.
        restored: overshot examples, which the step brings back.
        begin: adds further gradients, before all others.

    Returns:
        The step's record for the history: forget_loss, the retain loss, gradient_norm.
    """
    accelerator, processes, schedule, forget_term, retain_term, weights, optimizer, unseen_term = parts
    restored = np.empty(0, dtype=np.int64) if restored is None else restored
    divisor = forget_term.divisor(forget_indices, restored)
    # ------------------------------------------------------------------------------------------------
    optimizer.zero_grad()
    if begin is not None:
        begin()

    # forget term: gradients accumulate over micro-batches; it precedes the retain term, so only one graph is in memory
    forget_loss = 0.0
    for micro_batch, counts in processes.micro_batches(schedule, forget_indices):
        with accelerator.autocast():
            loss = counts * forget_term(micro_batch) / divisor
        accelerator.backward(forget_weight * loss)
        forget_loss += loss.item()

    # overshot examples
    for micro_batch, counts in processes.micro_batches(schedule, restored):
        with accelerator.autocast():
            loss = counts * forget_term.restore(micro_batch) / divisor
        accelerator.backward(loss)

    # retain term
    retain_batch, retain_total = None, 0.0
    if retain_term.active:
        retain_batch = retain_term.batch(schedule.retain_indices(step), [*forget_indices, *restored])
        retain_total = _retain_backward(parts, retain_term, retain_batch)
    if unseen_term is not None:
        unseen_batch = unseen_term.batch(schedule.in_turn(step, len(unseen_term.retain)))
        _retain_backward(parts, unseen_term, unseen_batch)

    # update: gradients are summed over processes, masked and clipped; the l1 penalty is a step of its own
    processes.sum_gradients(weights.parameters.values())
    weights.mask_gradients()
    gradient_norm = processes.clip_gradients(weights.parameters.values(), max_grad_norm)
    optimizer.step()
    weights.shrink(l1)
    weights.restore_masked()
    # ------------------------------------------------------------------------------------------------
    losses = {"forget_loss": finite(processes.sum(forget_loss))}
    losses |= retain_term.report(processes.sum(retain_total), retain_batch)
    return losses | {"gradient_norm": finite(gradient_norm)}


def _retain_backward(parts: StepParts, term: RetainTerm, batch: RetainBatch | None) -> float:
    """Add the gradients of a retain term; return this process's sum for the history."""
    total = 0.0
    if batch is None:
        return total
    for micro_batch, counts in parts.processes.micro_batches(parts.schedule, batch.indices):
        with parts.accelerator.autocast():
            loss, amount = term(micro_batch, batch)
        parts.accelerator.backward(counts * loss)
        total += counts * amount
    return total


def _round_record(
    session: Session, measurement: Measurement, scored: Indices, rejection_reason: str | None
) -> dict[str, Any]:
    """Return the record of a round for the history."""
    stopping = session.stopping
    if rejection_reason is None:
        measurement = stopping.current
    return {
        "accepted": rejection_reason is None,
        "rejection_reason": rejection_reason,
        "active": len(stopping.active),
        "overshot": int(stopping.overshot.sum()),
        **_rise_record("utility", measurement.utility),
        **_rise_record("holdout", measurement.holdout),
        "scored": [int(i) for i in scored],
        "mean_log_likelihood": [finite(x) for x in measurement.log_likelihood[scored]],
        "exposure": [finite(x) for x in measurement.exposure.lower[scored]],
        "extraction": [finite(x) for x in measurement.extraction[scored]],
    }


def _rise_record(name: str, rise: Rise | None) -> dict[str, float | None]:
    """Return the rise of some texts and the upper end of its interval; None where they have no budget."""
    values = (None, None) if rise is None else (finite(rise.estimate), finite(rise.upper))
    return dict(zip((f"{name}_rise", f"{name}_rise_upper"), values, strict=True))


def _show(session: Session, bar: Progress, pace: Pace, records: Sequence[dict[str, Any]] = ()) -> None:
    """Update the progress bar, and pass the records of the last round on."""
    state, stopping = session.state, session.stopping
    memorized, left = int(stopping.memorized.sum()), len(stopping.unsettled)
    costs = [(budget.name.split()[0], rise.upper, budget.allowed) for budget, rise in stopping.budgets]
    done, exponent = share_done(session), min(state.step_size.exponent, LARGEST_EXPONENT)
    remaining = duration(pace.left(done))
    bar.update(state.step, session.max_steps, memorized, left, costs, exponent, done, remaining)
    if session.on_step is not None and session.processes.is_main:
        for record in records:
            session.on_step(copy.deepcopy(record))
