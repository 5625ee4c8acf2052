"""Probes: other texts that show whether a record is known, a kind of them at a time, compared with non-members'."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from pyunlearn.attacks.judge import non_members_for
from pyunlearn.attacks.target import Floats, Target, Trial
from pyunlearn.data import Tokens
from pyunlearn.metrics import generalized_exposure
from pyunlearn.metrics.families import KNOWN, SET, stands_out

Probes = list[list[Tokens]]
"""The probes of each forget text and then of each non-member; none of a text that is not tested."""


def of_kind(target: Target, name: str, what: str, probes: Probes) -> Iterator[Trial]:
    """Score one kind of probes, where enough non-members have one and the original model knows the forget set by it.

    Args:
        target: the model and the texts.
        name: of the trials.
        what: the probes, as the subject of a note's sentence, in the plural.
        probes: of all texts; as many for each, or none.
    """
    compared = sum(map(bool, probes[len(target.texts.forget) :]))
    fewest = non_members_for(target.config.false_discovery_rate)
    if compared < fewest:
        target.notes.append(f"{what} were left out: of {compared} non-members there is one, and it takes {fewest}.")
    elif _counts(target, name, what, probes):
        yield from trials_of(target, name, probes)


def trials_of(target: Target, name: str, probes: Probes) -> Iterator[Trial]:
    """Yield the mean over each text's probes, and where they are several the likeliest; all have as many, or none."""
    target.bar.say(name)
    n, flat = len(target.texts.forget), [t for own in probes for t in own]
    tested = np.array([bool(own) for own in probes])
    values = target.nll(flat).reshape(int(tested.sum()), -1)  # (texts, probes of each)
    k = values.shape[1]
    forms = (
        {name: values[:, 0]}
        if k == 1
        else {f"{name}, mean of {k}": values.mean(axis=1), f"{name}, best of {k}": values.min(axis=1)}
    )
    for form, scores in forms.items():
        nll: Floats = np.full(len(probes), np.nan)
        nll[tested] = scores
        yield Trial(form, nll[:n], nll[n:], details={"probes": k})


def _counts(target: Target, name: str, what: str, probes: Probes) -> bool:
    """Return True where the original model knows the forget set by these probes, or there is none to tell it."""
    if target.original is None or len(target.texts.forget) < SET:
        return True
    if name not in target.chosen:
        (trial,) = trials_of(replace(target, lm=target.original), name, probes)
        tested = ~np.isnan(trial.forget)
        unseen = trial.non_members[~np.isnan(trial.non_members)]
        bits = generalized_exposure(trial.forget[tested], unseen).lower
        pvalue = stands_out(bits, unseen.size, target.config.seed)
        target.chosen[name] = pvalue <= KNOWN
        if pvalue > KNOWN:
            target.notes.append(
                f"{what} were left out: the forget set does not stand out by them under the original model "
                f"(p = {pvalue:.2g})."
            )
    return bool(target.chosen[name])
