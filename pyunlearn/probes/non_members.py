"""The texts that a verdict compares with, and what may be concluded from them."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyunlearn.data import Example, Tokens, encode
from pyunlearn.metrics import non_members_needed
from pyunlearn.models import head_problem
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.sampling import require_enough, sample_non_members
from pyunlearn.probes.calibration import Expectation, Expected, features

Floats = NDArray[np.float64]

GRADES = ("holdout", "unseen texts", "self-sampled")
"""Sources of non-members, the strongest evidence first."""

UTILITY_SOURCES = {"holdout": "holdout", "unseen texts": "unseen texts", "self-sampled": "text sampled from the model"}
"""Grade -> name of the utility set where the non-members serve as one."""

NO_LIKELIER = "no likelier"
"""The verdict in place of "forgotten" where the non-members are self-sampled."""

TEXTS = Path(__file__).with_name("unseen_texts.jsonl")
"""JSONL with register and text, 18 of each of 13 kinds, written for this package."""
_LATIN = 0.8  # share of the forget set's letters from which texts in English and German are compared with it
_UNKNOWN = 0.05  # share of unknown tokens up to which a tokenizer reads these texts
_CHARACTERS = 2.0  # of these texts that it makes one token of, at least


class NonMembers(NamedTuple):
    """Texts that were not trained on, for the comparison with B forget texts."""

    grade: str
    """One of GRADES."""
    tokens: list[Tokens]
    """m texts."""
    forget: Expected
    """What the forget texts would have if they were unseen: subtracted from their scores; 0 for a holdout."""
    own: Expected
    """The same for the non-members."""
    reason: str
    """Why unseen texts cannot serve, for self-sampled ones; else empty."""


def uncalibrated(
    grade: str, forget: int, tokens: list[Tokens], *, m: int | None = None, reason: str = ""
) -> NonMembers:
    """Return non-members whose scores are compared as they are, with those of `forget` texts; m: their number."""
    of_forget, own = (Expected(np.zeros(n), np.zeros(n)) for n in (forget, len(tokens) if m is None else m))
    return NonMembers(grade, tokens, of_forget, own, reason)


def non_members_of_holdout(forget: int, holdout: list[Tokens]) -> NonMembers:
    """Return a holdout as the non-members of `forget` texts. Raises DataError for fewer than 19 texts."""
    require_enough(holdout, holdout=True)
    return uncalibrated("holdout", forget, holdout)


def non_members_without_holdout(
    lm: LanguageModel, examples: Sequence[Example], tokens: Sequence[Tokens], *, seed: int = 0, batch_size: int = 16
) -> NonMembers:
    """Return non-members for forget texts that come without a holdout.

    The texts that were written for this package, each score less what the text would have if it were unseen
    (`calibration`); where they cannot serve, text sampled from the model, and `reason` says why.

    Args:
        lm: the original model.
        examples: the forget set.
        tokens: the same texts as tokens.
        seed: of the sampling.
        batch_size: texts in one forward pass.

    Raises:
        DataError: fewer than 19 of the sampled texts are different from the forget set.
    """
    if reason := unsuitable(lm, examples):
        sampled = sample_non_members(lm, tokens, seed=seed)
        require_enough(sampled, holdout=False)
        return uncalibrated("self-sampled", len(tokens), sampled, reason=reason)
    unseen = encode(unseen_texts(), lm.tokenizer, role="holdout", max_length=lm.context_length, truncate=True)
    expectation = Expectation(features(lm, unseen, batch_size=batch_size))
    forget = expectation.of(features(lm, tokens, batch_size=batch_size))
    return NonMembers("unseen texts", unseen, forget, expectation.of_unseen(), "")


def unseen_texts() -> list[Example]:
    """Return the texts that were written for this package: 13 kinds, English and German."""
    lines = TEXTS.read_text(encoding="utf-8").splitlines()
    return [Example("", json.loads(line)["text"]) for line in lines]


def capped(verdicts: NDArray[np.str_], grade: str) -> list[str]:
    """Return the verdicts that non-members of a grade allow: self-sampled ones cannot show that a text is forgotten."""
    strongest = NO_LIKELIER if grade == "self-sampled" else "forgotten"
    return [strongest if name == "forgotten" else str(name) for name in verdicts]


def evidence_notes(non_members: NonMembers, verdicts: Sequence[str], *, rate: float) -> list[str]:
    """Return what the non-members cannot show of the forget texts, one sentence each.

    Args:
        non_members: of the run.
        verdicts: on the forget texts.
        rate: the false discovery rate.
    """
    texts, nothing_named = len(verdicts), all(name == "not memorized" for name in verdicts)
    m, notes = len(non_members.tokens), []
    better = "A holdout is better evidence: 19 or more texts of the same kind that were never trained on (--holdout)."
    if non_members.grade == "unseen texts":
        notes.append(
            f"Compared with {m} texts that were written for this package, each score less what is expected of unseen "
            f"text like it, since no holdout was given. {better}"
        )
    if non_members.grade == "self-sampled":
        notes.append(
            f"Compared with {m} texts that the model wrote, since no holdout was given and {non_members.reason}. They "
            "show whether a text is likelier than what the model writes by itself, not whether it is forgotten. "
            f"{better}"
        )
    fewest = math.ceil(texts / (rate * (m + 1)) - 1e-9)
    if nothing_named and fewest > 1:
        notes.append(
            f"{m} non-members can name memorized texts only where {fewest} or more of these {texts} are memorized; to "
            f"name a single one takes {non_members_needed(texts, rate=rate)}."
        )
    return notes


def unsuitable(lm: LanguageModel, examples: Sequence[Example]) -> str:
    """Return why the package's own texts cannot be compared with the forget set; empty where they can."""
    if lm.is_encoder_decoder:
        return "an encoder-decoder model reads no plain text"
    if any(e.prompt for e in examples):
        return "the forget texts have prompts"
    letters = [c for e in examples for c in e.completion if c.isalpha()]
    if sum("LATIN" in unicodedata.name(c, "") for c in letters) < _LATIN * len(letters) or not letters:
        return "the forget texts are not in Latin script"
    if problem := head_problem(lm.inner):
        return f"{problem}"
    words = [e.completion for e in unseen_texts()[:50]]
    ids = [i for text in words for i in lm.tokenizer(text, add_special_tokens=False).input_ids]
    unknown = sum(i == lm.tokenizer.unk_token_id for i in ids)
    if unknown > _UNKNOWN * len(ids) or sum(map(len, words)) < _CHARACTERS * len(ids):
        return "the tokenizer was not made for English"
    return ""
