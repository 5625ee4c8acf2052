"""Checks of the texts that a run compares with or trains on: copies of forget texts, repetitions, length, register."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyunlearn.data.copies import near_copies
from pyunlearn.data.examples import Example
from pyunlearn.data.overlap import Words, present, searched, words, words_of
from pyunlearn.errors import DataError

__all__ = ["CheckedTexts", "check_texts", "groups_of_copies", "length_note", "score_note"]

FEWEST = 19  # with fewer non-members no exposure is significant: log2(20) = 4.32 bits

_SHOWN = 5  # numbers of examples in a message
_FACTOR = 2.0  # ratio of median lengths that is reported
_LENGTH_LEVEL = 0.003  # of the test of lengths, below 1 in 100 because lengths are only roughly log-normal
_LEAST_SPREAD = 0.1  # standard deviation of log-lengths that is assumed at least, for texts all of one length
_SCORE_LEVEL = 0.001


class CheckedTexts(NamedTuple):
    """Texts of a run after the checks."""

    examples: dict[str, list[Example]]
    """By role. Without copies of forget texts in retain, and without repetitions in the holdout."""
    notes: list[str]
    """What was left out, which forget texts are copies of one another, and how the holdout differs from the forget set:
    one sentence each, without any text."""


def check_texts(examples: Mapping[str, list[Example]]) -> CheckedTexts:
    """Check retain set and holdout against the forget set, and it against itself; no model is needed.

    Args:
        examples: role -> examples: forget; retain and holdout where there are some.

    Returns:
        CheckedTexts. What was left out is also a warning. Copies within the forget set are noted, and stay.

    Raises:
        DataError: a copy of a forget text is in the holdout; nothing of retain is left; too few of the holdout's texts
            are different.

    >>> answers = [Example("", "The boat left the harbour at dawn and nobody saw it.")]
    >>> check_texts({"forget": answers}).notes
    []
    """
    checked = dict(examples)
    texts = {role: words_of(e.prompt + e.completion for e in each) for role, each in examples.items()}
    notes = []
    if "retain" in examples:
        copies = {j for _, j in _copies(examples["forget"], texts["forget"], texts["retain"])}
        checked["retain"] = [e for j, e in enumerate(examples["retain"]) if j not in copies]
        notes += _left_out(sorted(copies), len(texts["retain"]))
    if "holdout" in examples:
        _refuse_copies(examples, texts)
        first = {text: j for j, text in reversed(list(enumerate(texts["holdout"])))}
        checked["holdout"] = [examples["holdout"][j] for j in sorted(first.values())]
        notes += _repeated(len(texts["holdout"]), len(first))
    for note in notes:
        warnings.warn(note, stacklevel=3)
    notes += _grouped(examples["forget"], texts["forget"])
    if "holdout" in checked:
        notes += _spans_note(examples["forget"], examples["holdout"])
        notes += length_note(*([len(words(e.scored_text)) for e in checked[role]] for role in ("forget", "holdout")))
    return CheckedTexts(checked, notes)


def groups_of_copies(examples: Sequence[Example]) -> list[list[int]]:
    """Return the groups of two examples or more that are copies or near copies of one another, or contain one.

    Args:
        examples: of one set.

    Returns:
        The indices of each group, in order.

    >>> boat = "The boat left the harbour at dawn and nobody saw it."
    >>> groups_of_copies([Example("", boat), Example("", "Another text of some words."), Example("", boat + " Again.")])
    [[0, 2]]
    """
    return _groups_of(examples, words_of(e.prompt + e.completion for e in examples))


def length_note(forget: Sequence[int], holdout: Sequence[int]) -> list[str]:
    """Return a sentence where the texts of the holdout have another length than the forget texts; else nothing.

    The medians must differ by more than a factor of 2, and the means of log(length) by more than chance allows
    (Student's t, p < 0.003). Of holdouts of the forget set's own source, about 1 in 100 or fewer are reported.

    Args:
        forget: (B,) lengths in words.
        holdout: (m,) the same.

    >>> length_note([40] * 5, [12] * 20)[0].partition(":")[0]
    'The holdout is of another length than the forget set'
    """
    from scipy.stats import t

    a, b = (np.log(np.asarray(lengths, dtype=np.float64)) for lengths in (forget, holdout))
    medians = float(np.median(forget)), float(np.median(holdout))
    freedom = len(a) + len(b) - 2
    if max(medians) <= _FACTOR * min(medians) or freedom < 1:
        return []
    variance = (((a - a.mean()) ** 2).sum() + ((b - b.mean()) ** 2).sum()) / freedom
    error = max(float(np.sqrt(variance)), _LEAST_SPREAD) * np.sqrt(1 / len(a) + 1 / len(b))
    if 2 * t.sf(abs(a.mean() - b.mean()) / error, freedom) >= _LENGTH_LEVEL:
        return []
    return [
        f"The holdout is of another length than the forget set: {medians[1]:g} words at the median, where the forget "
        f"texts have {medians[0]:g}. Longer texts are likelier a token, so give a holdout of texts as long as these."
    ]


def score_note(forget: NDArray[np.float64], holdout: NDArray[np.float64]) -> list[str]:
    """Return a sentence where a reference model gives the holdout other scores than the forget set; else nothing.

    The test is Mann and Whitney's, p < 0.001: it reports 1 in 1000 holdouts of the forget set's own source.

    Args:
        forget: (B,) mean negative log-likelihoods under the reference model, nats a token.
        holdout: (m,) the same.

    >>> score_note(np.linspace(1, 2, 20), np.linspace(3, 4, 20))[0].partition(",")[0]
    'Under the reference model the holdout is 2.00 nats a token less likely than the forget set (Mann-Whitney'
    """
    from scipy.stats import mannwhitneyu

    p = float(mannwhitneyu(forget, holdout).pvalue)
    if not p < _SCORE_LEVEL:
        return []
    shift = float(np.median(holdout) - np.median(forget))
    return [
        f"Under the reference model the holdout is {abs(shift):.2f} nats a token {'less' if shift > 0 else 'more'} "
        f"likely than the forget set (Mann-Whitney, p = {p:.1g}): it is of another kind, or the reference model was "
        "trained on one of the two. Give a holdout from the same source, or verdicts measure that difference."
    ]


def _copies(examples: Sequence[Example], texts: Sequence[Words], documents: Sequence[Words]) -> set[tuple[int, int]]:
    """Return (index of the example, index of the document) where a document contains an example or nearly one.

    Each example is searched for with its prompt, and a long completion that no other example has also alone. A document
    that shares the prompt but not the completion is no copy, since only the completion is scored. Where other parts of
    the example are scored, they stand for its completion.

    Args:
        examples: of one set.
        texts: their words, prompts included.
        documents: words of the texts of the other set.
    """
    completions = [
        t if e.scored_text == e.prompt + e.completion else words(e.scored_text)
        for e, t in zip(examples, texts, strict=True)
    ]
    queries = searched(texts, completions)
    pairs = [(queries[i][0], j) for i, j in near_copies([query for _, query in queries], documents)]
    return {(i, j) for i, j in pairs if present(completions[i], documents[j])}


def _left_out(copies: list[int], total: int) -> list[str]:
    """Return the note on copies in the retain set. Raises DataError where nothing else is in it."""
    if not copies:
        return []
    if len(copies) == total:
        what = "the retain text is a copy of a forget text"
        what = what if total == 1 else "all retain texts are copies of forget texts"
        raise DataError(f"{what}, so nothing of retain is left: give other text that must keep working")
    are = "is a copy of a forget text and is" if len(copies) == 1 else "are copies of forget texts and are"
    return [f"{len(copies)} of {total} retain texts {are} left out: {_numbers('retain example', copies)}."]


def _groups_of(examples: Sequence[Example], texts: Sequence[Words]) -> list[list[int]]:
    """Return the groups of copies among examples, and their words are `texts`."""
    return _groups(len(examples), _copies(examples, texts, texts))


def _grouped(examples: Sequence[Example], texts: Sequence[Words]) -> list[str]:
    """Return the note on forget texts that are copies of one another, or contain one, by group."""
    groups = _groups_of(examples, texts)
    if not groups:
        return []
    count = sum(map(len, groups))
    shown = [_some(group) for group in groups[:_SHOWN]]
    more = [f"and {len(groups) - _SHOWN} more groups"] if len(groups) > _SHOWN else []
    return [
        f"{count} of {len(examples)} forget texts are copies or near copies of others, in {len(groups)} "
        f"group{'s' if len(groups) > 1 else ''}, and each has its own verdict: examples {'; '.join(shown + more)}."
    ]


def _groups(count: int, pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Return the groups of two indices or more below `count` that pairs connect, each in order."""
    before = list(range(count))  # another index of the same group, or itself

    def first(i: int) -> int:
        while before[i] != i:
            before[i] = before[before[i]]
            i = before[i]
        return i

    for pair in pairs:
        a, b = sorted(map(first, pair))
        before[b] = a
    groups: dict[int, list[int]] = {}
    for i in range(count):
        groups.setdefault(first(i), []).append(i)
    return [group for group in groups.values() if len(group) > 1]


def _refuse_copies(examples: Mapping[str, list[Example]], texts: Mapping[str, list[Words]]) -> None:
    """Raise DataError where the holdout has a copy of a forget text, contains one, or is part of one."""
    pairs = {(j, i) for i, j in _copies(examples["forget"], texts["forget"], texts["holdout"])}
    pairs |= _copies(examples["holdout"], texts["holdout"], texts["forget"])
    if not pairs:
        return
    j, i = min(pairs)
    more = len({other for other, _ in pairs}) - 1
    others = "" if more == 0 else f", and {more} more {'is' if more == 1 else 'are'} too"
    raise DataError(
        f"holdout example {j + 1} is a copy, or nearly one, of forget example {i + 1}{others}: take it out, for the "
        "holdout is text that was never trained on"
    )


def _spans_note(forget: Sequence[Example], holdout: Sequence[Example]) -> list[str]:
    """Return a sentence where strings of the forget texts are scored, and whole texts of the holdout."""
    if not any(e.forget for e in forget) or any(e.forget for e in holdout):
        return []
    return [
        'Of forget texts only the strings in "forget" are scored, and of the holdout whole texts: give its records a '
        '"forget" too, of the same kind, or verdicts measure that difference.'
    ]


def _repeated(total: int, different: int) -> list[str]:
    """Return the note on repetitions in the holdout. Raises DataError where too few texts are different."""
    if total == different:
        return []
    if different < FEWEST:
        raise DataError(
            f"to tell memorized from unseen takes {FEWEST} non-members or more, and of the holdout's {total} texts "
            f"only {different} are different: give a holdout of {FEWEST} different texts that were never trained on"
        )
    again = total - different
    return [
        f"{again} of {total} holdout texts {'repeats another one and is' if again == 1 else 'repeat others and are'} "
        f"left out: {different} different ones count."
    ]


def _numbers(name: str, indices: list[int]) -> str:
    """Return the numbers of the first examples: "retain examples 3, 7"."""
    return f"{name}{'s' if len(indices) > 1 else ''} {_some(indices)}"


def _some(indices: list[int]) -> str:
    """Return the first numbers, "3, 7", and how many more there are."""
    shown = ", ".join(str(i + 1) for i in indices[:_SHOWN])
    return shown + (f" and {len(indices) - _SHOWN} more" if len(indices) > _SHOWN else "")
