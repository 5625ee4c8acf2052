"""The result of an attack: which texts come back, and under what."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from pyunlearn.attacks.judge import BACK, EXPOSED, STAYS, UNTESTED
from pyunlearn.data.redaction import masked
from pyunlearn.output import plain_json
from pyunlearn.probes.long_texts import label_of
from pyunlearn.probes.non_members import NO_LIKELIER

_PASSED = {STAYS, NO_LIKELIER}


@dataclass(frozen=True)
class AttackedExample:
    """A text of the forget set, with what the attacks did to it."""

    index: int
    prompt: str
    text: str
    """The text to forget: what is scored of the record, without the prompt."""
    tokens: int
    verdict: str
    """stays forgotten, comes back, still exposed (without any attack), doubtful (only the set as a whole comes back),
    untested, or no likelier (in place of stays forgotten, where the non-members are self-sampled)."""
    attacks: tuple[str, ...]
    """The forms of attack under which it comes back, the strongest first."""
    strongest: str | None
    """The form under which it stands out most; None where it was not tested."""
    exposure: float | None
    """Bits under that form, among non-members under the same attack."""
    interval: tuple[float, float] | None
    """95 % interval of it, bits: the uncertainty from the choice of non-members."""
    combined_exposure: float | None
    """Bits over all attacks together: -log2 of the p-value that decides "comes back"."""
    exposures: dict[str, float | None]
    """Form of attack -> exposure, bits; None where it was not tested. The first is the model without an attack."""
    record: int | None = None
    """Index of the record among those that were given: of a text longer than the context each window is an example."""
    window: int = 1
    windows: int = 1

    @property
    def label(self) -> str:
        """Number of the record, from 1, with that of the window where there are several: "3 (2/7)"."""
        return label_of(self.index, self.record, self.window, self.windows)


@dataclass(frozen=True)
class TrialSummary:
    """One form of an attack, over the whole forget set."""

    name: str
    attack: str
    judged: bool
    """False where it does not count for the verdicts, because it brings back unseen text too: give a control."""
    tested: int
    """Forget texts that were tested."""
    returned: int
    """Texts with an exposure of 4.32 bits or more under it; of unseen texts, one in twenty has that."""
    set_pvalue: float | None
    """Chance that as many of a set of unseen texts stand out under it, adjusted for the number of attacks; None where
    it is not judged, and of fewer than five texts."""
    log_likelihood: float | None
    """Mean of the forget texts under the attack, nats a token; None where the model wrote."""
    non_member_log_likelihood: float | None
    """The same of the non-members."""
    control_log_likelihood: float | None
    """Mean of the forget texts under the control and the same attack, nats a token; None without a control."""
    details: dict[str, Any] = field(default_factory=dict)
    """What was done: steps, learning rate, format."""


@dataclass
class AttackResult:
    """Verdicts on the texts of a forget set after attacks on one model, and the numbers behind them."""

    examples: list[AttackedExample]
    trials: list[TrialSummary]
    """Every form of attack that was tried; the first is the model without an attack."""
    non_members: str
    """What the verdicts rest on: holdout, reference model (the control's texts), unseen texts or self-sampled."""
    non_member_count: int
    pvalue: float
    """That a set of unseen texts stands out as much under any of the attacks; half of the rate or less: it does."""
    false_discovery_rate: float
    """A model that never saw the texts fails at most this often."""
    seconds: float
    settings: dict[str, Any] = field(repr=False)
    notes: list[str] = field(default_factory=list)
    """Which attacks were left out and why, and what the evidence cannot show: one sentence each."""

    @property
    def verdicts(self) -> dict[str, int]:
        """Number of texts with each verdict, the most frequent first."""
        return dict(Counter(e.verdict for e in self.examples).most_common())

    @property
    def comes_back(self) -> bool:
        """True where the set as a whole stands out under the attacks."""
        return self.pvalue <= self.false_discovery_rate / 2

    @property
    def passed(self) -> bool:
        """True where no text is exposed, the set does not come back, and at least one text was tested."""
        return EXPOSED not in self.verdicts and not self.comes_back and bool(_PASSED & set(self.verdicts))

    @property
    def headline(self) -> str:
        """The verdict on the whole set, in one sentence."""
        counts, n = self.verdicts, len(self.examples)
        tried = sum(t.judged for t in self.trials[1:])
        attacks = f"{tried} forms of attack" if tried != 1 else "one form of attack"
        exposed, back = counts.get(EXPOSED, 0), counts.get(BACK, 0)
        parts = []
        if exposed:
            parts.append(f"{_of(exposed, n)} still exposed without any attack")
        if back:
            top = Counter(e.attacks[0] for e in self.examples if e.attacks).most_common(1)[0][0]
            parts.append(f"{_of(back, n)} back under attack, most often under {top}")
        if self.comes_back:
            parts.append(self._set())
        if parts:
            sentence = "; ".join(parts) + "."
            return sentence[0].upper() + sentence[1:]
        if not self.passed:
            return "Untested: no attack could be tried on these texts."
        untested = f"; {counts[UNTESTED]} were not tested" if UNTESTED in counts else ""
        if NO_LIKELIER in counts:
            return f"No text is likelier under {attacks} than what the model writes by itself{untested}."
        texts = "The text stays forgotten" if n == 1 else f"All {counts[STAYS]} tested texts stay forgotten"
        return f"{texts} under {attacks}{untested}."

    def _set(self) -> str:
        """Say under which attack the set stands out most, as a clause."""
        judged = [t for t in self.trials if t.set_pvalue is not None]
        if not judged:
            return f"under all attacks together the set stands out (p = {self.pvalue:.1g})"
        t = min(judged, key=lambda t: t.set_pvalue or 0.0)
        would = f"{t.tested / 20:.2g} unseen ones would (p = {self.pvalue:.1g} for the set)"
        return f"{t.returned} of {t.tested} texts stand out under {t.name}, where {would}"

    def to_dict(self, *, show_text: bool | None = None) -> dict[str, Any]:
        """Return all fields, ready for JSON; the texts are masked unless `show_text`; None: as the attack's option."""
        show_text = self.settings.get("show_text", False) if show_text is None else show_text
        content: dict[str, Any] = plain_json(self)
        if not show_text:
            for e in content["examples"]:
                e["prompt"], e["text"] = masked(e["prompt"]), masked(e["text"])
        return {"passed": self.passed, "headline": self.headline, "verdicts": self.verdicts, **content}


def _of(count: int, n: int) -> str:
    verb = "is" if count == 1 or n == 1 else "are"
    if n == 1:
        return f"The text {verb}"
    return f"All {n} texts {verb}" if count == n else f"{count} of {n} texts {verb}"
