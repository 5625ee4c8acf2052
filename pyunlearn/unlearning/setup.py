"""Setup of a run: score every text under the original model and make the parts that the loop uses."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyunlearn.data import Tokens
from pyunlearn.errors import TrainingError
from pyunlearn.methods import Method, Multiplier
from pyunlearn.metrics.stein import ksd_difficulty
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.likelihood import Likelihood
from pyunlearn.models.scoring import Scorer
from pyunlearn.probes.non_members import (
    NonMembers,
    calibrated,
    non_members_of_holdout,
    non_members_without_holdout,
    reference_numbers,
)
from pyunlearn.probes.renderings import RenderedTexts
from pyunlearn.probes.representations import representations
from pyunlearn.progress import Progress
from pyunlearn.unlearning.checkpoint import LoopState
from pyunlearn.unlearning.config import LoopConfig
from pyunlearn.unlearning.distributed import Processes
from pyunlearn.unlearning.objectives import ForgetTerm, RetainTerm, Unseen, multiplier_of, token_quantiles
from pyunlearn.unlearning.reference import Reference, cached_states, reference_on_device
from pyunlearn.unlearning.representation import RepresentationTarget
from pyunlearn.unlearning.robust import Robustness
from pyunlearn.unlearning.sampled import SampledTexts
from pyunlearn.unlearning.schedule import Schedule, check_difficulty, resolved_steps
from pyunlearn.unlearning.stopping import StoppingRule
from pyunlearn.unlearning.token_weights import token_weights_of
from pyunlearn.unlearning.trackers import Listener
from pyunlearn.unlearning.utility_set import (
    OWN_TEXTS,
    UtilitySet,
    evenly_spaced,
    non_members_as_utility_set,
    retain_texts,
)

Floats = NDArray[np.float64]
_CORPUS = 256  # retain examples in the Stein discrepancy


class Texts(NamedTuple):
    """The tokenized texts of a run."""

    forget: list[Tokens]
    retain: list[Tokens] | None  # those that the run may train on
    non_members: list[Tokens]
    utility: UtilitySet
    holdout: list[Tokens]  # the texts on which the holdout budget is measured; none where there is no such budget


class Session(NamedTuple):
    """Inputs of the loop of one run: texts, stopping rule, schedule, the two loss terms, state."""

    accelerator: Any
    processes: Processes
    scorer: Scorer
    texts: Texts
    stopping: StoppingRule
    schedule: Schedule
    max_steps: int  # of the optimizer
    forget_term: ForgetTerm
    retain_term: RetainTerm
    state: LoopState
    target: RepresentationTarget | None
    unseen_term: RetainTerm | None  # of a retain set that the model knows by heart
    robustness: Robustness | None  # where the run is to be robust
    greedy_before: Floats  # (B,) share of each forget text's tokens that were the model's first choice
    sampled: dict[str, Any]  # name -> texts that a checkpoint has to store
    scores: dict[str, Floats]  # name of a set -> numbers in which a resumed run must agree
    seconds_per_id: float  # of a forward pass
    on_step: Listener | None = None  # gets the record of each step when its round has ended


def setup(
    lm: LanguageModel,
    config: LoopConfig,
    method: Method,
    options: dict[str, Any],
    retain_loss: str | None,
    rendered: RenderedTexts,
    tokens: dict[str, list[Tokens]],
    *,
    reference_model: Any,
    sampled: dict[str, Any],
    robust: bool = False,
    accelerator: Any,
    processes: Processes,
    bar: Progress,
) -> Session:
    """Score the original model and make the parts of a run; the weights are not changed.

    Args:
        lm: the model, on its device, in evaluation mode.
        config: the settings.
        method, options, retain_loss: as returned by `pyunlearn.methods.resolve`.
        rendered: the texts in the form in which the model reads them.
        tokens: role -> texts: forget; retain, holdout, refusal, winner where there are some.
        reference_model: an object or a path, whose numbers calibrate the verdict; None: methods that compare with a
            reference model compare with the original model.
        sampled: name -> texts that were sampled before the run was interrupted.
        robust: whether to unlearn what fine-tuning brings back, too.
        accelerator: of accelerate.
        processes: the processes that share the work.
        bar: shows the present stage.
    """
    micro_batch_size = config.micro_batch_size or config.batch_size
    scorer = Scorer(
        lm, 2 * min(config.batch_size, micro_batch_size), autocast=accelerator.autocast, processes=processes
    )
    forget = tokens["forget"]
    draws = SampledTexts(lm, forget, sampled, seed=config.seed, processes=processes, bar=bar)
    held = draws.to_hold() if "retain" not in tokens and retain_loss == "hold" and config.retain_loss == "auto" else []
    own_retain, retain, rests, utility = retain_texts(
        tokens.get("retain"),
        held,
        rendered.encoded.rests,
        trains=retain_loss is not None and config.retain_weight > 0,
        log_likelihood=scorer.mean_log_likelihood,
        forget=len(forget),
    )
    forget_scores, greedy_before, seconds_per_id = _score_forget_set(scorer, forget, bar)
    texts_by_role = tokens | ({} if retain is None else {"retain": retain})
    if "alternates" in method.needs:
        texts_by_role["alternate"] = draws.alternates((method.options | options)["alternates"])

    with reference_on_device(lm, reference_model, processes) as reference_lm:
        likelihood = reference_lm.likelihood
        non_members = _non_members(scorer, processes, reference_lm, rendered, tokens, forget_scores, config.seed, bar)
        unseen = scorer.token_log_likelihood(non_members.tokens)
        texts, stopping = _stopping_rule(config, scorer, texts_by_role, utility, non_members, forget_scores, unseen)
        as_they_are = [unseen[i] for i in non_members.as_they_are]
        memorized, forms = int(stopping.memorized.sum()), non_members.forms is not None
        max_steps = resolved_steps(config.max_steps, memorized, config.batch_size, robust=robust, forms=forms)
        retain_ahead = [*_schedule(config, own_retain, None).retain_ahead(max_steps), *rests.values()]
        weights = _token_weights(config, forget, scorer, likelihood, bar)
        reference = _read_reference(scorer, likelihood, method, retain_loss, texts_by_role, weights, retain_ahead)
        records = rendered.encoded.records["forget"]
        difficulty = _difficulty(config, texts, records, scorer, likelihood, micro_batch_size, bar)

    initial_nll = -scorer.mean_log_likelihood(retain) if retain_loss == "hold" and retain is not None else None
    multiplier = _multiplier(scorer, method, options, retain_loss, own_retain)
    target = _representation_target(config, scorer, method, options, retain_loss, texts, retain_ahead, bar)
    schedule = _schedule(config, own_retain, difficulty)
    state = LoopState(np.zeros(len(forget), dtype=np.int64), multiplier)
    forget_term = ForgetTerm(
        lm, method, options, texts_by_role, reference=reference, weights=weights, target=target,
        unseen=Unseen(stopping.level, stopping.likely, token_quantiles(as_they_are)), visits=state.visits,
        batch_reduction=config.batch_reduction,
    )  # fmt: skip
    retain_term = RetainTerm(
        lm, retain_loss, config.retain_weight if retain_loss else 0.0, retain, initial_nll=initial_nll,
        reference=reference, target=target, multiplier=multiplier, rests=rests,
    )  # fmt: skip
    unseen_term = None
    if retain_loss == "hold" and utility is not None and utility.known:
        unseen_term = _unseen_term(config, scorer, draws.unseen_answers(own_retain))
    robustness = None
    if robust:
        other = own_retain or retain or []
        robustness = Robustness(scorer, accelerator, processes, schedule, stopping, texts, records, other)
    fingerprint = reference.fingerprint(len(forget), schedule.retain_indices(0) or list(rests.values()))
    return Session(
        accelerator, processes, scorer, texts, stopping, schedule, max_steps, forget_term, retain_term, state, target,
        unseen_term, robustness, greedy_before, sampled, _scores_to_agree(stopping, weights, difficulty) | fingerprint,
        seconds_per_id,
    )  # fmt: skip


def _multiplier(
    scorer: Scorer, method: Method, options: dict[str, Any], retain_loss: str | None, retain: list[Tokens]
) -> Multiplier | None:
    """Return the dual variable of a method that bounds the retain loss; None for other methods."""
    if not method.needs_retain or not retain:
        return None
    trained = [retain[i] for i in evenly_spaced(retain)]
    return multiplier_of(method.options | options, retain_loss, trained, -scorer.mean_log_likelihood(trained))


def _unseen_term(config: LoopConfig, scorer: Scorer, answers: list[Tokens]) -> RetainTerm | None:
    """Return the term that holds the model's answers to prompts that no record has; None without answers."""
    if not answers:
        return None
    initial_nll = -scorer.mean_log_likelihood(answers)
    return RetainTerm(scorer.lm, "hold", config.retain_weight, answers, initial_nll=initial_nll, reference=Reference())


def _scores_to_agree(
    stopping: StoppingRule, weights: list[Floats] | None, difficulty: Floats | None
) -> dict[str, Floats]:
    """Return name -> numbers of the original model in which a resumed run must agree with its checkpoint."""
    return {
        "forget set": stopping.initial.log_likelihood,
        "reference model": stopping.non_members.forget.nll if stopping.non_members.by_reference else np.empty(0),
        "holdout": stopping.non_member_scores,
        "retain set": stopping.utility_budget.before,
        "token weights": np.concatenate(weights or [np.empty(0)]),
        "difficulty": np.empty(0) if difficulty is None else difficulty,
    }


def _score_forget_set(scorer: Scorer, forget: list[Tokens], bar: Progress) -> tuple[Floats, Floats, float]:
    """Return (B,) mean log-likelihoods per token, nats, (B,) shares of first-choice tokens, and the pass's s per token.

    Raises TrainingError where a log-likelihood is not finite.
    """
    bar.say("scoring the forget set")
    log_likelihood = scorer.mean_log_likelihood(forget)
    if not np.isfinite(log_likelihood).all():
        raise TrainingError(
            "the model gives NaN or Inf for the forget set before the first step: it cannot be trained from here"
        )
    began = time.perf_counter()
    matches = scorer.greedy_match(forget)
    return log_likelihood, matches, (time.perf_counter() - began) / sum(map(len, forget))


def _non_members(
    scorer: Scorer,
    processes: Processes,
    reference: LanguageModel,
    rendered: RenderedTexts,
    tokens: dict[str, list[Tokens]],
    forget_scores: Floats,
    seed: int,
    bar: Progress,
) -> NonMembers:
    """Return the holdout, or the non-members that the main process chooses in its place, less a reference model's.

    `reference` is the original model itself where there is no reference model.
    """
    forget, is_reference = tokens["forget"], reference is not scorer.lm
    if "holdout" in tokens:
        bar.say("scoring the holdout")
        non_members = non_members_of_holdout(len(forget), tokens["holdout"], rendered.encoded.other_forms)
    else:
        bar.say("scoring unseen text")
        choose = partial(
            non_members_without_holdout,
            reference,
            rendered.examples["forget"],
            forget,
            chat_template=rendered.rendering.chat_template,
            is_reference=is_reference,
            seed=seed,
            batch_size=scorer.batch_size,
        )
        non_members = processes.once(choose)
    if not is_reference:
        return non_members
    bar.say("scoring with the reference model")
    of_forget, own = (reference_numbers(scorer, reference.likelihood, x) for x in (forget, non_members.tokens))
    return calibrated(non_members, -forget_scores, of_forget, own)


def _stopping_rule(
    config: LoopConfig,
    scorer: Scorer,
    tokens: dict[str, list[Tokens]],
    utility: UtilitySet | None,
    non_members: NonMembers,
    forget_scores: Floats,
    unseen: list[Floats],
) -> tuple[Texts, StoppingRule]:
    """Score the texts of the budgets; return the texts of the run and its stopping rule.

    `unseen` are the log-likelihoods of the non-members' tokens, by text.
    """
    holdout: list[Tokens] = []
    answers = non_members.reason and any(t.first > 1 for t in non_members.tokens)  # to the prompts of the forget set
    if utility is None or (utility.source == OWN_TEXTS and not answers):
        utility = non_members_as_utility_set(non_members, len(forget_scores))
    elif config.holdout_budget is not None and "holdout" in tokens:
        holdout = [tokens["holdout"][i] for i in evenly_spaced(tokens["holdout"], forget=len(forget_scores))]
    stopping = StoppingRule(
        forget_scores,
        -np.array([x.mean() for x in unseen]),
        scorer.greedy_match(non_members.tokens),
        -scorer.mean_log_likelihood(utility.tokens),
        target_exposure=config.target_exposure,
        false_discovery_rate=config.false_discovery_rate,
        utility_budget=config.utility_budget,
        utility_known=utility.known,
        utility_gains_capped=utility.source == OWN_TEXTS,
        holdout_nll=-scorer.mean_log_likelihood(holdout) if holdout else None,
        holdout_budget=config.holdout_budget,
        non_members=non_members,
    )
    return Texts(tokens["forget"], tokens.get("retain"), non_members.tokens, utility, holdout), stopping


def _token_weights(
    config: LoopConfig, forget: list[Tokens], scorer: Scorer, reference: Likelihood, bar: Progress
) -> list[Floats] | None:
    """Return (T,) weights of each forget text's tokens, or None."""
    if config.token_weights is not None:
        bar.say("weighing the tokens")
    return token_weights_of(config.token_weights, config.token_share, forget, scorer, reference, seed=config.seed)


def _read_reference(
    scorer: Scorer,
    likelihood: Likelihood,
    method: Method,
    retain_loss: str | None,
    texts_by_role: dict[str, list[Tokens]],
    weights: list[Floats] | None,
    retain_ahead: list[int],
) -> Reference:
    """Return the reference model's numbers that the two terms of the loss need."""
    reference = Reference()
    forget, retain, batch_size = texts_by_role["forget"], texts_by_role.get("retain"), scorer.batch_size
    if "reference" in method.needs and method.kind == "vocabulary":
        reference.forget = cached_states(scorer, likelihood, forget, range(len(forget)), batch_size)
    elif "reference" in method.needs:
        reference.read_log_likelihoods(scorer, likelihood, method, texts_by_role, weights)
    if retain_loss == "kl" and retain is not None:
        reference.retain = cached_states(scorer, likelihood, retain, retain_ahead, batch_size)
    return reference


def _representation_target(
    config: LoopConfig,
    scorer: Scorer,
    method: Method,
    options: dict[str, Any],
    retain_loss: str | None,
    texts: Texts,
    retain_ahead: list[int],
    bar: Progress,
) -> RepresentationTarget | None:
    """Return the layer that a method on hidden states changes; None for other methods."""
    if method.kind != "hidden":
        return None
    bar.say("reading the hidden states")
    keeps_retain = retain_loss == "representation"
    return RepresentationTarget(
        scorer,
        method,
        options,
        texts.forget,
        texts.retain or [],
        retain_indices=retain_ahead if keeps_retain else (),
        keeps_retain=keeps_retain,
        batch_size=2 * config.batch_size,
        seed=config.seed,
    )


def _schedule(config: LoopConfig, retain: Sequence[Tokens] | None, difficulty: Floats | None) -> Schedule:
    """Return the order of the run's examples."""
    return Schedule(
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        retain_examples=len(retain or ()),
        order=config.order,
        difficulty=difficulty,
        seed=config.seed,
    )


def _difficulty(
    config: LoopConfig,
    texts: Texts,
    records: NDArray[np.int32],
    scorer: Scorer,
    reference: Likelihood,
    batch_size: int,
    bar: Progress,
) -> Floats | None:
    """Return (B,) difficulties, high = hard, or None for a random order; `records` are the indices of their records."""
    if config.order == "random":
        return None
    bar.say("ranking the examples")
    if not isinstance(config.difficulty, str):
        return check_difficulty(config.difficulty, records)
    if config.difficulty == "nll":
        return -scorer.mean_log_likelihood(texts.forget, reference)
    assert texts.retain is not None
    step = -(-len(texts.retain) // _CORPUS)
    own, corpus = (
        representations(scorer.lm, each, batch_size=batch_size) for each in (texts.forget, texts.retain[::step])
    )
    return ksd_difficulty(*own, *corpus)
