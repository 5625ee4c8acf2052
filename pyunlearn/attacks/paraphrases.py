"""Paraphrases: does the model still know a record in other words?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pyunlearn.attacks.judge import non_members_for
from pyunlearn.attacks.target import Floats, Target, Trial, Unsuited
from pyunlearn.data import Example, Tokens

Probes = list[list[Tokens]]
"""The probes of each forget text and then of each non-member; none of a text that is not tested."""


def paraphrase(target: Target) -> Iterator[Trial]:
    """Score the paraphrases that come with the records: the mean over a record's, and its likeliest.

    Every text is compared by the same number of paraphrases, the least that any has, so that their number favours none.

    Source: Patil et al. 2023, arXiv 2309.17410; Lynch et al. 2024, arXiv 2402.16835; the paraphrased answers of TOFU,
    Maini et al. 2024, arXiv 2401.06121.
    """
    texts = target.texts
    if not any(e.paraphrases for e in texts.forget_examples):
        raise Unsuited('no record of the forget set has "paraphrases"')
    if texts.non_member_examples is None:
        raise Unsuited("the texts that are compared exist as tokens alone")
    n = len(texts.forget)
    probes = _given(target, texts.forget_examples) + _given(target, texts.non_member_examples)
    least = min((len(own) for own in probes if own), default=0)
    tested = [sum(map(bool, part)) for part in (probes[:n], probes[n:])]
    if not tested[0]:
        raise Unsuited("the paraphrases are longer than the model's context")
    if tested[1] < (fewest := non_members_for(target.config.false_discovery_rate)):
        raise Unsuited(
            f"{tested[1]} of the {len(probes) - n} non-members have paraphrases that the model can read, and the "
            f"comparison takes {fewest}: add some to the holdout, written as those of the forget set were"
        )
    target.notes.append(_note(tested, [n, len(probes) - n], least))
    yield from _trials(target, "paraphrase", [own[:least] for own in probes])


def _given(target: Target, examples: Sequence[Example]) -> Probes:
    """Return the paraphrases of each text that the model can read; of a record in windows, with the first window."""
    probes: Probes = []
    seen: set[int] = set()
    for e in examples:
        own = () if id(e.paraphrases) in seen else e.paraphrases
        if own:
            seen.add(id(own))
        encoded = target.encoded([target.texts.rendering.of(p) for p in own])
        probes.append([t for t in encoded if t is not None])
    return probes


def _trials(target: Target, name: str, probes: Probes) -> Iterator[Trial]:
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


def _note(tested: Sequence[int], total: Sequence[int], least: int) -> str:
    """Say how many texts are compared by how many paraphrases."""
    counts = [f"{a} of {b}" if a < b else f"all {b}" for a, b in zip(tested, total, strict=True)]
    paraphrases = "one paraphrase" if least == 1 else f"{least} paraphrases"
    return (
        f"By paraphrases {counts[0]} forget texts and {counts[1]} non-members were compared, each by the first "
        f"{paraphrases} of its own: the least number that any of them has."
    )
