"""The texts that a verdict compares with, and what may be concluded from them."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyunlearn.data import Example, Tokens, encode, score_note
from pyunlearn.errors import ModelError
from pyunlearn.metrics import non_members_needed
from pyunlearn.models import Likelihood, head_problem
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.models.sampling import require_enough, sample_non_members
from pyunlearn.models.scoring import Scorer
from pyunlearn.probes.calibration import Expectation, Expected, features
from pyunlearn.probes.long_texts import OtherForms
from pyunlearn.probes.unseen import other_language, unseen_like, unseen_texts

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

GRADES = ("holdout", "reference model", "unseen texts", "self-sampled")
"""What a verdict rests on, the strongest evidence first."""

NO_LIKELIER = "no likelier"
"""The verdict in place of "forgotten" where the non-members are self-sampled."""

_LATIN = 0.8  # share of the forget set's letters from which texts in English and German are compared with it
_UNKNOWN = 0.05  # share of unknown tokens up to which a tokenizer reads these texts
_COMMONEST = 0.2  # share of one token up to which it can be a word
_CHARACTERS = 2.0  # of these texts that it makes one token of, at least
_AT_ONCE = 1024  # forget texts whose hidden states and short windows are in memory at a time
_SAME = 0.01  # nats a token: models that differ by less on every text are the same, up to the rounding of their dtype
_HOLDOUT = "A holdout is better evidence: 19 or more texts of the same kind that were never trained on (--holdout)."


class NonMembers(NamedTuple):
    """Texts that were not trained on, for the comparison with B forget texts."""

    grade: str
    """One of GRADES."""
    tokens: list[Tokens]
    """m texts."""
    forget: Expected
    """What the forget texts would have if they were unseen: subtracted from their scores; 0 for a holdout alone."""
    own: Expected
    """The same for the non-members."""
    reason: str
    """Why unseen texts cannot serve, for sampled ones; else empty."""
    by_reference: bool | None = None
    """True: a reference model's numbers are subtracted. False: it scores as the original model does, and is not used.
    None: there is none."""
    forms: tuple[Indices, Indices] | None = None
    """(B,) and (m,) number of each text's form, 0 for texts as they are: a form is compared with its like alone. None:
    all are as they are."""

    @property
    def groups(self) -> tuple[Indices, Indices]:
        """(B,) and (m,) numbers of the forms, as `generalized_exposure` takes them."""
        return self.forms or (np.zeros(len(self.forget.nll), np.int64), np.zeros(len(self.own.nll), np.int64))

    @property
    def as_they_are(self) -> Indices:
        """Indices of the non-members that are no other form of one."""
        return np.flatnonzero(self.groups[1] == 0)

    @property
    def utility_source(self) -> str:
        """Name of the utility set where the non-members serve as one."""
        if self.grade == "holdout":
            return "holdout"
        writer = "the reference model" if self.grade == "reference model" else "the model"
        return f"text sampled from {writer}" if self.reason else "unseen texts"


def uncalibrated(
    grade: str, forget: int, tokens: list[Tokens], *, m: int | None = None, reason: str = ""
) -> NonMembers:
    """Return non-members whose scores are compared as they are, with those of `forget` texts; m: their number."""
    of_forget, own = (Expected(np.zeros(n), np.zeros(n)) for n in (forget, len(tokens) if m is None else m))
    return NonMembers(grade, tokens, of_forget, own, reason)


def non_members_of_holdout(forget: int, holdout: list[Tokens], others: OtherForms | None = None) -> NonMembers:
    """Return a holdout as the non-members of `forget` texts; with `others`, with its other forms after it.

    Raises DataError for fewer than 19 texts.
    """
    require_enough(holdout, holdout=True)
    if others is None:
        return uncalibrated("holdout", forget, holdout)
    return uncalibrated("holdout", forget, holdout + others.holdout)._replace(forms=others.numbers)


def non_members_without_holdout(
    lm: LanguageModel,
    examples: Sequence[Example],
    tokens: Sequence[Tokens],
    *,
    chat_template: str | None = None,
    is_reference: bool = False,
    seed: int = 0,
    batch_size: int = 16,
) -> NonMembers:
    """Return non-members for forget texts that come without a holdout.

    The texts that were written for this package, or its answers for records with prompts, each score less what the text
    would have if it were unseen (`calibration`); where they cannot serve, text sampled from the model, and `reason`
    says why. Where the model is a reference model, `calibrated` has to fill in its numbers.

    Args:
        lm: the reference model where there is one, else the original model.
        examples: the forget set.
        tokens: the same texts as tokens.
        chat_template: Jinja source in place of the tokenizer's, with which the forget set was tokenized.
        is_reference: True for a reference model.
        seed: of the sampling.
        batch_size: texts in one forward pass.

    Raises:
        DataError: fewer than 19 of the sampled texts are different from the forget set.
    """
    if reason := unsuitable(lm, examples, reads_head=not is_reference):
        sampled = sample_non_members(lm, tokens, seed=seed)
        require_enough(sampled, holdout=False)
        return uncalibrated("reference model" if is_reference else "self-sampled", len(tokens), sampled, reason=reason)
    unseen = encode(
        unseen_like(examples),
        lm.tokenizer,
        role="holdout",
        max_length=lm.context_length,
        truncate=True,
        chat_template=chat_template,
    )
    if is_reference:
        return uncalibrated("reference model", len(tokens), unseen)
    expectation = Expectation(features(lm, unseen, batch_size=batch_size))
    parts = [tokens[at : at + _AT_ONCE] for at in range(0, len(tokens), _AT_ONCE)]
    expected = [expectation.of(features(lm, part, batch_size=batch_size)) for part in parts]
    forget = Expected(*(np.concatenate(each) for each in zip(*expected, strict=True)))
    return NonMembers("unseen texts", unseen, forget, expectation.of_unseen(), "")


def calibrated(non_members: NonMembers, forget_nll: Floats, forget: Expected, own: Expected) -> NonMembers:
    """Return the non-members with a reference model's numbers as what is expected of unseen text.

    Every score is then the model's negative log-likelihood less the reference model's of the same text, and every
    share of first-choice tokens less the reference model's. A holdout stays one: its texts and unseen forget texts are
    exchangeable whatever function of the text is subtracted, and what makes a text easy for both models cancels.

    A reference model that gives each forget text the original's log-likelihood cancels memorization too. With a holdout
    it is not used.

    Args:
        non_members: the holdout, or those that `non_members_without_holdout` chose for the reference model.
        forget_nll: (B,) of the forget texts under the original model, nats a token.
        forget: numbers of the forget texts under the reference model.
        own: numbers of the non-members under the reference model.

    Raises:
        ModelError: the reference model gives each forget text the original's log-likelihood, and there is no holdout.
    """
    if np.abs(forget_nll - forget.nll).max() >= _SAME:
        return non_members._replace(forget=forget, own=own, by_reference=True)
    if non_members.grade == "holdout":
        return non_members._replace(by_reference=False)
    raise ModelError(
        "reference_model gives each forget text the log-likelihood that the model gives it, as if it were the same "
        "model, so it cannot tell what is memorized: give one that never saw the forget texts, such as the model "
        "before fine-tuning, or a holdout"
    )


def reference_numbers(scorer: Scorer, likelihood: Likelihood, tokens: Sequence[Tokens]) -> Expected:
    """Return the negative log-likelihoods and shares of first-choice tokens of texts under a reference model.

    Raises ModelError where a log-likelihood is not finite.
    """
    nll = -scorer.mean_log_likelihood(tokens, likelihood)
    if not np.isfinite(nll).all():
        raise ModelError(
            "reference_model gives text NaN or Inf as log-likelihood: its weights are broken, or too large for their "
            "dtype"
        )
    return Expected(nll, scorer.greedy_match(tokens, likelihood))


def capped(verdicts: NDArray[np.str_], grade: str) -> list[str]:
    """Return the verdicts that non-members of a grade allow: self-sampled ones cannot show that a text is forgotten."""
    strongest = NO_LIKELIER if grade == "self-sampled" else "forgotten"
    names = {name: strongest if name == "forgotten" else name for name in map(str, np.unique(verdicts))}
    return [names[name] for name in verdicts]  # each name is in memory once


def evidence_notes(non_members: NonMembers, verdicts: Sequence[str], *, rate: float) -> list[str]:
    """Return what the non-members cannot show of the forget texts, one sentence each.

    Args:
        non_members: of the run.
        verdicts: on the forget texts as they are.
        rate: the false discovery rate.
    """
    texts, nothing_named = len(verdicts), all(name == "not memorized" for name in verdicts)
    m, notes = len(non_members.as_they_are), reference_notes(non_members)
    if non_members.grade == "unseen texts":
        notes.append(
            f"Compared with {m} texts that were written for this package, each score less what is expected "
            f"of unseen text like it, since no holdout was given. {_HOLDOUT}"
        )
    if non_members.grade == "self-sampled":
        notes.append(
            f"Compared with {m} texts that the model wrote, since no holdout was given and {non_members.reason}. They "
            "show whether a text is likelier than what the model writes by itself, not whether it is forgotten. "
            f"{_HOLDOUT}"
        )
    memorized = sum(name != "not memorized" for name in verdicts)
    if "undecided" in verdicts and (fewest := math.ceil(memorized / (rate * (m + 1)) - 1e-9)) > 1:
        notes.append(
            f"{m} non-members can name what is left of {memorized} memorized texts only where {fewest} or more of them "
            f"are, where a text has hardly moved or where the model writes it; to name any single one takes at least "
            f"{non_members_needed(memorized, rate=rate)}."
        )
    return notes + (power_notes(m, texts, rate=rate) if nothing_named else [])


def power_notes(m: int, texts: int, *, rate: float, noun: str = "texts") -> list[str]:
    """Return a sentence on how many of the texts m non-members can name at least, where that is more than one."""
    if (fewest := math.ceil(texts / (rate * (m + 1)) - 1e-9)) <= 1:
        return []
    return [
        f"{m} non-members can name memorized {noun} only where {fewest} or more of these {texts} are memorized; to "
        f"name a single one takes {non_members_needed(texts, rate=rate)}."
    ]


def reference_notes(non_members: NonMembers) -> list[str]:
    """Return what verdicts by a reference model rest on, and whether it tells the holdout from the forget set."""
    if non_members.by_reference is None:
        return []
    if not non_members.by_reference:
        return [
            "The reference model gives each forget text the log-likelihood that the model gives it, as if it were the "
            "same model, so the verdicts are made without it, by the holdout alone."
        ]
    if non_members.grade == "holdout":
        sides = zip((non_members.forget, non_members.own), non_members.groups, strict=True)
        return [
            *score_note(*(expected.nll[forms == 0] for expected, forms in sides)),
            "Each score is less what the reference model gives the same text, of the holdout as of the forget set.",
        ]
    m = len(non_members.tokens)
    texts = f"{m} texts that were written for this package"
    if non_members.reason:
        texts = f"{m} texts that the reference model wrote ({non_members.reason})"
    return [
        f"Compared with {texts}, each score less what the reference model gives the same text, since no holdout was "
        "given. This holds if the reference model never saw the forget texts: the model before fine-tuning is the "
        "usual one. Fine-tuning makes all text of its kind likelier than the reference model expects, so unseen text "
        f"of that kind may count as memorized. {_HOLDOUT}"
    ]


def unsuitable(lm: LanguageModel, examples: Sequence[Example], *, reads_head: bool = True) -> str:
    """Return why the package's own texts cannot be compared with the forget set; empty where they can.

    Args:
        lm: the model.
        examples: the forget set.
        reads_head: False where the model's hidden states and head are not needed.
    """
    if lm.is_encoder_decoder:
        return "an encoder-decoder model reads no plain text"
    if len({bool(e.prompt) for e in examples}) > 1:
        return "some of the forget texts have prompts and others have none"
    characters = Counter[str]()
    for e in examples:
        characters.update(e.prompt + e.completion)
    letters = {c: n for c, n in characters.items() if c.isalpha()}
    latin = sum(n for c, n in letters.items() if "LATIN" in unicodedata.name(c, ""))
    if latin < _LATIN * sum(letters.values()) or not letters:
        return "the forget texts are not in Latin script"
    if reason := other_language(examples):
        return reason
    if reads_head and (problem := head_problem(lm.inner)):
        return f"{problem}"
    words = [e.completion for e in unseen_texts()[:50]]
    ids = [i for text in words for i in lm.tokenizer(text, add_special_tokens=False).input_ids]
    unknown = sum(i == lm.tokenizer.unk_token_id for i in ids)
    commonest = max(Counter(ids).values())  # some tokenizers have a token for unknown words that is not called so
    if (
        unknown > _UNKNOWN * len(ids)
        or commonest > _COMMONEST * len(ids)
        or sum(map(len, words)) < _CHARACTERS * len(ids)
    ):
        return "the tokenizer was not made for English"
    return ""
