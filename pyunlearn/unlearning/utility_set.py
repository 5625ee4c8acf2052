"""Choice of the texts on which a run's budgets are measured, among them retain texts that are not trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyunlearn.data import Tokens
from pyunlearn.probes.non_members import NonMembers

Floats = NDArray[np.float64]

_TOKENS = 1024  # scored tokens of a budget's texts, at each evaluation
_PER_TEXTS, _MOST = 64, 4  # as many tokens for each 64 forget texts, at most four times as many: rounds are longer then
_LEAST = 8  # texts of a budget, where there are as many and they are long: fewer have a wide interval
_SPLIT = 20  # different retain texts from which a part is set apart
_SHARE = 5  # one text in this many is set apart at most
_OWN_SHARE = 3  # the same of texts that the model wrote
OWN_TEXTS = "text that the model wrote, gains up to the budget"
"""Name of the utility set of a run with neither a retain set nor other text than the model's own."""
_KNOWN = 0.5  # nats a token, below which a retain set is known by heart: unseen text is rarely so likely


class UtilitySet(NamedTuple):
    """The texts on which the utility budget is measured."""

    tokens: list[Tokens]
    source: str
    trained: bool
    """True where the run trains on them."""
    known: bool = False
    """True where the model knows them by heart."""

    @property
    def notes(self) -> list[str]:
        """A sentence on what these texts cannot show."""
        if not self.trained:
            return []
        measured = f"Utility was measured on {len(self.tokens)} texts that the run also trained on, so other text may"
        if self.known:
            return [
                f"{measured} have lost more. None of the retain texts was set apart, since the model knows them by "
                "heart and would forget what it is not trained on."
            ]
        return [f"{measured} have lost more: with {_SPLIT} different retain texts or more, a fifth would be set apart."]


class RetainTexts(NamedTuple):
    """The retain texts of a run, and those on which its cost is measured."""

    own: list[Tokens]
    """Those of the user that the run may train on, in the order of the schedule."""
    tokens: list[Tokens] | None
    """The same, and after them the rests of forget texts; None where there are neither."""
    rests: dict[int, int]
    """Index of a forget text -> index in `tokens` of its rest."""
    utility: UtilitySet | None


def retain_texts(
    given: list[Tokens] | None,
    own: list[Tokens],
    rests: Mapping[int, Tokens],
    *,
    trains: bool,
    log_likelihood: Callable[[list[Tokens]], Floats],
    forget: int = 1,
) -> RetainTexts:
    """Return the retain texts and the utility set of a run.

    Args:
        given: the retain set, or None.
        own: texts that the model wrote, in place of a retain set; a third of them is set apart.
        rests: index of a forget text of which only strings are forgotten -> what is left of it.
        trains: True where the run trains on these texts.
        log_likelihood: returns (n,) means a token of n texts under the original model, nats.
        forget: number of forget texts.
    """
    retain, utility = split_retain(given, trains=trains, log_likelihood=log_likelihood, forget=forget)
    if own:
        apart = set(own[::_OWN_SHARE])
        retain = [t for t in own if t not in apart]
        utility = UtilitySet(own[::_OWN_SHARE], OWN_TEXTS, trained=False)
    trained = retain or []
    indices = {i: len(trained) + n for n, i in enumerate(rests)} if trains else {}
    return RetainTexts(trained, trained + list(rests.values()) if indices else retain, indices, utility)


def evenly_spaced(tokens: Sequence[Tokens], *, most: int | None = None, forget: int = 1) -> list[int]:
    """Return the indices of evenly spaced texts, about 1024 to 4096 scored tokens in all and 8 texts at least.

    Args:
        tokens: the texts.
        most: largest number of texts; default: all.
        forget: number of forget texts: the more there are, the more tokens.
    """
    total = sum(len(t.scored) for t in tokens)
    wanted = _TOKENS * min(_MOST, max(1, forget // _PER_TEXTS))
    count = max(_LEAST, len(tokens) * wanted // max(total, 1))
    count = min(count, len(tokens) if most is None else most)
    return [i * len(tokens) // count for i in range(count)]


def split_retain(
    retain: list[Tokens] | None, *, trains: bool, log_likelihood: Callable[[list[Tokens]], Floats], forget: int = 1
) -> tuple[list[Tokens] | None, UtilitySet | None]:
    """Return the retain texts that the run may train on, and the utility set; None and None without a retain set.

    Of a set that the model knows by heart each text is to be retained, and what is not trained on would be forgotten
    with the forget set: none is set apart.

    Args:
        retain: the retain set.
        trains: True where the run trains on it.
        log_likelihood: returns (n,) means a token of n texts under the original model, nats.
        forget: number of forget texts.
    """
    if retain is None:
        return None, None
    different = list(dict.fromkeys(retain))
    chosen = [retain[i] for i in evenly_spaced(retain, forget=forget)]
    source = "retain set" if len(chosen) == len(retain) else "part of the retain set"
    if not trains or len(different) < _SPLIT:
        return retain, UtilitySet(chosen, source, trained=trains)
    if -log_likelihood(chosen).mean() < _KNOWN:
        return retain, UtilitySet(chosen, source, trained=True, known=True)
    apart = [different[i] for i in evenly_spaced(different, most=len(different) // _SHARE, forget=forget)]
    unread = set(apart)
    return [t for t in retain if t not in unread], UtilitySet(apart, "retain texts set apart", trained=False)


def non_members_as_utility_set(non_members: NonMembers, forget: int = 1) -> UtilitySet:
    """Return the utility set of a run on `forget` texts without a retain set: evenly spaced non-members."""
    tokens = [non_members.tokens[i] for i in non_members.as_they_are]
    chosen = [tokens[i] for i in evenly_spaced(tokens, forget=forget)]
    return UtilitySet(chosen, non_members.utility_source, trained=False)
