"""What an audit returns: a verdict for each text, and the evidence."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from pyunlearn.auditing.redaction import masked
from pyunlearn.metrics import ExposureTest, Interval, PairedDifference, TruePositiveRate


@dataclass(frozen=True)
class Measures:
    """What one model shows of one text. Of its scored tokens: the completion where there is a prompt, else all but the first."""

    log_likelihood: float
    """Mean, nats a token; high = likely."""
    exposure: float
    """Bits, among references scored under this same model; high = stands out. 1.44 on average for unseen text."""
    exact_memorization: float
    """The share of its tokens that are the model's first choice, 0 to 1."""
    extraction_strength: float
    """The share of it that the model writes, token for token, once it is given the rest, 0 to 1."""
    membership: dict[str, float]
    """Membership scores by name; low = more like a text that was trained on. Empty where they were left out."""
    answer_prior: float | None
    """Nats a token by which the prompt helps: NLL without it minus NLL with it. Near 0: a guess would do. None without a prompt."""
    continuation: str | None
    """What the model writes, greedily, in the place of the text; None where decoding was left out."""
    longest_run: int | None
    """Tokens in a row that this continuation shares with the text."""
    rouge_l: float | None
    """ROUGE-L recall of the continuation, 0 to 1; None without it, or without the package rouge-score, or without Latin letters."""


@dataclass(frozen=True)
class AuditedExample:
    """One text of the forget set."""

    index: int
    prompt: str
    text: str
    """What is to be forgotten, without the prompt."""
    opening: str
    """What the model was given before its continuation: the prompt, or the first part of a text that has none."""
    truth: str
    """What follows there in truth: what the continuation is compared with."""
    tokens: int
    verdict: str
    """not memorized, still exposed, forgotten or over-unlearned."""
    exposure: float
    """The exposure that the verdict goes by, bits: anchored where the original model was given."""
    interval: tuple[float, float]
    """95 % interval, bits, of the exposure that decided: that before for "not memorized", the upper one for "over-unlearned", else `exposure`. It is what
    the choice of references leaves open; infinite above where no reference is as likely."""
    certain: bool
    """The interval lies wholly on the verdict's side of the threshold."""
    upper_exposure: float
    """The other side, bits: 4.32 and more lies below what 95 % of unseen text gets."""
    exposure_before: float | None
    """Under the original model; None where none was given."""
    now: Measures
    before: Measures | None


@dataclass(frozen=True)
class Membership:
    """How well one score tells the forget set from the holdout."""

    score: str
    auc: Interval
    """0.5: not at all. 1: each forget text looks more trained-on than each of the holdout."""
    tpr_at_1_percent: TruePositiveRate
    """Share of the forget set that is found when at most 1 % of the holdout is accused with it."""
    tpr_at_0_1_percent: TruePositiveRate
    """The same at 0.1 %; `resolved` from 1000 holdout texts on."""
    roc: list[tuple[float, float]] = field(repr=False)
    """(false, true) positive rates, from (0, 0) to (1, 1)."""
    auc_before: Interval | None
    privleak: Interval | None
    """Per cent, 0: as the retrained model. Below: still leaks. Above: over-unlearned. None without a retrained reference model."""


@dataclass(frozen=True)
class Kept:
    """How the model does on text that has to keep working."""

    texts: int
    nll: Interval
    """Mean negative log-likelihood, nats a token; low = well."""
    nll_before: Interval | None
    change: PairedDifference | None


@dataclass(frozen=True)
class Writing:
    """How varied a model's continuations of the forget set are, as means with intervals over the texts: a collapsed model repeats itself."""

    distinct_2: Interval
    """Share of neighbouring token pairs that are different ones, 0 to 1; low = repetitive."""
    repetition: Interval
    """Share of four-token runs that stood in the continuation before, 0 to 1; high = repetitive."""
    collapsed: Interval
    """Share of the continuations that mostly repeat themselves, 0 to 1; Clopper-Pearson, which has a width at 0 and 1 too."""


@dataclass(frozen=True)
class References:
    """The yardstick: text that was certainly never trained on."""

    source: str
    """the holdout, sampled from the model, or sampled from the original model."""
    anchored: bool
    """Whether they were scored under the original model, as well as under this one."""
    scores: list[float] = field(repr=False)
    """Mean negative log-likelihoods, nats a token, under the model that the verdicts go by."""
    drift: Interval | None
    """Mean rise of their negative log-likelihood from the original model to this one, nats a token."""


@dataclass
class Audit:
    """What a model remembers of the forget set, and the evidence."""

    examples: list[AuditedExample]
    non_members: References
    null_test: ExposureTest
    """Whether the exposures, all together, could be those of unseen texts: a small p-value says no."""
    membership: list[Membership]
    """One for each score; empty without a holdout, for sampled text is no fair comparison."""
    change: PairedDifference | None
    """Of the forget set's mean log-likelihood, nats a token, from the original model to this one."""
    answer_prior: Interval | None
    """Mean nats a token by which the prompts help; None without prompts. Near 0: the answers can be guessed."""
    utility: Kept | None
    """On the retain set."""
    writing: Writing | None
    """None where decoding was left out."""
    writing_before: Writing | None
    passes: dict[str, int]
    """Texts that each model was asked about, token by token."""
    seconds: float
    settings: dict[str, Any] = field(repr=False)

    @property
    def verdicts(self) -> dict[str, int]:
        """How many texts got each verdict, the most first."""
        return dict(Counter(e.verdict for e in self.examples).most_common())

    @property
    def collapsed(self) -> bool:
        """Whether most continuations repeat themselves, and more than twice as many as under the original model; greedy writing loops in healthy models too."""
        now, before = self.writing, self.writing_before
        if now is None or before is None:
            return False
        return now.collapsed.estimate > max(0.5, 2 * before.collapsed.estimate)

    @property
    def passed(self) -> bool:
        """Whether no text is still exposed or over-unlearned."""
        return all(e.verdict in ("forgotten", "not memorized") for e in self.examples)

    def to_dict(self, *, show_text: bool = False) -> dict[str, Any]:
        """Everything, ready for JSON. The texts, and what the model wrote in their place, are masked unless `show_text`."""
        found = _plain(self)
        if not show_text:
            for e in found["examples"]:
                for name in ("prompt", "text", "opening", "truth"):
                    e[name] = masked(e[name])
                for side in (e["now"], e["before"]):
                    if side is not None and side["continuation"] is not None:
                        side["continuation"] = masked(side["continuation"])
        return {"passed": self.passed, "verdicts": self.verdicts, **found}


def _plain(value: Any) -> Any:
    """Dataclasses and named tuples as dicts, and what JSON cannot say (infinity, NaN) as None."""
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if hasattr(value, "_asdict"):
        return {name: _plain(part) for name, part in value._asdict().items()}
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
