"""Paraphrases: does the model still know a record in other words?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pyunlearn.attacks.judge import non_members_for
from pyunlearn.attacks.probes import Probes, of_kind, trials_of
from pyunlearn.attacks.target import Target, Trial, Unsuited
from pyunlearn.data import Example
from pyunlearn.probes.rewrites import KINDS, Rarity


def paraphrase(target: Target) -> Iterator[Trial]:
    """Score the paraphrases that come with the records, or where none does, rewrites of them by rule.

    Of paraphrases, the mean over a record's is one form and its likeliest another. Every text is compared by the same
    number of them, the least that any has, so that their number favours none. Of rewrites each kind is a form; with the
    original model only those kinds count by which it knows the forget set.

    Source: Patil et al. 2023, arXiv 2309.17410; Lynch et al. 2024, arXiv 2402.16835; the paraphrases of TOFU, Maini et
    al. 2024, arXiv 2401.06121. The rules are ours.
    """
    texts = target.texts
    if texts.non_member_examples is None:
        raise Unsuited("the texts that are compared exist as tokens alone")
    if any(e.paraphrases for e in texts.forget_examples):
        yield from _of_records(target, texts.forget_examples, texts.non_member_examples)
    else:
        yield from _written(target, texts.forget_examples, texts.non_member_examples)


def _of_records(target: Target, forget: Sequence[Example], non_members: Sequence[Example]) -> Iterator[Trial]:
    """Score the paraphrases that come with the records."""
    probes = [_given(target, each) for each in (forget, non_members)]
    tested = [sum(map(bool, part)) for part in probes]
    if not tested[0]:
        raise Unsuited("the paraphrases are longer than the model's context")
    if tested[1] < (fewest := non_members_for(target.config.false_discovery_rate)):
        raise Unsuited(
            f"{tested[1]} of the {len(non_members)} non-members have paraphrases that the model can read, and the "
            f"comparison takes {fewest}: add some to the holdout, written as those of the forget set were"
        )
    least = min(len(own) for part in probes for own in part if own)
    target.notes.append(_note(tested, [len(forget), len(non_members)], least))
    yield from trials_of(target, "paraphrase", [own[:least] for part in probes for own in part])


def _written(target: Target, forget: Sequence[Example], non_members: Sequence[Example]) -> Iterator[Trial]:
    """Score the rewrites of every text, a kind after the other."""
    if not target.texts.same_kind:
        raise Unsuited(
            "text of another kind than the forget set's fares otherwise when it is rewritten: to tell what is known "
            "takes a holdout of that kind, or a control"
        )
    n, rarity = len(forget), Rarity([*forget, *non_members, *target.texts.retain_examples])
    tried = 0
    for kind, rule in KINDS.items():
        rewritten = [rule(e, rarity) for e in (*forget, *non_members)]
        probes = [[] if e is None else [t for t in target.encoded([e]) if t is not None] for e in rewritten]
        if not any(probes[:n]):
            continue
        yield from of_kind(target, f"paraphrase, {kind}", f'The rewrites "{kind}"', probes)
        tried += 1
    if not tried:
        raise Unsuited("none of the forget texts can be rewritten by rule: give them paraphrases")


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


def _note(tested: Sequence[int], total: Sequence[int], least: int) -> str:
    """Say how many texts are compared by how many paraphrases."""
    forget, non_members = (f"{a} of {b}" if a < b else f"all {b}" for a, b in zip(tested, total, strict=True))
    return (
        f"Paraphrases of {forget} forget texts and {non_members} non-members were compared: the first "
        f"{'' if least == 1 else f'{least} '}of each, since some have no more."
    )
