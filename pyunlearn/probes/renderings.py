"""Choice of the form in which the model reads the records: the one in which it knows the forget set best."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyunlearn.data import Example, Tokens
from pyunlearn.data.rendering import Rendering, other_renderings, rendering_of
from pyunlearn.data.texts import rendered_text
from pyunlearn.errors import DataError
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.probes.long_texts import SHORT, EncodedTexts, encode_texts

Floats = NDArray[np.float64]
Score = Callable[[Sequence[Tokens]], Sequence[NDArray[np.floating]]]
"""Returns the log-likelihoods of each text's scored tokens, nats."""

RECORDS = 64
"""Most records that are compared."""
LEVEL = 0.01
"""Level of the test, over all other renderings together."""
LEAST_GAIN = 0.1
"""Nats a token by which another rendering must be likelier on average."""
LEAST_SHARE = 0.1
"""The same as a share of the negative log-likelihood in the records' own rendering: a form is also likelier or less
likely for reasons that have nothing to do with memory, by more where the text is unlikely."""
CLEAR_GAIN = 0.5
"""Nats a token in every record with which no test is needed: of one record, or two, there can be none."""
CLEAR_SHARE = 0.5
"""Share of the negative log-likelihood that must be gained then."""

AS_GIVEN = "prompt and completion as given"
"""Name of the records' own rendering where they are not questions with answers or chats."""

_SHOWN = 400  # characters of a prompt or completion in a message


class Gain(NamedTuple):
    """Another rendering that was compared with the records' own."""

    rendering: Rendering
    nll: float
    """Mean negative log-likelihood of the records in their own rendering, over the same tokens, nats a token."""
    differences: Floats
    """(n,) rises of the records' mean log-likelihoods over the answer tokens that both have, nats a token."""


@dataclass(frozen=True)
class RenderedTexts:
    """The texts of a run in one rendering, by role."""

    given: dict[str, list[Example]]
    """As they were read."""
    rendered: dict[str, list[Example]]
    """As they are rendered."""
    encoded: EncodedTexts
    rendering: Rendering
    own: str
    """Name of the rendering with which template="auto" compares others."""
    short_windows: bool
    """True where windows of forget texts have SHORT tokens at most."""
    compared: tuple[Gain, ...] = ()
    """The other renderings that auto compared with it."""
    written: EncodedTexts | None = None
    """Where `encoded` has other forms of the texts too: the texts as they are."""

    @property
    def as_written(self) -> RenderedTexts:
        """The texts without their other forms."""
        return self if self.written is None else replace(self, encoded=self.written, written=None)

    @property
    def examples(self) -> dict[str, list[Example]]:
        """The texts as they are rendered, long ones as one example for each window."""
        return self.encoded.examples

    @property
    def tokens(self) -> dict[str, list[Tokens]]:
        """The tokens of `examples`."""
        return self.encoded.tokens

    @property
    def name(self) -> str | None:
        """Name of the rendering; None where no forget text has a prompt."""
        return self.rendering.name if any(e.prompt for e in self.given.get("forget", ())) else None

    def notes(self, *, memorized: bool) -> list[str]:
        """Return a sentence where the rendering is not the records' own, and one where nothing is memorized in it.

        Args:
            memorized: True where at least one record is, or was before unlearning.
        """
        if self.name is None:
            return self._strings() + self._windows()
        gain = next((g.differences for g in self.compared if g.rendering == self.rendering), None)
        notes = self._turns() + self._strings() + self._windows()
        if gain is not None:
            records = f"{len(gain)} record{'s' if len(gain) > 1 else ''}"
            notes.append(
                f"The model reads the records in the form {self.name}, not in their own, {self.own}: the answers are "
                f"{gain.mean():.2f} nats a token likelier so under the original model (mean of {records})."
            )
        elif self.name != self.own:
            notes.append(f"The model reads the records in the form {self.name}, as `template` says, not {self.own}.")
        return notes if memorized else [*notes, self._not_memorized()]

    def _turns(self) -> list[str]:
        """Return a sentence on how much of the forget set's conversations is scored; none for completions alone.

        Those with "forget" strings are left out: no turn of them is scored whole.
        """
        records = list(zip(self.given["forget"], self.encoded.whole, strict=True))
        chats = [(e, t) for e, t in records if e.prompt and not e.forget]
        chats = [(e, t) for e, t in chats if e.turns != "last" or len(e.messages or ()) > 2]
        if not chats:
            return []
        scored, total, turns, all_turns = 0, 0, 0, 0
        for e, t in chats:
            roles = [message.role for message in e.messages or ()] or ["user", "assistant"]
            own = "last" if t.decoder is not None else e.turns
            scored, total, all_turns = scored + len(t.scored), total + len(t), all_turns + len(roles)
            turns += {"all": len(roles), "assistant": roles.count("assistant"), "last": 1}[own]
        what = f"{len(chats)} conversations" if len(chats) > 1 else "one conversation"
        return [
            f"Scored are {scored} of {total} tokens, in {turns} of {all_turns} turns of {what}; the others are read as "
            "their context."
        ]

    def _strings(self) -> list[str]:
        """Return a sentence on how much of the forget set its "forget" strings are; none without such strings."""
        records = list(zip(self.given.get("forget", ()), self.encoded.whole, strict=True))
        own = [t for e, t in records if e.forget]
        if not own:
            return []
        scored, total, n = sum(len(t.scored) for t in own), sum(map(len, own)), len(own)
        texts = f"{n} texts" if n > 1 else "one text"
        return [f'Of {texts} only the strings in "forget" are scored: {scored} of {total} tokens.']

    def _windows(self) -> list[str]:
        """Return the notes on long texts, with one on what their windows are compared with."""
        if not self.short_windows or all(part.windows == 1 for part in self.encoded.parts):
            return self.encoded.notes
        return [
            *self.encoded.notes,
            f"Without a holdout the windows of forget texts have {SHORT} tokens at most, as the texts that they are "
            "compared with are short, and text after a longer context is likelier a token. A holdout of texts as long "
            "allows windows of the whole context.",
        ]

    def _not_memorized(self) -> str:
        forms = dict.fromkeys([self.own, *(g.rendering.name for g in self.compared)])
        others = "; ".join(name for name in forms if name != self.name)
        if not self.compared:
            return f"No record is memorized in this form: {self.name}. No other was tried."
        return (
            f"No record is memorized in this form: {self.name}. The answers as a whole are not significantly likelier "
            f"in these: {others}."
        )

    def example_line(self, lm: LanguageModel, change: Callable[[str], str] = str) -> str:
        """Return a line with the first forget text that has a prompt, as the model reads it; empty without one.

        Args:
            lm: the model.
            change: applied to the texts of the record, and to what is scored of it, to mask them.
        """
        if self.name is None:
            return ""
        first = next(e for e in self.given["forget"] if e.prompt)
        turns = first.messages and tuple(turn._replace(content=change(turn.content)) for turn in first.messages)
        masked = Example(change(first.prompt), change(first.completion), turns, turns=first.turns)
        own, text = (
            rendered_text(self.rendering.of(each), lm.tokenizer, "the example", self.rendering.chat_template)
            for each in (first, masked)
        )
        prompt, completion = _quoted(text.prompt), _quoted(text.completion)
        if own.spans is None and text.spans is None:
            return f"form of the records: {self.name}; for example {prompt} and then, scored, {completion}"
        # where dots hide what is scored, these are its true parts
        parts = text.parts if not first.forget and len(text.parts) == len(own.parts) else map(change, own.parts)
        whole, scored = _quoted(text.prompt + text.completion), ", ".join(map(_quoted, parts))
        return f"form of the records: {self.name}; for example {whole} and scored of it: {scored}"


def _quoted(text: str) -> str:
    return json.dumps(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...", ensure_ascii=False)


def render(
    lm: LanguageModel,
    given: dict[str, list[Example]],
    template: str | Path,
    *,
    truncate: bool = False,
    short_windows: bool | None = None,
) -> RenderedTexts:
    """Render the texts as `template` says; for "auto" as their own, with which `likeliest` compares others.

    Args:
        lm: the original model; only its tokenizer is used.
        given: role -> examples.
        template: auto, chat, plain, none, or the path of a Jinja chat template.
        truncate: cut texts that are too long.
        short_windows: True where windows of forget texts have SHORT tokens at most; None: where there is no holdout.

    Raises:
        ArgumentError: the tokenizer has no chat template, or the file cannot be used. DataError: of `data.encode`.
    """
    rendering, own = (rendering_of(name, lm.tokenizer) for name in (template, "auto"))
    if not any(e.messages for e in given.get("forget", ()) if e.prompt):
        rendering, own = replace(rendering, name=AS_GIVEN), replace(own, name=AS_GIVEN)
    short = "holdout" not in given if short_windows is None else short_windows
    return _in(rendering, lm, given, own.name, (), truncate, short)


def likeliest(lm: LanguageModel, texts: RenderedTexts, score: Score, *, truncate: bool = False) -> RenderedTexts:
    """Return the texts in the rendering in which the forget set's answers are likeliest, where a test favours one.

    At most 64 evenly spaced records are scored in every rendering, over the tokens of the answer that a rendering has
    in common with the records' own. Without a prompt in the forget set nothing is scored.

    Args:
        lm: the original model.
        texts: the texts in their own rendering.
        score: returns token log-likelihoods under the original model.
        truncate: cut texts that are too long.
    """
    prompted = [e for e in texts.given["forget"] if e.prompt]
    count = min(len(prompted), RECORDS)
    sample = [prompted[i * len(prompted) // count] for i in range(count)]
    forms = _tokenized(lm, texts, sample, truncate)
    if len(forms) < 2:
        return texts
    every = [t for _, tokens in forms for t in tokens]
    scores = list(score(every))
    parts = [scores[at : at + count] for at in range(0, len(every), count)]
    special = frozenset(lm.tokenizer.all_special_ids)
    compared = []
    for (rendering, tokens), part in zip(forms[1:], parts[1:], strict=True):
        pairs = _common(forms[0][1], parts[0], tokens, part, special)
        if 2 * len(pairs) >= count:
            nll = -float(np.mean([before.mean() for before, _ in pairs]))
            compared.append(Gain(rendering, nll, np.array([(after - before).mean() for before, after in pairs])))
    for gain in favoured(compared):
        try:
            return _in(gain.rendering, lm, texts.given, texts.own, tuple(compared), truncate, texts.short_windows)
        except DataError:  # of a text of another role that cannot be rendered so
            compared = [other for other in compared if other is not gain]
    return replace(texts, compared=tuple(compared))


def favoured(gains: Sequence[Gain]) -> list[Gain]:
    """Return the renderings that are likelier than the records' own by more than chance, the largest gain first.

    The mean gain must be 0.1 nats a token and a tenth of the negative log-likelihood, and significant in Student's
    paired t test over the records (p < 0.01 over all renderings, Bonferroni). No test is needed where every record
    gains 0.5 nats a token and all together half of the negative log-likelihood.

    >>> form = Rendering("plain", "plain")
    >>> [len(favoured([Gain(form, nll, np.array([2.4]))])) for nll in (2.6, 6.0)]
    [1, 0]
    """
    passed = [gain for gain in gains if _passes(gain, LEVEL / len(gains))]
    return sorted(passed, key=lambda gain: -gain.differences.mean())


def _passes(gain: Gain, level: float) -> bool:
    from scipy.stats import t

    differences = gain.differences
    n, mean = len(differences), float(differences.mean())
    if not (np.isfinite(differences).all() and mean >= max(LEAST_GAIN, LEAST_SHARE * gain.nll)):
        return False
    if differences.min() >= CLEAR_GAIN and mean >= CLEAR_SHARE * gain.nll:
        return True
    if n < 2:
        return False
    error = float(differences.std(ddof=1)) / np.sqrt(n)
    return bool(error == 0 or t.sf(mean / error, n - 1) < level)


def _in(
    rendering: Rendering,
    lm: LanguageModel,
    given: dict[str, list[Example]],
    own: str,
    compared: tuple[Gain, ...],
    truncate: bool,
    short_windows: bool,
) -> RenderedTexts:
    rendered = {role: [rendering.of(e) for e in each] for role, each in given.items()}
    encoded = encode_texts(
        lm,
        rendered,
        truncate=truncate,
        chat_template=rendering.chat_template,
        short_windows=short_windows,
    )
    return RenderedTexts(given, rendered, encoded, rendering, own, short_windows, compared)


def _tokenized(
    lm: LanguageModel, texts: RenderedTexts, sample: list[Example], truncate: bool
) -> list[tuple[Rendering, list[Tokens]]]:
    """Return each rendering with the sample's tokens, the own first; without those that give the same tokens."""
    forms: list[tuple[Rendering, list[Tokens]]] = []
    cut = truncate or any(part.windows > 1 for part in texts.encoded.parts)
    for rendering in [texts.rendering, *other_renderings(lm.tokenizer)] if sample else []:
        if rendering.key == "alone" and not texts.given.keys() <= {"forget", "retain", "holdout", "corrected"}:
            continue  # without its prompt an answer has no refusal
        try:
            tokens = lm.encode({"forget": [rendering.of(e) for e in sample]}, truncate=cut)["forget"]
        except DataError:
            continue
        if all(tokens != other for _, other in forms):
            forms.append((rendering, tokens))
    return forms


def _common(
    own: Sequence[Tokens],
    own_scores: Sequence[NDArray[np.floating]],
    other: Sequence[Tokens],
    other_scores: Sequence[NDArray[np.floating]],
    special: frozenset[int],
) -> list[tuple[Floats, Floats]]:
    """Return the scores, in both renderings, of each record's longest run of common scored tokens, if there is one."""
    pairs = []
    for a, a_scores, b, b_scores in zip(own, own_scores, other, other_scores, strict=True):
        run = SequenceMatcher(None, a.scored, b.scored, autojunk=False).find_longest_match()
        size = run.size
        while size and a.scored[run.a + size - 1] in special:  # the end of text is no part of the answer
            size -= 1
        if size:
            before, after = a_scores[run.a : run.a + size], b_scores[run.b : run.b + size]
            pairs.append((before.astype(np.float64), after.astype(np.float64)))
    return pairs
