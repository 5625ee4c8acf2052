"""Result of a run: verdicts, utility, and notes on what they rest on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyunlearn.data import Example
from pyunlearn.data.lazy import LazyList
from pyunlearn.edits.masks import digest_of
from pyunlearn.models.condition import weights_of
from pyunlearn.output import versions
from pyunlearn.probes.long_texts import Part
from pyunlearn.probes.non_members import NO_LIKELIER, capped, evidence_notes, power_notes
from pyunlearn.probes.recitation import recitations
from pyunlearn.probes.renderings import RenderedTexts
from pyunlearn.unlearning.budget import budget_notes
from pyunlearn.unlearning.config import UnlearnConfig
from pyunlearn.unlearning.endings import advice, some
from pyunlearn.unlearning.result import PASSED, ExampleResult, Result, Utility, document_notes
from pyunlearn.unlearning.setup import Session


def result_of(
    session: Session,
    config: UnlearnConfig,
    model: Any,
    texts: RenderedTexts,
    stopped: str,
    inputs: dict[str, Any],
) -> Result:
    """Return the result of a run; `inputs` describes the arguments of `unlearn` besides its settings."""
    examples = _examples(session, texts.examples["forget"], texts.encoded.parts, texts.encoded.forms)
    settings = versions() | inputs | config.to_dict() | {"mask": digest_of(config.mask)}
    settings |= {
        "weights": weights_of(model),
        "method_used": session.forget_term.method.name,
        "retain_loss_used": session.retain_term.loss if session.retain_term.active else None,
    }
    if "winners" in settings["method_options"]:  # texts
        settings["method_options"]["winners"] = "list"
    if stopped in ("forgotten", NO_LIKELIER) and any(e.recited_after for e in examples):
        stopped = "still extracted"
    return Result(
        model,
        session.scorer.lm.tokenizer,
        examples,
        _utility(session),
        stopped,
        session.stopping.non_member_scores.tolist(),
        session.state.history,
        settings,
        evidence=session.stopping.non_members.grade,
        rendering=texts.name,
    )


def notes_of(session: Session, texts: RenderedTexts, result: Result, config: UnlearnConfig) -> list[str]:
    """Return notes on the rendering, the texts, the evidence and the end of the run, one sentence each."""
    stopping = session.stopping
    memorized = any(e.verdict != "not memorized" for e in result.examples)
    verdicts, rate = [e.verdict for e in result.examples if not e.form], config.false_discovery_rate
    notes = texts.notes(memorized=memorized) + session.texts.utility.notes
    notes += evidence_notes(stopping.non_members, verdicts, rate=rate)
    if (others := texts.encoded.other_forms) is not None and not stopping.memorized[stopping.groups[0] > 0].any():
        fewest, forms = int(np.bincount(others.numbers[1])[1:].min()), len(result.examples) - len(verdicts)
        notes += power_notes(fewest, forms, rate=rate, noun="other forms")
    ending = budget_notes(result.stopped, result.history, [budget for budget, _ in stopping.budgets])
    left = [e.label for i, e in enumerate(result.examples) if stopping.memorized[i] and e.verdict not in PASSED]
    notes += ending or advice(
        result.stopped,
        left=left,
        memorized=int(stopping.memorized.sum()),
        visits=float(session.state.visits[stopping.memorized].mean()) if stopping.memorized.any() else 0.0,
        budget_used=stopping.budget_used,
        limit=config.max_steps,
        has_retain=session.texts.retain is not None and not session.sampled.get("held"),
        method=session.forget_term.method.name,
        rounds=config.gguf_like is not None,
    )
    if session.robustness is not None and (back := int(stopping.returning.sum())):
        notes.append(
            f"In the last probe, fine-tuning on other text brought back {back} of {int(stopping.memorized.sum())} "
            "memorized texts: a larger max_steps would help most."
        )
    notes += _learned_notes(session, result.examples)
    return notes + _retained_notes(session, texts) + document_notes(result.documents)


def _learned_notes(session: Session, examples: Sequence[ExampleResult]) -> list[str]:
    """Return a sentence on the texts that were not memorized before the run, and stand out after it."""
    stopping = session.stopping
    if stopping.non_members.grade != "holdout" or not session.state.visits.any():
        return []
    learned = [examples[i] for i in np.flatnonzero(stopping.newly_known).tolist()]
    names = list(dict.fromkeys(str((e.index if e.record is None else e.record) + 1) for e in learned))
    if not names:
        return []
    which, them = f"Text {names[0]} stands", "it"
    if len(names) > 1:
        which, them = f"{len(names)} texts (numbers {some(names)}) stand", "them"
    note = (
        f"{which} out after the run, and did not before: `pyunlearn audit --original` would call {them} still exposed"
    )
    if session.texts.retain is not None and not session.sampled.get("held"):
        note += f", and the retain set may hold {them} in other words (`pyunlearn find` lists near copies)"
    return [f"{note}."]


def _retained_notes(session: Session, texts: RenderedTexts) -> list[str]:
    """Return sentences on the text of the model's own that was held, and on the rest of texts with "forget"."""
    notes = []
    if (own := session.sampled.get("held")) and session.state.visits.any():
        notes.append(
            f"Without a retain set, the run held {len(own)} texts that the model wrote. Other text that it knows by "
            "heart can be lost with the forget set: pass what must stay with retain."
        )
    holds = session.retain_term.loss == "hold" and session.state.visits.any()
    if holds and session.texts.utility.known and session.unseen_term is None:
        notes.append(
            "The model knows the retain set by heart, and no other prompts could be made of it, since they are alike "
            "or long. So nothing held what the model answers to those, and unseen text may have lost more."
        )
    if texts.encoded.rests and not session.retain_term.rests:
        notes.append('What stands around the strings in "forget" was not held, since there is no retain loss.')
    elif texts.encoded.rests:
        notes.append(
            'What stands around the strings in "forget" was held: each step on a text also takes the rest of it in the '
            f'retain loss "{session.retain_term.loss}".'
        )
    return notes


def _examples(
    session: Session, examples: list[Example], parts: Sequence[Part], forms: Sequence[str]
) -> LazyList[ExampleResult]:
    """Return the verdict on each forget example, whose forms have these names; the numbers are in arrays."""
    stopping, state, forget = session.stopping, session.state, session.texts.forget
    greedy_before = session.greedy_before
    greedy_after = session.scorer.greedy_match(forget) if state.visits.any() else greedy_before
    reached = stopping.near_target(stopping.current)
    recited = recitations(session.scorer.lm, examples, forget, reached)
    judged = stopping.verdict(greedy_after, recited)
    assert judged.extraction is not None
    verdicts = capped(judged.verdict, stopping.non_members.grade)
    before, after, extraction = judged.before.lower, judged.after, judged.extraction
    low, high, certain = judged.low, judged.high, judged.certain
    first, last = stopping.initial.log_likelihood, stopping.current.log_likelihood
    tokens, visits = np.array([len(t.indices) for t in forget], dtype=np.int32), state.visits.copy()
    tried = np.zeros(len(examples), dtype=bool)
    tried[reached] = True

    def result(i: int) -> ExampleResult:
        example = examples[i]
        return ExampleResult(
            index=i,
            text=example.completion if parts[i].windows > 1 else example.prompt + example.completion,
            tokens=int(tokens[i]),
            log_likelihood_before=float(first[i]),
            log_likelihood_after=float(last[i]),
            exposure_before=float(before[i]),
            exposure_after=float(after.lower[i]),
            upper_exposure_after=float(after.upper[i]),
            greedy_match_before=float(greedy_before[i]),
            greedy_match_after=float(greedy_after[i]),
            extraction_after=float(extraction[i]),
            recited_after=bool(recited[i]) if tried[i] else None,
            steps=int(visits[i]),
            verdict=verdicts[i],
            interval=(float(low[i]), float(high[i])),
            certain=bool(certain[i]),
            **parts[i]._asdict(),
            form=forms[i],
        )

    return LazyList(len(examples), result)


def _utility(session: Session) -> Utility:
    """Return the cost of the run on the utility set and on the non-members."""
    stopping, texts = session.stopping, session.texts
    drift = 0.0
    if session.state.visits.any():
        after = -session.scorer.mean_log_likelihood(texts.non_members)
        drift = float((after - stopping.non_member_nll).mean())
    utility, holdout = stopping.current.utility, stopping.current.holdout
    return Utility(
        measured_on=texts.utility.source,
        sequences=len(texts.utility.tokens),
        nll_before=float(stopping.utility_budget.before.mean()),
        nll_after=float(stopping.current.utility_nll.mean()),
        relative_rise=utility.estimate,
        interval=utility.interval,
        budget=stopping.utility_budget.allowed,
        non_member_drift=drift,
        holdout_rise=None if holdout is None else holdout.estimate,
        holdout_interval=None if holdout is None else holdout.interval,
        holdout_budget=None if stopping.holdout_budget is None else stopping.holdout_budget.allowed,
    )
