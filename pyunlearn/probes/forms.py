"""Other forms of the forget texts, as parts of their records: the user's paraphrases, or rewrites by rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pyunlearn.data import Example, Tokens
from pyunlearn.data.examples import with_completion
from pyunlearn.errors import DataError
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.probes.long_texts import STAND_INS, EncodedTexts, OtherForms
from pyunlearn.probes.renderings import RenderedTexts
from pyunlearn.probes.rewrites import KINDS, Rarity

_OPTION = 'scope="person" (--scope person)'
_NAMED = 5  # records without other forms, in a note

Forms = dict[str, Example]
"""Name -> a text in other words; the first word of the name is the kind, which is compared with its like alone."""


def require_forms(examples: Mapping[str, Sequence[Example]], fewest: int) -> None:
    """Raise DataError unless the forget texts have other forms, and the holdout has some to compare with.

    Args:
        examples: role -> texts.
        fewest: number of holdout texts that the comparison of a form takes.
    """
    forget, holdout = examples["forget"], examples.get("holdout", ())
    if not holdout:
        raise DataError(
            f"{_OPTION} compares each text in other words with unseen text in the same other words, and there is no "
            f"holdout: give one of {fewest} texts of the forget set's kind, or leave scope out"
        )
    forms = _forms_of(examples)
    if not (wanted := _kinds(forms["forget"])):
        raise DataError(
            f"{_OPTION} needs the forget texts in other words, and none can be rewritten by rule: give them "
            '"paraphrases", or leave scope out'
        )
    count = max(sum(kind in _kinds([own]) for own in forms["holdout"]) for kind in wanted)
    if count < fewest:
        has, way = "can be rewritten as the forget texts", "give a larger one of the forget set's kind"
        if _are_given(forget):
            has, way = "have paraphrases", "give it some, written as those of the forget set were"
        raise DataError(
            f"{count} of the {len(holdout)} holdout texts {has}, and {_OPTION} compares with {fewest} or more: {way}, "
            "or leave scope out"
        )


def with_forms(lm: LanguageModel, texts: RenderedTexts, fewest: int) -> RenderedTexts:
    """Return the texts with each forget text's other forms after it, and with those of the holdout.

    Where a forget record has paraphrases, these are the forms; else the rewrites by rule. So they are the probes of the
    attack "paraphrase". Left out is a form that is longer than the model's context, and one of a kind that fewer than
    `fewest` holdout texts have.

    Args:
        lm: the model, of which the tokenizer and the context are used.
        texts: with a holdout.
        fewest: number of holdout texts that the comparison of a form takes.

    Raises DataError where no form is left.
    """
    encoded = texts.encoded
    forms = _forms_of(texts.examples, texts.rendering.of, encoded.records)
    tokens = {role: [_read(lm, own, texts.rendering.chat_template) for own in each] for role, each in forms.items()}
    unseen: dict[str, list[Tokens]] = {kind: [] for kind in _kinds(forms["forget"])}
    for own in tokens["holdout"]:
        for kind, t in {_kind(name): own[name] for name in reversed(own)}.items():  # of several the first
            unseen.setdefault(kind, []).append(t)
    compared = [kind for kind in _kinds(tokens["forget"]) if len(unseen[kind]) >= fewest]
    if not compared:
        raise DataError(
            f"{_OPTION}: no other form of the forget texts is within the model's context there and in {fewest} holdout "
            "texts: give shorter paraphrases, or leave scope out"
        )
    notes = [
        f'The form "{kind}" was left out: {len(unseen[kind])} holdout texts have one that the model can read, and it '
        f"takes {fewest}."
        for kind in _kinds(forms["forget"])
        if kind not in compared
    ]
    if long := sum(map(len, forms["forget"])) - sum(map(len, tokens["forget"])):
        some = f"{long} other forms of forget texts are" if long > 1 else "One other form of a forget text is"
        notes.append(f"{some} longer than the model's context, and left out.")
    rows = [
        (i, name)
        for i, own in enumerate(tokens["forget"])
        for name in ("", *(name for name in own if _kind(name) in compared))
    ]
    if any(name and encoded.parts[i].windows > 1 for i, name in rows) and not _in_windows(encoded, "holdout"):
        notes.append(
            "Forget texts are longer than the model's context, and no holdout text is: rewritten, short texts change "
            "more than windows of long ones, so unseen windows may stand out. Give a holdout of texts as long."
        )
    formed = {encoded.parts[i].record for i, name in rows if name}
    if alone := [str(k + 1) for k in dict.fromkeys(part.record for part in encoded.parts) if k not in formed]:
        more = f" and {len(alone) - _NAMED} more" if len(alone) > _NAMED else ""
        notes.append(
            f"Without other forms, and judged as they are alone: records {', '.join(alone[:_NAMED])}{more}. Each "
            "can have paraphrases of its own."
        )
    widened = _widened(encoded, rows, forms["forget"], tokens["forget"], notes)
    for role in [role for role in STAND_INS if role in encoded.examples]:
        each = [_stand_in(encoded.examples[role][i], forms["forget"][i].get(name)) for i, name in rows]
        widened.examples[role] = each
        widened.tokens[role] = lm.encode({role: each}, chat_template=texts.rendering.chat_template)[role]
    holdout = [(k, t) for k, kind in enumerate(compared, 1) for t in unseen[kind]]
    of_forget = [compared.index(_kind(name)) + 1 if name else 0 for _, name in rows]
    of_holdout = [0] * len(encoded.tokens["holdout"]) + [k for k, _ in holdout]
    numbers = np.array(of_forget), np.array(of_holdout)
    others = OtherForms([name for _, name in rows], [t for _, t in holdout], numbers)
    return replace(texts, encoded=replace(widened, other_forms=others), written=encoded)


def _in_windows(encoded: EncodedTexts, role: str) -> bool:
    """Return whether a text of the role was read in several windows."""
    return bool((np.bincount(encoded.records[role]) > 1).any())


def _widened(
    encoded: EncodedTexts,
    rows: Sequence[tuple[int, str]],
    forms: Sequence[Forms],
    tokens: Sequence[Mapping[str, Tokens]],
    notes: Sequence[str],
) -> EncodedTexts:
    """Return the texts with the rows as the forget set: index of a text and name of its form, empty for the text."""
    examples, own_tokens = encoded.examples["forget"], encoded.tokens["forget"]
    return replace(
        encoded,
        examples=encoded.examples | {"forget": [forms[i][name] if name else examples[i] for i, name in rows]},
        tokens=encoded.tokens | {"forget": [tokens[i][name] if name else own_tokens[i] for i, name in rows]},
        parts=[encoded.parts[i] for i, _ in rows],
        records=encoded.records | {"forget": encoded.records["forget"][[i for i, _ in rows]]},
        rests={n: encoded.rests[i] for n, (i, name) in enumerate(rows) if not name and i in encoded.rests},
        notes=[*encoded.notes, *notes],
    )


def _forms_of(
    examples: Mapping[str, Sequence[Example]],
    rendered: Callable[[Example], Example] = lambda e: e,
    records: Mapping[str, NDArray[np.int32]] | None = None,
) -> dict[str, list[Forms]]:
    """Return the other forms of each forget and holdout text.

    Args:
        examples: role -> texts; of all of them the rarity of words is counted.
        rendered: returns a paraphrase in the form in which the model reads it.
        records: role -> index of the record of each text: only the first window of one has its paraphrases.
    """
    by_hand = _are_given(examples["forget"])
    rarity = Rarity(e for role, each in examples.items() if role not in STAND_INS for e in each)

    def forms(e: Example, first: bool) -> Forms:
        if not by_hand:
            rewritten = {kind: rule(e, rarity) for kind, rule in KINDS.items()}
            return {kind: other for kind, other in rewritten.items() if other is not None}
        return {f"paraphrase {k}": rendered(p) for k, p in enumerate(e.paraphrases, 1) if first}

    out = {}
    for role in ("forget", "holdout"):
        own = range(len(examples[role])) if records is None else records[role]
        starts = [i == 0 or own[i] != own[i - 1] for i in range(len(own))]
        out[role] = [forms(e, first) for e, first in zip(examples[role], starts, strict=True)]
    return out


def _are_given(forget: Iterable[Example]) -> bool:
    return any(e.paraphrases for e in forget)


def _kind(name: str) -> str:
    return name.partition(" ")[0]


def _kinds(forms: Iterable[Mapping[str, object]]) -> list[str]:
    """Return the kinds of forms that some texts have, each once."""
    return list(dict.fromkeys(_kind(name) for own in forms for name in own))


def _read(lm: LanguageModel, forms: Forms, chat_template: str | None) -> dict[str, Tokens]:
    """Return name -> tokens, without the forms that are longer than the model's context."""
    tokens = {}
    for name, e in forms.items():
        try:
            (tokens[name],) = lm.encode({"forget": [e]}, chat_template=chat_template)["forget"]
        except DataError:
            continue
    return tokens


def _stand_in(example: Example, form: Example | None) -> Example:
    """Return a refusal or a preferred answer in place of a form of the text that it stands for."""
    return example if form is None else with_completion(form, example.completion)
