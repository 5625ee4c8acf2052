"""Merging: at which share of the original's weights does a text come back?"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pyunlearn.attacks.target import Target, Trial, Unsuited
from pyunlearn.attacks.temporary import temporarily

_SHARES = (0.25, 0.5)


def merging(target: Target) -> Iterator[Trial]:
    """Mix the weights with those of the original, a quarter and half of them.

    Half of the original brings part of anything back, also into a model that never saw the text, so that only a control
    makes a verdict of it.

    Source: Wang et al. 2024, arXiv 2406.09179.
    """
    if target.original is None:
        raise Unsuited("it needs the original model")
    originals, own = (dict(lm.inner.named_parameters()) for lm in (target.original, target.lm))
    if not all(p.is_floating_point() for p in [*originals.values(), *own.values()]):
        raise Unsuited("weights that are quantized cannot be mixed")
    if any(p.is_meta for p in [*originals.values(), *own.values()]):
        raise Unsuited("parts of a model are offloaded")
    shared = {n: p for n, p in own.items() if n in originals and originals[n].shape == p.shape}
    if len(shared) < len(own):
        raise Unsuited("the original has other parameters (merge an adapter into the weights first)")
    with temporarily(shared) as saved:
        for share in _SHARES:
            with torch.no_grad():
                for name, p in shared.items():
                    before, after = originals[name].detach().to(p.device), saved[name].to(p.device)
                    p.copy_(torch.lerp(after.float(), before.float(), share))
            trial = target.trial(f"merging, {share:g} of the original", share=share)
            yield Trial(trial.name, trial.forget, trial.non_members, judged=False, details=trial.details)
