"""Relearning: does a text come back when the model is fine-tuned on other text?

On the forget texts but this one, on text that must keep working, or on text that has nothing to do with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pyunlearn.attacks.target import Target, Trial, Unsuited
from pyunlearn.attacks.temporary import frozen_but, temporarily
from pyunlearn.data import Tokens, encode
from pyunlearn.errors import DataError
from pyunlearn.models.adapters import with_lora
from pyunlearn.models.condition import require_trainable
from pyunlearn.models.four_bits import keep_differentiable
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.scoring import evaluation_mode
from pyunlearn.probes.unseen import unseen_texts

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
_STEPS, _QUICK_STEPS = 20, 5
_TRIED = 5  # steps with each rate
_RANK = 8  # of the adapter on quantized and float16 weights
_DIVERGED = "fine-tuning gives NaN or Inf: set a smaller relearning_rate"


class _Diverged(Unsuited):
    """Raised where fine-tuning has no finite loss."""


def relearning(target: Target) -> Iterator[Trial]:
    """Train on all parts but one of the forget set and of non-members, and score that one; each part is once the one.

    Both sides are treated alike: texts that teach each other, such as twenty about one person, come back on either
    side. Near copies are in one part. The non-members are as many as the forget texts, 80 or more, in runs of 20
    neighbours (`Target.compared`), and a step reads twice `batch_size` texts of both together, or `batch_size` in the
    quick form.

    Source: Hu et al. 2024, arXiv 2406.13356; Lynch et al. 2024, arXiv 2402.16835; to train on non-members too is ours.
    """
    texts, config = target.texts, target.config
    _require_fair(target)
    rng, n, m = np.random.default_rng(config.seed), len(texts.forget), len(texts.non_members)
    compared = target.compared
    groups = texts.groups, [texts.non_member_groups[i] for i in compared]
    folds = min(config.folds, *(len(set(side)) for side in groups))
    if folds < 2:
        few = "one record is" if len(set(texts.groups)) < 2 else "non-members that are all near copies are"
        raise Unsuited(f"{few} no other text to relearn from")
    part = np.concatenate([_parts(side, folds, rng) for side in groups])
    pool = texts.forget + [texts.non_members[i] for i in compared]
    quick = config.is_quick("relearning")
    most = min((2 if quick else 4) * config.batch_size, n, len(pool) - n)
    rate = _rate(target, "the others", texts.forget[:most] + pool[n : n + most], quick=quick)
    stops, batch_size = _stops(config.relearning_steps, quick=quick), config.batch_size * (1 if quick else 2)
    values = {step: np.full(len(pool), np.nan) for step in stops}
    for k in range(folds):
        own, others = np.flatnonzero(part == k), [pool[i] for i in np.flatnonzero(part != k)]
        doing = f"relearning from part {k + 1} of {folds}"
        for step in _trained(target, others, rate, stops, doing, batch_size):
            values[step][own] = target.nll([pool[i] for i in own])
    for step in stops:
        non_members = np.full(m, np.nan)
        non_members[compared] = values[step][n:]
        details = {"steps": step, "learning_rate": rate, "folds": folds, "non_members": len(pool) - n}
        yield Trial(f"relearning, {step} steps on the others", values[step][:n], non_members, details=details)


def relearning_retain(target: Target) -> Iterator[Trial]:
    """Train on the retain set, as its owner would.

    Source: Lucki et al. 2024, arXiv 2409.18025.
    """
    if not target.texts.retain:
        raise Unsuited("there is no retain set")
    compared = set(target.texts.every)
    learned = [t for t in target.texts.retain if t not in compared]
    yield from _on_other_text(target, learned, "retain text", quick=target.config.is_quick("relearning-retain"))


def relearning_unrelated(target: Target) -> Iterator[Trial]:
    """Train on texts that were written for this package, which have nothing to do with the forget set.

    Source: Lucki et al. 2024, arXiv 2409.18025.
    """
    lm = target.lm
    if lm.is_encoder_decoder:
        raise Unsuited("an encoder-decoder model reads no plain text")
    compared = set(target.texts.every)
    try:
        texts = encode(unseen_texts(), lm.tokenizer, role="retain", max_length=lm.context_length, truncate=True)
    except DataError as error:
        raise Unsuited("the tokenizer was not made for English") from error
    yield from _on_other_text(target, [t for t in texts if t not in compared], "unrelated text")


def _on_other_text(target: Target, learned: list[Tokens], what: str, *, quick: bool = False) -> Iterator[Trial]:
    _require_fair(target)
    if not learned:
        raise Unsuited(f"all of the {what} is compared with the forget set")
    key = "the others" if quick and "the others" in target.chosen else what
    rate = _rate(target, key, learned[: (4 if quick else 8) * target.config.batch_size], quick=quick)
    stops, doing = _stops(target.config.retain_steps, quick=quick), f"relearning from {what}"
    for step in _trained(target, learned, rate, stops, doing, target.config.batch_size):
        yield target.trial(f"relearning, {step} steps on {what}", quick=quick, steps=step, learning_rate=rate)


def _require_fair(target: Target) -> None:
    """Raise Unsuited where training makes all text of the forget set's kind likelier than the non-members."""
    if not target.texts.same_kind:
        raise Unsuited(
            "it makes all text of the forget set's kind likelier: to tell what comes back takes a holdout of that "
            "kind, or a control"
        )


def _stops(steps: int | None, *, quick: bool) -> list[int]:
    """Return the steps after which the texts are scored: an eighth of them, a quarter, half, and all, or all alone."""
    if quick:
        return [steps or _QUICK_STEPS]
    return sorted({max(1, (steps or _STEPS) // share) for share in (8, 4, 2, 1)})


def _parts(groups: Sequence[int], folds: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return (len(groups),) a part below `folds` for each text, at random, the same for texts of one group."""
    distinct, which = np.unique(groups, return_inverse=True)
    parts: NDArray[np.int64] = (rng.permutation(len(distinct)) % folds)[which]
    return parts


def _rate(target: Target, key: str, sample: Sequence[Tokens], *, quick: bool) -> float:
    """Return the learning rate: as set, or the best of six, which the control gets too.

    That is the one at which every second text of the sample is likeliest after some steps on the others. Where it is
    quick, it is half of the one that is best for the first step alone, whose gradient is the same for all six.

    Args:
        target: the model.
        key: of the choice.
        sample: texts of which none is compared, or as many forget texts as non-members, so that both sides have the
            same part in the choice and stay exchangeable.
        quick: whether to try the first step alone.
    """
    if target.config.relearning_rate is not None:
        return target.config.relearning_rate
    if key not in target.chosen:
        train, test = (sample[::2], sample[1::2]) if len(sample) > 1 else (sample, sample)
        if quick:
            target.chosen[key] = RATES[_best_first_step(target, train, test)] / 2
        else:
            target.chosen[key] = RATES[_best_training(target, train, test)]
    return float(target.chosen[key])


def _best_training(target: Target, train: Sequence[Tokens], test: Sequence[Tokens]) -> int:
    """Return the index of the rate at which `test` is likeliest after five steps on `train`."""

    def level(k: int) -> float:
        with suppress(_Diverged):
            doing = f"trying a learning rate of {RATES[k]:g}"
            for _ in _trained(target, train, RATES[k], [_TRIED], doing, target.config.batch_size):
                return float(target.nll(test).mean())
        return np.inf

    return _climbed(level)


def _best_first_step(target: Target, train: Sequence[Tokens], test: Sequence[Tokens]) -> int:
    """Return the index of the rate at which `test` is likeliest after the first step of AdamW on all of `train`.

    That step moves each weight by the rate against the sign of its gradient.
    """
    target.bar.say("choosing a learning rate")
    with torch.enable_grad(), _trainable(target) as (lm, parameters), evaluation_mode(lm.module):
        loss = -lm.likelihood(lm.collate(train)).mean()
        if not torch.isfinite(loss):
            raise _Diverged(_DIVERGED)
        loss.backward()
        moved = [p for p in parameters if p.grad is not None]
        signs = [p.grad.sign_() for p in moved if p.grad is not None]
        distance = 0.0

        def level(k: int) -> float:
            nonlocal distance
            with torch.no_grad():
                for p, sign in zip(moved, signs, strict=True):
                    p.sub_(sign, alpha=RATES[k] - distance)
            distance = RATES[k]
            return float(target.nll(test).mean())

        return _climbed(level)


def _climbed(level: Callable[[int], float]) -> int:
    """Return the index of the lowest level: from the middle to the better neighbour as long as there is one."""
    level, at, best = cache(level), -1, len(RATES) // 2
    while at != best:
        at = best
        best = min((k for k in (at, at - 1, at + 1) if 0 <= k < len(RATES)), key=level)
    if not np.isfinite(level(at)):
        raise _Diverged(_DIVERGED)
    return at


def _trained(
    target: Target,
    learned: Sequence[Tokens],
    rate: float,
    stops: Sequence[int],
    doing: str,
    batch_size: int,
) -> Iterator[int]:
    """Train by AdamW on batches of texts in random order, and yield at each stop; then restore the weights."""
    rng = np.random.default_rng(target.config.seed)
    queue: list[int] = []
    target.bar.begin(doing, max(stops))
    with torch.enable_grad(), _trainable(target) as (lm, parameters), evaluation_mode(lm.module):
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        for step in range(1, max(stops) + 1):
            while len(queue) < batch_size:
                queue += rng.permutation(len(learned)).tolist()
            indices, queue = queue[:batch_size], queue[batch_size:]
            loss = -lm.likelihood(lm.collate(learned, indices)).mean()
            if not torch.isfinite(loss):
                raise _Diverged(_DIVERGED)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            target.bar.advance(1)
            if step in stops:
                yield step


@contextmanager
def _trainable(target: Target) -> Iterator[tuple[LanguageModel, list[nn.Parameter]]]:
    """Make the weights trainable for a while: all of them, an adapter's, or those of an adapter made for the attack.

    Quantized weights and those in float16, in which AdamW overflows, get such an adapter, in float32.
    """
    lm, rank = target.lm, target.config.relearning_lora
    own = {n: p for n, p in lm.module.named_parameters() if "lora_" in n} if hasattr(lm.module, "peft_config") else {}
    wide = all(p.dtype in (torch.float32, torch.float64, torch.bfloat16) for p in lm.module.parameters())
    if any(p.is_meta for p in lm.module.parameters()):
        raise Unsuited("parts of the model are offloaded")
    if own or (wide and not rank):
        parameters = own or dict(lm.module.named_parameters())
        with temporarily(parameters), frozen_but(lm.module, parameters.values()):
            require_trainable(lm.module)
            yield lm, list(parameters.values())
        return
    keep_differentiable(lm.module)
    before = {p: p.requires_grad for p in lm.module.parameters()}
    adapted = with_lora(lm, rank or _RANK, target.config.seed)
    try:
        yield adapted, [p for p in adapted.module.parameters() if p.requires_grad]
    finally:
        adapted.module.unload()
        vars(lm.module).pop("peft_config", None)  # which earlier versions of peft leave behind
        for p, required in before.items():
            if p.is_floating_point():
                p.requires_grad_(required)
