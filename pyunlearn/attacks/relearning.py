"""Relearning: does a text come back when the model is fine-tuned on other text?

On the forget texts but this one, on text that must keep working, or on text that has nothing to do with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np
import torch
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
_TRIED = 5  # steps with each rate
_RANK = 8  # of the adapter on quantized and float16 weights
_DIVERGED = "fine-tuning gives NaN or Inf: set a smaller relearning_rate"


class _Diverged(Unsuited):
    """Raised where fine-tuning has no finite loss."""


def relearning(target: Target) -> Iterator[Trial]:
    """Train on all parts of the forget set but one, and score that one; each part is once the one.

    Source: Hu et al. 2024, arXiv 2406.13356; Lynch et al. 2024, arXiv 2402.16835.
    """
    texts, config = target.texts, target.config
    _require_fair(target)
    records = sorted(set(texts.records))
    folds = min(config.folds, len(records))
    if folds < 2:
        raise Unsuited("one record is no other text to relearn from")
    order = np.random.default_rng(config.seed).permutation(records)
    fold_of = {int(record): i % folds for i, record in enumerate(order)}
    fold = np.array([fold_of[record] for record in texts.records])
    n, m, stops = len(texts.forget), len(texts.non_members), _stops(config.relearning_steps)
    forget = {step: np.full(n, np.nan) for step in stops}
    unseen = {step: np.full((n, m), np.nan) for step in stops}
    rates = []
    for k in range(folds):
        own = np.flatnonzero(fold == k)
        learned = [texts.forget[i] for i in np.flatnonzero(fold != k)]
        rates.append(_rate(target, learned, f"part {k + 1}"))
        probes = [texts.forget[i] for i in own] + texts.non_members
        for step in _trained(target, learned, rates[k], stops, f"relearning from part {k + 1} of {folds}"):
            values = target.nll(probes)
            forget[step][own], unseen[step][own] = values[: len(own)], values[len(own) :]
    for step in stops:
        details = {"steps": step, "learning_rates": rates, "folds": folds}
        name = f"relearning, {step} steps on the others"
        yield Trial(name, forget[step], unseen[step], groups=fold, details=details)


def relearning_retain(target: Target) -> Iterator[Trial]:
    """Train on the retain set, as its owner would.

    Source: Lucki et al. 2024, arXiv 2409.18025.
    """
    if not target.texts.retain:
        raise Unsuited("there is no retain set")
    compared = set(target.texts.every)
    yield from _on_other_text(target, [t for t in target.texts.retain if t not in compared], "retain text")


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


def _on_other_text(target: Target, learned: list[Tokens], what: str) -> Iterator[Trial]:
    _require_fair(target)
    if not learned:
        raise Unsuited(f"all of the {what} is compared with the forget set")
    rate = _rate(target, learned, what)
    for step in _trained(target, learned, rate, _stops(target.config.retain_steps), f"relearning from {what}"):
        yield target.trial(f"relearning, {step} steps on {what}", steps=step, learning_rate=rate)


def _require_fair(target: Target) -> None:
    """Raise Unsuited where training makes all text of the forget set's kind likelier than the non-members."""
    if not target.texts.same_kind:
        raise Unsuited(
            "it makes all text of the forget set's kind likelier: to tell what comes back takes a holdout of that "
            "kind, or a control"
        )


def _stops(steps: int) -> list[int]:
    """Return the steps after which the texts are scored: a quarter of them, and all."""
    return sorted({max(1, steps // 4), steps})


def _rate(target: Target, learned: Sequence[Tokens], key: str) -> float:
    """Return the learning rate: as set, or the best of six for the attacker, who has `learned` and nothing else.

    That is the one at which half of these texts come back most when the model is trained on the other half. Texts that
    are compared afterwards have no part in it, so that they stay exchangeable. The control gets the same rate.
    """
    if target.config.relearning_rate is not None:
        return target.config.relearning_rate
    if key not in target.chosen:
        sample = list(learned[: 8 * target.config.batch_size])
        train, test = (sample[::2], sample[1::2]) if len(sample) > 1 else (sample, sample)
        levels = {}
        for rate in RATES:
            with suppress(_Diverged):
                for _ in _trained(target, train, rate, [_TRIED], f"trying a learning rate of {rate:g}"):
                    levels[rate] = target.nll(test).mean()
        if not levels:
            raise _Diverged(_DIVERGED)
        target.chosen[key] = min(levels, key=lambda rate: (levels[rate], rate))
    return float(target.chosen[key])


def _trained(target: Target, learned: Sequence[Tokens], rate: float, stops: Sequence[int], doing: str) -> Iterator[int]:
    """Train by AdamW on batches of texts in random order, and yield at each stop; then restore the weights."""
    config, rng = target.config, np.random.default_rng(target.config.seed)
    queue: list[int] = []
    target.bar.begin(doing, max(stops))
    with torch.enable_grad(), _trainable(target) as (lm, parameters), evaluation_mode(lm.module):
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        for step in range(1, max(stops) + 1):
            while len(queue) < config.batch_size:
                queue += rng.permutation(len(learned)).tolist()
            indices, queue = queue[: config.batch_size], queue[config.batch_size :]
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
