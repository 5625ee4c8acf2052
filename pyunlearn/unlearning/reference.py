"""What a run takes once, before the first step, beside its measures: what the method compares with, alternates, token weights, difficulties."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyunlearn import models
from pyunlearn.data import Tokens, batches
from pyunlearn.errors import ModelError
from pyunlearn.methods import Multiplier
from pyunlearn.metrics.stein import ksd_difficulty
from pyunlearn.models import Likelihood, sampling
from pyunlearn.models.distributions import Distributions
from pyunlearn.probes.representations import representations
from pyunlearn.unlearning.hidden_cache import Kept
from pyunlearn.unlearning.token_weights import beyond, given, importance, ranks, scaled

if TYPE_CHECKING:
    from pyunlearn.unlearning.setup import Run

Floats = NDArray[np.float64]
_CORPUS = 256  # retain examples that the Stein discrepancy is taken to


def alternates_of(run: Run) -> list[Tokens]:
    """So many for each forget example, one after the other; kept for a checkpoint, for sampling need not give the same twice."""
    count = (run.method.options | run.options)["alternates"]
    known = [Tokens(tuple(i), first, d and tuple(d)) for i, first, d in run.cached.get("alternates", [])]
    vocabulary = run.inner.get_input_embeddings().weight.shape[0]
    if known and len(known) == count * len(run.forget) and all(max(*t.ids, *t.written) < vocabulary for t in known):
        return known
    run.bar.say("sampling what the model would say instead")
    alone: list[Tokens] = []
    if run.workers.leads:
        alone = sampling.alternates(run.inner, run.tokenizer, run.forget, count=count, seed=run.seed)
    found = run.workers.same_objects(alone)
    run.cached["alternates"] = [(list(t.ids), t.first, t.decoder and list(t.decoder)) for t in found]
    return found


def token_weights_of(run: Run, reference: Likelihood) -> list[Floats] | None:
    """(T,) of each forget example's tokens, or None where none are weighted."""
    kind, share = run.emphasis.token_weights, run.emphasis.token_share
    if kind is None:
        return None

    def score(tokens: Sequence[Tokens]) -> list[Floats]:
        return run.token_log_likelihood(tokens, run.likelihood)

    run.bar.say("weighing the tokens")
    if not isinstance(kind, str):
        own = given(kind, run.forget)
        return own if share == 1 else scaled(own, share)
    if kind == "importance":
        return scaled(importance(run.forget, score, mask_id=run.tokenizer.mask_token_id, seed=run.seed), share)
    return scaled(beyond(score(run.forget), run.token_log_likelihood(run.forget, reference)), share)


def difficulty_of(run: Run, reference: Likelihood) -> Floats | None:
    """(B,) high = hard, or None where no order asks for it."""
    kind = run.emphasis.difficulty
    if run.emphasis.order == "random":
        return None
    run.bar.say("ranking the examples")
    if not isinstance(kind, str):
        return ranks(kind, len(run.forget))
    if kind == "nll":
        return -run.mean_log_likelihood(run.forget, reference)
    assert run.retain is not None
    step = -(-len(run.retain) // _CORPUS)
    mine, corpus = (
        representations(run.inner, x, batch_size=run.micro_batch_size) for x in (run.forget, run.retain[::step])
    )
    return ksd_difficulty(*mine, *corpus)


@contextmanager
def reference_of(run: Run, model: Any) -> Iterator[Likelihood]:
    """Log-likelihoods under the reference model, which is on the device while it lasts, or under the run's own as it came."""
    if model is None:
        yield run.likelihood
        return
    if isinstance(model, (str, Path)):
        model, _ = models.load(model, tokenizer=run.tokenizer)
    if model.get_input_embeddings().weight.shape[0] != run.inner.get_input_embeddings().weight.shape[0]:
        raise ModelError("reference_model has another vocabulary than the model: give one of the same family")
    home = model.device
    try:
        yield Likelihood(model.to(run.device).eval(), workspace=run.likelihood.workspace)
    finally:
        model.to(home)


def compare_with(run: Run, reference: Likelihood, max_steps: int) -> None:
    """Reads what the method and the retain term compare with, once."""
    if "reference" in run.method.needs and run.method.kind == "vocabulary":
        run.kept["forget"] = _kept(run, run.forget, range(len(run.forget)), reference)
    elif "reference" in run.method.needs:
        for role in run.method.reads:
            found = run.token_log_likelihood(run.read[role], reference)
            if not run.method.token:
                found = [run.weighed(role, i, x).sum(keepdims=True) for i, x in enumerate(found)]
            run.reference[role] = found
    if run.retain_loss == "kl" and run.retain is not None:
        run.kept["retain"] = _kept(run, run.retain, run.retain_ahead(max_steps), reference)


@torch.no_grad()
def _kept(run: Run, tokens: list[Tokens], places: Sequence[int], likelihood: Likelihood) -> Kept:
    """The distributions of those texts, in every process: which of them it will want is not known yet."""
    size = 2 * min(run.batch_size, run.micro_batch_size)

    def parts() -> Iterator[tuple[list[int], Distributions]]:
        chosen = [tokens[i] for i in places]
        for at, batch in batches(chosen, size, pad_id=run.pad, decoder_start_id=run.start):
            with run.accelerator.autocast():
                found = likelihood.distributions(batch.to(run.device))
            yield [places[i] for i in at], found

    return Kept(parts(), {i: len(tokens[i].scored) for i in places})


def multiplier_of(run: Run) -> Multiplier:
    """PDU's, bounding the retain loss a little above where it begins: NLL at the watched text's mean a token, KL at 0."""
    o = run.method.options | run.options
    n = [len(t.scored) for t in run.watch]
    begins = 0.0 if run.retain_loss == "kl" else float(np.average(run.watched_before, weights=n))
    bound = begins + o["retain_tolerance"] * max(begins, 1.0)
    return Multiplier(o["multiplier"], o["multiplier_step_size"], bound, o["multiplier_warmup"])
