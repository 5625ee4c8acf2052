"""Tokens of a run's texts: what is longer than the model's context is read in windows, or cut where that is set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyunlearn.data import Example, Tokens
from pyunlearn.data.lazy import LazyList
from pyunlearn.data.windows import Window, windows_of
from pyunlearn.models.language_model import LanguageModel

SHORT = 64
"""Tokens of a forget text's windows without a holdout: about as many as the texts have that they are compared with.
After more context text is likelier a token, and unseen windows would count as memorized."""

STAND_INS = ("refusal", "winner")
"""Roles that have a text for each forget text, which is read whole."""


class Part(NamedTuple):
    """A forget text as it is read: a record, or a window of one."""

    record: int
    """Index of the record."""
    window: int = 1
    """Number of the window, from 1."""
    windows: int = 1
    """Number of the record's windows."""


class OtherForms(NamedTuple):
    """The same in other words, of forget texts that have a place among the others, and of the holdout."""

    names: list[str]
    """Of each forget text, such as "statement" or "paraphrase 1"; empty for a text as it is."""
    holdout: list[Tokens]
    """The holdout in the same forms."""
    numbers: tuple[NDArray[np.int64], NDArray[np.int64]]
    """Number of the form of each forget text, and of each holdout text with those in `holdout` after them; 0 for texts
    as they are. A form is compared with its like alone."""


@dataclass(frozen=True)
class EncodedTexts:
    """Texts by role, long ones in windows."""

    examples: dict[str, list[Example]]
    """One for each window or shorter text."""
    tokens: dict[str, list[Tokens]]
    """The same as tokens."""
    parts: Sequence[Part]
    """Of which records the forget texts are."""
    records: dict[str, NDArray[np.int32]]
    """Role -> for each text of the user the index of the record that it is, or is a window of."""
    whole: list[Tokens]
    """The forget records before they were cut or divided."""
    rests: dict[int, Tokens]
    """Index of a forget text of which only strings are scored -> the text with all the others scored in their place."""
    notes: list[str]
    """What was divided, and what was not read: one sentence each."""
    other_forms: OtherForms | None = None
    """Where forget texts are the same in other words."""

    @property
    def forms(self) -> list[str]:
        """Name of each forget text's form, empty for texts as they are."""
        return [""] * len(self.parts) if self.other_forms is None else self.other_forms.names


def encode_texts(
    lm: LanguageModel,
    examples: Mapping[str, list[Example]],
    *,
    truncate: bool = False,
    chat_template: str | None = None,
    short_windows: bool = False,
) -> EncodedTexts:
    """Tokenize texts by role; those of the user that are longer than the model's context are divided into windows.

    Args:
        lm: the model; an encoder-decoder model reads no windows, so its texts must fit.
        examples: role -> examples.
        truncate: cut long texts instead.
        chat_template: Jinja source in place of the tokenizer's chat template.
        short_windows: True where windows of the forget texts have SHORT tokens at most.

    Raises DataError, as `data.encode` does.
    """
    divides = not (lm.is_encoder_decoder or truncate)

    def encode(role: str, each: Sequence[Example]) -> list[Tokens]:
        limited = not (truncate or (divides and role not in STAND_INS))
        return lm.encode({role: each}, chat_template=chat_template, limited=limited)[role]

    whole = {role: encode(role, each) for role, each in examples.items()}
    if truncate:
        cut = lm.encode(examples, truncate=True, chat_template=chat_template)
        windows = {role: [[Window(t, range(len(t.written)))] for t in each] for role, each in cut.items()}
        notes = _cut_notes(whole, cut)
    else:
        limit = lm.context_length if divides else None
        start = getattr(lm.tokenizer, "bos_token_id", None)  # without texts there need be no tokenizer
        shorter = {"forget": min(limit, SHORT)} if limit is not None and short_windows else {}
        windows = {
            role: [windows_of(t, shorter.get(role, limit) if len(t) > (limit or 0) else limit, start) for t in each]
            for role, each in whole.items()
        }
        notes = _window_notes(whole, windows, limit)
    forget, own_examples = windows.get("forget", []), examples.get("forget", [])
    parts = _parts([len(each) for each in forget])
    tokens, divided = {}, {}
    for role, each in windows.items():
        if role in STAND_INS and len(parts) > len(forget):
            tokens[role] = [each[part.record][0].tokens for part in parts]
            divided[role] = [examples[role][part.record] for part in parts]
        else:
            tokens[role] = [w.tokens for own in each for w in own]
            divided[role] = [x for e, own in zip(examples[role], each, strict=True) for x in _divided(e, own, lm)]
    indices = [i for i, e in enumerate(own_examples) if e.forget]
    wide = encode("forget", [replace(own_examples[i], forget=()) for i in indices])
    whole_forget, flat = whole.get("forget", []), [w for each in forget for w in each]
    rests = _rests(dict(zip(indices, wide, strict=True)), whole_forget, flat, parts, truncate)
    records = {role: _records([*map(len, each)]) for role, each in windows.items()}
    return EncodedTexts(divided, tokens, parts, records, whole_forget, rests, notes)


def _records(windows: Sequence[int]) -> NDArray[np.int32]:
    """Return the index of the record of each window, from the numbers of windows of all records."""
    return np.repeat(np.arange(len(windows), dtype=np.int32), np.array(windows, dtype=np.int32))


def _parts(windows: Sequence[int]) -> LazyList[Part]:
    """Return the parts of records that are read in as many windows.

    >>> _parts([1, 2])
    [Part(record=0, window=1, windows=1), Part(record=1, window=1, windows=2), Part(record=1, window=2, windows=2)]
    """
    records, counts = _records(windows), np.array(windows, dtype=np.int32)
    firsts = np.cumsum(counts) - counts

    def part(i: int) -> Part:
        record = int(records[i])
        return Part(record, i - int(firsts[record]) + 1, int(counts[record]))

    return LazyList(len(records), part)


def _divided(example: Example, windows: Sequence[Window], lm: LanguageModel) -> list[Example]:
    """Return the scored text of each window of an example; the example itself where it is read at once."""
    if len(windows) == 1:
        return [example]
    examples = []
    for tokens, _ in windows:
        text = " ".join(lm.tokenizer.decode([tokens.ids[i] for i in run]) for run in tokens.runs)
        spans = ((len(example.prompt), len(example.prompt) + len(text)),) if example.prompt else ()
        examples.append(replace(example, completion=text, messages=None, spans=spans, forget=()))
    return examples


def _rests(
    wide: Mapping[int, Tokens],
    whole: Sequence[Tokens],
    windows: Sequence[Window],
    parts: Sequence[Part],
    truncate: bool,
) -> dict[int, Tokens]:
    """Return index -> the tokens that `forget` leaves unscored in a forget text, scored.

    Args:
        wide: index of a record with `forget` -> the record as it would be scored without.
        whole: the records.
        windows: their windows.
        parts: of which records these are.
        truncate: True where texts may be cut; of one that was, all unscored tokens are the rest.
    """
    rests = {}
    for i, ((tokens, source), part) in enumerate(zip(windows, parts, strict=True)):
        if part.record not in wide:
            continue
        length = len(tokens.written)
        cut = truncate and tokens.written != whole[part.record].written
        scored = set(range(length) if cut else wide[part.record].indices)
        own = {*tokens.indices}
        rest = [j for j in range(int(tokens.decoder is None), length) if source[j] in scored and j not in own]
        if rest:
            rests[i] = Tokens.at(tokens.ids, rest, tokens.decoder)
    return rests


def _window_notes(
    whole: Mapping[str, Sequence[Tokens]], windows: Mapping[str, Sequence[Sequence[Window]]], limit: int | None
) -> list[str]:
    """Return a sentence on texts that were divided, and one on tokens that are in no window."""
    if limit is None:
        return []
    counts, unread = [], 0
    for role, each in windows.items():
        long = [
            (t, own) for t, own in zip(whole[role], each, strict=True) if len(own) > 1 or len(t) > len(own[0].source)
        ]
        if long:
            texts, n = f"{len(long)} {role} text{'s' if len(long) > 1 else ''}", sum(len(own) for _, own in long)
            counts.append(f"{texts} in {n} window{'s' if n > 1 else ''}")
        unread += sum(len(t) - len({i for w in own for i in w.source}) for t, own in long)
    if not counts:
        return []
    notes = [
        f"Longer than the {limit} tokens that the model reads at once, and read in windows: {', '.join(counts)}. Each "
        "token is scored once, and from the second window on after an eighth of a window as context or more."
    ]
    if unread:
        notes.append(f"{unread} tokens of these texts were not read: they are not scored, and far from what is.")
    return notes


def _cut_notes(whole: Mapping[str, Sequence[Tokens]], cut: Mapping[str, Sequence[Tokens]]) -> list[str]:
    """Return a sentence on what `truncate` has cut off."""
    counts = []
    for role, each in cut.items():
        lost = [len(a) - len(b) for a, b in zip(whole[role], each, strict=True)]
        if sum(lost):
            n = sum(map(bool, lost))
            counts.append(
                f"{sum(lost)} of {sum(map(len, whole[role]))} tokens in {n} {role} text{'s' if n > 1 else ''}"
            )
    if not counts:
        return []
    return [f"Not looked at, since truncate cuts what is longer than the model's context: {', '.join(counts)}."]


def label_of(index: int, record: int | None, window: int, windows: int, form: str = "") -> str:
    """Return the number of a forget text in tables, from 1, with its window where there are several, and its form.

    >>> label_of(5, 2, 2, 7), label_of(5, 2, 1, 1, "statement")
    ('3 (2/7)', '3 statement')
    """
    number = (index if record is None else record) + 1
    return (f"{number} ({window}/{windows})" if windows > 1 else str(number)) + (form and f" {form}")


def document_verdict(verdicts: Sequence[str]) -> str:
    """Return the verdict on a record from those on its parts: the first of these that any part has.

    still exposed, over-unlearned, undecided, no likelier, forgotten, not memorized

    >>> document_verdict(["not memorized", "forgotten", "not memorized"])
    'forgotten'
    """
    order = ("still exposed", "over-unlearned", "undecided", "no likelier", "forgotten", "not memorized")
    return min(verdicts, key=order.index)
