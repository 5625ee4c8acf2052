"""Set a run up: score every text under the original model, and make the parts that the loop works with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyunlearn.data import Tokens
from pyunlearn.errors import TrainingError
from pyunlearn.methods import Method
from pyunlearn.metrics.stein import ksd_difficulty
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.likelihood import Likelihood
from pyunlearn.models.sampling import require_enough, sample_alternates, sample_non_members
from pyunlearn.models.scoring import Scorer
from pyunlearn.probes.representations import representations
from pyunlearn.progress import Progress
from pyunlearn.unlearning.checkpoint import LoopState
from pyunlearn.unlearning.config import LoopConfig
from pyunlearn.unlearning.distributed import Processes
from pyunlearn.unlearning.objectives import ForgetTerm, RetainTerm, multiplier_of
from pyunlearn.unlearning.preferences import alternates_of
from pyunlearn.unlearning.reference import Reference, cached_states, reference_likelihood
from pyunlearn.unlearning.representation import RepresentationTarget
from pyunlearn.unlearning.schedule import Schedule, check_difficulty
from pyunlearn.unlearning.stopping import StoppingRule
from pyunlearn.unlearning.token_weights import token_weights_of

Floats = NDArray[np.float64]
_UTILITY_TOKENS = 1024  # scored tokens of the utility set, at each evaluation
_CORPUS = 256  # retain examples that the Stein discrepancy is taken to


class Texts(NamedTuple):
    """The tokenized texts of a run."""

    forget: list[Tokens]
    retain: list[Tokens] | None
    non_members: list[Tokens]  # the holdout, or sampled from the model
    utility: list[Tokens]  # what the utility budget is measured on
    utility_source: str


class Session(NamedTuple):
    """The parts of one run."""

    accelerator: Any
    processes: Processes
    scorer: Scorer
    texts: Texts
    stopping: StoppingRule
    schedule: Schedule
    forget_term: ForgetTerm
    retain_term: RetainTerm
    state: LoopState
    target: RepresentationTarget | None
    greedy_before: Floats  # (B,) share of each forget text's tokens that were the first choice
    sampled: dict[str, Any]  # texts that a checkpoint has to store, by name
    scores: dict[str, Floats]  # numbers in which a resumed run must agree, by what they are of


def setup(
    lm: LanguageModel,
    config: LoopConfig,
    method: Method,
    options: dict[str, Any],
    retain_loss: str | None,
    tokens: dict[str, list[Tokens]],
    *,
    reference_model: Any,
    sampled: dict[str, Any],
    accelerator: Any,
    processes: Processes,
    bar: Progress,
) -> Session:
    """Score the original model and make the parts of a run; the weights are not changed.

    Args:
        lm: the model, on its device, in evaluation mode.
        config: the settings.
        method, options, retain_loss: as `methods.resolve` returned them.
        tokens: role -> texts: forget; retain, holdout, refusal, winner where there are some.
        reference_model: an object or a path; None: the model as it is.
        sampled: texts that the run which is resumed has sampled, by name.
        accelerator, processes: of accelerate, and the processes that share the work.
        bar: names the present stage.
    """
    micro_batch_size = config.micro_batch_size or config.batch_size
    scoring_batch = 2 * min(config.batch_size, micro_batch_size)
    scorer = Scorer(lm, scoring_batch, autocast=accelerator.autocast, processes=processes)
    forget, retain = tokens["forget"], tokens.get("retain")

    bar.say("scoring the forget set")
    forget_scores = scorer.mean_log_likelihood(forget)
    if not np.isfinite(forget_scores).all():
        raise TrainingError(
            "the model gives NaN or Inf for the forget set before the first step: it cannot be trained from here"
        )
    greedy_before = scorer.greedy_match(forget)
    non_members = _non_members(lm, forget, tokens.get("holdout"), config.seed, processes, bar)
    reads = tokens | {"forget": forget}
    if "alternates" in method.needs:
        count = (method.options | options)["alternates"]
        reads["alternate"], sampled["alternates"] = alternates_of(
            sampled.get("alternates", []), forget, count, lm.vocabulary, _alternate_sampler(lm, forget, count, config.seed, processes, bar),
        )  # fmt: skip
    non_member_scores = -scorer.mean_log_likelihood(non_members)
    utility = evenly_spaced(non_members if retain is None else retain, _UTILITY_TOKENS)
    source = "retain set" if retain is not None else "holdout" if "holdout" in tokens else "text sampled from the model"
    utility_nll = -scorer.mean_log_likelihood(utility)
    texts = Texts(forget, retain, non_members, utility, source)
    stopping = StoppingRule(
        forget_scores, non_member_scores, utility_nll,
        target_exposure=config.target_exposure, utility_budget=config.utility_budget,
    )  # fmt: skip

    ahead = _schedule(config, retain, None).retain_ahead(config.max_steps)
    reference = Reference()
    compares = uses_reference(config, method, retain_loss)
    with reference_likelihood(lm, reference_model if compares else None) as likelihood:
        if config.token_weights is not None:
            bar.say("weighing the tokens")
        weights = token_weights_of(
            config.token_weights, config.token_share, forget, scorer, likelihood, seed=config.seed
        )
        if "reference" in method.needs and method.kind == "vocabulary":
            reference.forget = cached_states(scorer, likelihood, forget, range(len(forget)), scoring_batch)
        elif "reference" in method.needs:
            reference.read_log_likelihoods(scorer, likelihood, method, reads, weights)
        if retain_loss == "kl" and retain is not None:
            reference.retain = cached_states(scorer, likelihood, retain, ahead, scoring_batch)
        if config.order != "random":
            bar.say("ranking the examples")
        difficulty = _difficulty(config, texts, scorer, likelihood, micro_batch_size)

    initial_nll = -scorer.mean_log_likelihood(retain) if retain_loss == "hold" and retain is not None else None
    multiplier = None
    if method.needs_retain:
        multiplier = multiplier_of(method.options | options, retain_loss, utility, utility_nll)
    target = None
    if method.kind == "hidden":
        bar.say("reading the hidden states")
        keeps = retain_loss == "representation"
        target = RepresentationTarget(
            scorer, method, options, forget, retain or [], retain_indices=ahead if keeps else (), keeps_retain=keeps,
            batch_size=2 * config.batch_size, seed=config.seed,
        )  # fmt: skip
    schedule = _schedule(config, retain, difficulty)
    state = LoopState(np.zeros(len(forget), dtype=np.int64), multiplier)
    first_retain = schedule.retain_indices(0) if retain else []
    scores = {
        "forget set": forget_scores,
        "holdout": non_member_scores,
        "retain set": utility_nll,
        "token weights": np.concatenate(weights or [np.empty(0)]),
        "difficulty": np.empty(0) if difficulty is None else difficulty,
    } | reference.fingerprint(len(forget), first_retain)
    return Session(
        accelerator=accelerator,
        processes=processes,
        scorer=scorer,
        texts=texts,
        stopping=stopping,
        schedule=schedule,
        forget_term=ForgetTerm(
            lm, method, options, reads, reference=reference, weights=weights, target=target, visits=state.visits
        ),
        retain_term=RetainTerm(
            lm, retain_loss, config.retain_weight if retain_loss else 0.0, retain,
            initial_nll=initial_nll, reference=reference, target=target, multiplier=multiplier,
        ),
        state=state,
        target=target,
        greedy_before=greedy_before,
        sampled=sampled,
        scores=scores,
    )  # fmt: skip


def uses_reference(config: LoopConfig, method: Method, retain_loss: str | None) -> bool:
    """Return whether a run reads anything under a reference model."""
    by_difficulty = config.order != "random" and isinstance(config.difficulty, str) and config.difficulty == "nll"
    by_weights = isinstance(config.token_weights, str) and config.token_weights == "reference"
    return "reference" in method.needs or retain_loss == "kl" or by_difficulty or by_weights


def evenly_spaced(tokens: list[Tokens], limit: int) -> list[Tokens]:
    """Return evenly spaced texts whose scored tokens are about `limit`, one text at least."""
    total = sum(len(t.scored) for t in tokens)
    count = max(1, min(len(tokens), len(tokens) * limit // max(total, 1)))
    return tokens if count == len(tokens) else [tokens[i * len(tokens) // count] for i in range(count)]


def _non_members(
    lm: LanguageModel,
    forget: list[Tokens],
    holdout: list[Tokens] | None,
    seed: int,
    processes: Processes,
    bar: Progress,
) -> list[Tokens]:
    """Return the holdout, or texts that the main process samples from the model."""
    if holdout is None:
        bar.say("sampling text that the model typically writes")
        own = sample_non_members(lm, forget, seed=seed) if processes.is_main else []
        non_members = processes.broadcast_objects(own)
    else:
        bar.say("scoring the holdout")
        non_members = holdout
    require_enough(non_members, holdout=holdout is not None)
    return non_members


def _alternate_sampler(
    lm: LanguageModel, forget: list[Tokens], count: int, seed: int, processes: Processes, bar: Progress
) -> Any:
    def sample() -> list[Tokens]:
        bar.say("sampling other answers of the model's own")
        own = sample_alternates(lm, forget, count=count, seed=seed) if processes.is_main else []
        return processes.broadcast_objects(own)

    return sample


def _schedule(config: LoopConfig, retain: Sequence[Tokens] | None, difficulty: Floats | None) -> Schedule:
    return Schedule(
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        retain_examples=len(retain or ()),
        order=config.order,
        difficulty=difficulty,
        seed=config.seed,
    )


def _difficulty(
    config: LoopConfig, texts: Texts, scorer: Scorer, reference: Likelihood, batch_size: int
) -> Floats | None:
    """Return (B,) difficulties, high = hard, or None where no order asks for them."""
    if config.order == "random":
        return None
    if not isinstance(config.difficulty, str):
        return check_difficulty(config.difficulty, len(texts.forget))
    if config.difficulty == "nll":
        return -scorer.mean_log_likelihood(texts.forget, reference)
    assert texts.retain is not None
    step = -(-len(texts.retain) // _CORPUS)
    own, corpus = (
        representations(scorer.lm, each, batch_size=batch_size) for each in (texts.forget, texts.retain[::step])
    )
    return ksd_difficulty(*own, *corpus)
