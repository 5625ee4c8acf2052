"""Scores of a run under the present weights: after a round, at its end, and after a merge."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pyunlearn.errors import DataError
from pyunlearn.probes.non_members import NO_LIKELIER
from pyunlearn.progress import logger
from pyunlearn.unlearning.endings import UNDONE
from pyunlearn.unlearning.setup import Session
from pyunlearn.unlearning.stopping import Measurement

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


def measure(session: Session, indices: Indices) -> Measurement:
    """Score the forget examples at `indices` and the budgets' texts; the other examples keep their numbers."""
    scorer, texts, stopping = session.scorer, session.texts, session.stopping
    log_likelihood, extraction = _rescored(session, indices)
    utility = -scorer.mean_log_likelihood(texts.utility.tokens)
    holdout = -scorer.mean_log_likelihood(texts.holdout) if texts.holdout else None
    return _extraction(session, stopping.measurement(log_likelihood, utility, holdout, extraction))


def resume_scores(session: Session) -> None:
    """Continue the stopping rule from the scores of the checkpoint that was loaded."""
    scorer, texts = session.scorer, session.texts
    if session.state.scores:
        utility = -scorer.mean_log_likelihood(texts.utility.tokens)
        holdout = -scorer.mean_log_likelihood(texts.holdout) if texts.holdout else None
        if session.robustness is not None:
            session.robustness.resume(session.state.scores)
        session.stopping.resume(session.state.scores, utility, holdout)
        if reason := session.stopping.rejection_reason(session.stopping.current):
            raise DataError(
                f"the state in the checkpoint does not pass the test of a round ({reason}): delete it and start again"
            )


def refresh(session: Session) -> None:
    """Score the examples that were not scored under the present weights, so that all numbers are theirs."""
    stopping = session.stopping
    compare_with_non_members(session)
    stale = np.flatnonzero(stopping.stale)
    if not stale.size:
        return
    log_likelihood, extraction = _rescored(session, stale)
    stopping.refresh(_extraction(session, stopping.rescored(log_likelihood, extraction)), stale)


def after_merge(session: Session, stopped: str) -> str:
    """Score all texts under weights into which an adapter was merged; return why the run ended."""
    everything = np.arange(len(session.texts.forget))
    measurement = measure(session, everything)
    reason = session.stopping.rejection_reason(measurement)
    session.stopping.accept(measurement, everything)
    refresh(session)
    if reason:
        logger.warning(f"the merged model does not pass the test of a round ({reason}): the adapter alone did")
        return reason
    undone = stopped in ("forgotten", NO_LIKELIER) and session.stopping.unsettled.size
    return UNDONE if undone else stopped


def compare_with_non_members(session: Session) -> None:
    """Compare with the non-members under the present weights, where these have changed."""
    if session.stopping.anchor_is_old:
        session.stopping.compare_with(-session.scorer.mean_log_likelihood(session.texts.non_members))


def _rescored(session: Session, indices: Indices) -> tuple[Floats, Floats]:
    """Return (B,) log-likelihoods and extractions, of the examples at `indices` new and not yet measured."""
    current = session.stopping.current
    log_likelihood, extraction = current.log_likelihood.copy(), current.extraction.copy()
    log_likelihood[indices] = session.scorer.mean_log_likelihood([session.texts.forget[i] for i in indices])
    extraction[indices] = np.nan
    return log_likelihood, extraction


def _extraction(session: Session, measurement: Measurement) -> Measurement:
    """Add what is extracted of the examples of which it is not known, when all exposures are at the target."""
    stopping = session.stopping
    if not stopping.all_near_target(measurement):
        return measurement
    near = stopping.near_target(measurement)
    unknown = near[np.isnan(measurement.extraction[near])]
    extracted = session.scorer.greedy_match([session.texts.forget[i] for i in unknown])
    return stopping.with_extraction(measurement, unknown, extracted)
