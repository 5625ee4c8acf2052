"""Renderings: does a record come back when the model reads it in another form?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pyunlearn.attacks.probes import Probes, of_kind
from pyunlearn.attacks.target import Target, Trial, Unsuited
from pyunlearn.data.rendering import Rendering, other_renderings
from pyunlearn.errors import DataError


def rendering(target: Target) -> Iterator[Trial]:
    """Score the answer of each record with a prompt in every other form in which a model may read it.

    The forms are those of `template`: the chat template, questions and answers with labels, the texts alone, the answer
    alone. With the original model only those count by which it knows the forget set.

    Source: ours.
    """
    yield from in_forms(target, other_renderings(target.lm.tokenizer))


def in_forms(target: Target, forms: Sequence[Rendering]) -> Iterator[Trial]:
    """Score the records in each of these forms that is not the one in which they are read.

    Raises Unsuited without a holdout, and where no record has a prompt that could be written so.
    """
    if not target.texts.unrendered:
        raise Unsuited("to tell what is known in another form takes a holdout of the forget set's kind")
    tried: list[Probes] = []
    for form in forms:
        probes = _rendered(target, form)
        if probes not in tried and any(probes[: len(target.texts.forget)]):
            yield from of_kind(target, f"rendering, {form.key}", f"The records in the form {form.name}", probes)
            tried.append(probes)
    if not tried:
        raise Unsuited("no record has a prompt that could be written in another form")


def _rendered(target: Target, form: Rendering) -> Probes:
    """Return each text in that form; none of one without a prompt, and of one that it leaves as it is."""
    probes: Probes = []
    for own, record in zip(target.texts.every, target.texts.unrendered, strict=True):
        probes.append([])
        if record is not None and record.prompt:
            try:
                (t,) = target.lm.encode({"forget": [form.of(record)]}, chat_template=form.chat_template)["forget"]
            except DataError:  # longer than the context, or not to be written so
                continue
            probes[-1] += [t] if t != own else []
    return probes
