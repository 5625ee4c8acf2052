"""Choice of the texts on which a run's budgets are measured, among them retain texts that are not trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyunlearn.data import Tokens
from pyunlearn.probes.non_members import NonMembers

Floats = NDArray[np.float64]

_TOKENS = 1024  # scored tokens of a budget's texts, at each evaluation
_LEAST = 8  # texts of a budget, where there are as many and they are long: fewer have a wide interval
_SPLIT = 20  # different retain texts from which a part is set apart
_SHARE = 5  # one text in this many is set apart at most
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


def evenly_spaced(tokens: Sequence[Tokens], *, most: int | None = None) -> list[int]:
    """Return the indices of evenly spaced texts, about 1024 scored tokens in all and 8 texts at least.

    Args:
        tokens: the texts.
        most: largest number of texts; default: all.
    """
    total = sum(len(t.scored) for t in tokens)
    count = max(_LEAST, len(tokens) * _TOKENS // max(total, 1))
    count = min(count, len(tokens) if most is None else most)
    return [i * len(tokens) // count for i in range(count)]


def split_retain(
    retain: list[Tokens] | None, *, trains: bool, log_likelihood: Callable[[list[Tokens]], Floats]
) -> tuple[list[Tokens] | None, UtilitySet | None]:
    """Return the retain texts that the run may train on, and the utility set; None and None without a retain set.

    Of a set that the model knows by heart each text is to be retained, and what is not trained on would be forgotten
    with the forget set: none is set apart.

    Args:
        retain: the retain set.
        trains: True where the run trains on it.
        log_likelihood: returns (n,) means a token of n texts under the original model, nats.
    """
    if retain is None:
        return None, None
    different = list(dict.fromkeys(retain))
    chosen = [retain[i] for i in evenly_spaced(retain)]
    if not trains or len(different) < _SPLIT:
        return retain, UtilitySet(chosen, "retain set", trained=trains)
    if -log_likelihood(chosen).mean() < _KNOWN:
        return retain, UtilitySet(chosen, "retain set", trained=True, known=True)
    apart = [different[i] for i in evenly_spaced(different, most=len(different) // _SHARE)]
    unread = set(apart)
    return [t for t in retain if t not in unread], UtilitySet(apart, "retain texts set apart", trained=False)


def non_members_as_utility_set(non_members: NonMembers) -> UtilitySet:
    """Return the utility set of a run without a retain set: evenly spaced non-members."""
    chosen = [non_members.tokens[i] for i in evenly_spaced(non_members.tokens)]
    return UtilitySet(chosen, non_members.utility_source, trained=False)
