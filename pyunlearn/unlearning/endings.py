"""Ends of a run that did not settle every example: what would most likely help, and a run without a gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyunlearn.errors import TrainingError
from pyunlearn.unlearning.budget import HOLDOUT_BUDGET, UTILITY_BUDGET

UNDONE = "undone by the merge"
"""The end of a run whose adapter lost too much when it was rounded into the weights."""

_NAMED = 5  # examples that a note names
_NO_GRADIENT = (
    "there is no gradient in the first steps, so the run would change nothing: check that the model uses the "
    "parameters that require one (an adapter that is not active?), the mask, the token weights, and whether a cap of "
    "the method is reached from the start"
)


def advice(
    stopped: str,
    *,
    left: Sequence[str],
    memorized: int,
    visits: float,
    budget_used: float,
    limit: int | None,
    has_retain: bool,
    method: str,
    rounds: bool = False,
) -> list[str]:
    """Return one sentence on what to change after a run that ended with `stopped`; none after any other end.

    Args:
        stopped: the reason why it ended, see `Result.stopped`.
        left: numbers of the memorized examples that are not forgotten, as the tables show them.
        memorized: the number of examples that were memorized.
        visits: optimizer steps that took a memorized example, on average.
        budget_used: largest share of a budget that was used.
        limit: the user's max_steps, or None for the default; after 0 nothing is recommended.
        has_retain: whether there was a retain set.
        method: the name of the method.
        rounds: whether the weights were rounded to the formats of a GGUF file.

    >>> seen = {"memorized": 8, "visits": 2.0, "budget_used": 0.1, "has_retain": True, "method": "ga"}
    >>> advice("max_steps", left=["3"], limit=20, **seen)
    ['1 of 8 memorized texts (number 3) is left after 2 visits each: leave out max_steps, or raise it.']
    """
    one = len(left) == 1
    names = f"number{'' if one else 's'} {some(left)}"
    who = f"{len(left)} of {memorized} memorized texts ({names}) {'is' if one else 'are'} left"
    if stopped == "max_steps" and left and limit != 0:
        used = "most" if budget_used > 1 / 2 else f"only {max(budget_used, 0):.0%}"
        if limit is not None:
            help_ = "leave out max_steps, or raise it"
        elif method != "match":
            help_ = f'{used} of the budget was used; method="auto" would help most'
        else:
            help_ = f"{used} of the budget was used; more retain texts would help most"
        return [f"{who} after {visits:.0f} visits each: {help_}."]
    if stopped == "still extracted" and left:
        option = "a smaller target_exposure" if method == "match" else 'method="auto"'
        return [
            f"{who}: as unlikely as unseen text on average, but many of the tokens are still first choices; {option} "
            "would help most."
        ]
    if stopped == UNDONE and rounds:
        return [
            f"{who}: the adapter forgot them, and its changes are too small for the formats of the GGUF file; a run "
            "without an adapter, which is rounded in each step, would help most."
        ]
    if stopped == UNDONE:
        return [
            f"{who}: the adapter forgot them, and its changes are too small for the dtype of the weights; leave out "
            "merge and save the adapter, or load the weights with more digits (dtype float32, not load_in_4bit)."
        ]
    if stopped in (UTILITY_BUDGET, HOLDOUT_BUDGET) and left:
        option = "utility_budget" if stopped == UTILITY_BUDGET else "holdout_budget"
        help_ = f"a larger {option} would help most" if has_retain else "a retain set (retain=) would help most"
        return [f"{who} within the {stopped}: {help_}."]
    return []


def some(names: Sequence[str]) -> str:
    """Return the first five names for a sentence.

    >>> some(["1", "2", "4", "5", "6", "9"])
    '1, 2, 4, 5, 6 and others'
    """
    return ", ".join(names[:_NAMED]) + (" and others" if len(names) > _NAMED else "")


def require_gradient(records: Sequence[Mapping[str, Any]]) -> None:
    """Raise TrainingError where no step of the first round had a gradient: all further steps would change nothing."""
    if records and all(record["gradient_norm"] == 0 for record in records):
        raise TrainingError(_NO_GRADIENT)


def explained(error: RuntimeError) -> RuntimeError:
    """Return an error of a step, in our words where it says that there is no gradient."""
    return TrainingError(_NO_GRADIENT) if "does not require grad" in str(error) else error
