"""The result of an audit: a verdict for each text, and the numbers behind it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from pyunlearn.attacks.result import AttackResult
from pyunlearn.data.redaction import masked
from pyunlearn.metrics import ExposureTest, Interval, PairedDifference, TopTest, TruePositiveRate
from pyunlearn.output import plain_json
from pyunlearn.probes.long_texts import label_of
from pyunlearn.probes.tasks import TaskScore
from pyunlearn.unlearning.config import UnlearnConfig
from pyunlearn.unlearning.result import PASSED, Document, documents_of

UNDECIDED = "undecided"


@dataclass(frozen=True)
class Measures:
    """Numbers of one text under one model, over its scored tokens: the completion, or all but a plain text's first."""

    log_likelihood: float
    """Mean, nats a token; high = likely."""
    exposure: float
    """Bits, among non-members scored under this same model; high = stands out. 1.44 on average for unseen text."""
    exact_memorization: float
    """The share of its tokens that are the model's first choice, 0 to 1."""
    extraction_strength: float
    """The share of it that the model writes, token for token, after the rest, 0 to 1."""
    membership: dict[str, float]
    """Membership scores by name; low = more like a text that was trained on. Empty where they were left out."""
    answer_prior: float | None
    """Nats a token by which the prompt helps: NLL without it minus NLL with it. Near 0: the answer can be guessed
    without the prompt. None for a text without a prompt."""
    continuation: str | None
    """The model's greedy continuation of the opening; None where it was not decoded."""
    longest_run: int | None
    """Tokens in a row that this continuation shares with the text."""
    rouge_l: float | None
    """ROUGE-L recall of the continuation, 0 to 1; None without it, without rouge-score, or without Latin letters."""


@dataclass(frozen=True)
class AuditedExample:
    """A text of the forget set, with all that the audit measured on it."""

    index: int
    prompt: str
    text: str
    """The text to forget: what is scored of the record, without the prompt."""
    opening: str
    """The model's input before its continuation: the prompt, or the first part of a text that has none."""
    truth: str
    """The true text after the opening: the continuation is compared with it."""
    tokens: int
    verdict: str
    """not memorized, still exposed, undecided (was memorized; stands out no more, and is no clear case of unseen text),
    forgotten, over-unlearned, or no likelier (in place of forgotten, where the non-members are self-sampled)."""
    exposure: float
    """The exposure that decides the verdict, bits: anchored if there is an original model."""
    interval: tuple[float, float]
    """95 % interval, bits, of the exposure that decided: that before for "not memorized", the upper one for
    "over-unlearned", else `exposure`. It shows the uncertainty from the choice of non-members; infinite above where no
    non-member is as likely."""
    certain: bool
    """The interval lies wholly on the verdict's side of the threshold; of "still exposed", on that of memorized."""
    upper_exposure: float
    """Exposure on the unlikely side, bits: 4.32 or more lies below 95 % of unseen text."""
    exposure_before: float | None
    """Exposure under the original model, bits; None without one."""
    now: Measures
    before: Measures | None
    record: int | None = None
    """Index of the record among those that were given: of a text longer than the context each window is an example."""
    window: int = 1
    """Number of the window, from 1."""
    windows: int = 1
    """Number of windows in which the record was read."""
    form: str = ""
    """With scope="person", the name of a text in other words: question, statement, turned, cloze, or "paraphrase 1";
    empty for the text as it is."""
    memorized: bool = False
    """True where it stood out, over the whole set, under the original model, or without one under the model. One that
    is still exposed and was not memorized is newly known, see `metrics.left.newly_known`."""

    @property
    def label(self) -> str:
        """Number of the record, from 1, with its window where there are several, and its form: "3 (2/7) statement"."""
        return label_of(self.index, self.record, self.window, self.windows, self.form)


@dataclass(frozen=True)
class Membership:
    """Membership attack by one score: how well it tells the forget set from the holdout."""

    score: str
    auc: Interval
    """0.5: not at all. 1: each forget text looks more trained-on than each of the holdout."""
    tpr_at_1_percent: TruePositiveRate
    """Share of the forget set that is detected at a false positive rate of 1 % on the holdout."""
    tpr_at_0_1_percent: TruePositiveRate
    """The same at 0.1 %; `resolved` from 1000 holdout texts on."""
    roc: list[tuple[float, float]] = field(repr=False)
    """(false, true) positive rates, from (0, 0) to (1, 1)."""
    auc_before: Interval | None
    privleak: Interval | None
    """Per cent, 0: as the retrained model. Below: leaks. Above: over-unlearned. None without a reference model, and
    where each forget text looks more trained-on to it than the whole holdout, as one text of 20 does by chance."""


@dataclass(frozen=True)
class RetainUtility:
    """Likelihood of the retain set, under the model and under the original."""

    texts: int
    nll: Interval
    """Mean negative log-likelihood, nats a token; low = good."""
    nll_before: Interval | None
    change: PairedDifference | None


@dataclass(frozen=True)
class Writing:
    """Variety of a model's continuations of the forget set, means with intervals: a collapsed model repeats itself."""

    distinct_2: Interval
    """Share of neighbouring token pairs that are different ones, 0 to 1; low = repetitive."""
    repetition: Interval
    """Share of four-token runs that stood in the continuation before, 0 to 1; high = repetitive."""
    collapsed: Interval
    """Share of the continuations that mostly repeat themselves, 0 to 1; Clopper-Pearson, with a width at 0 and 1."""


@dataclass(frozen=True)
class NonMembers:
    """Texts that were not trained on, which exposures are measured against."""

    source: str
    """What the verdicts rest on: holdout, reference model, unseen texts (written for this package) or self-sampled."""
    anchored: bool
    """True where they were scored under the original model, in addition to this one."""
    scores: list[float] = field(repr=False)
    """Mean negative log-likelihoods, nats a token, under the model that decides the verdicts; less those of the
    reference model if there is one, or less what is expected of unseen text if there is no holdout."""
    drift: Interval | None
    """Mean rise of their negative log-likelihood from the original model to this one, nats a token."""


@dataclass
class Audit:
    """Verdicts on the texts of a forget set under one model, and the numbers behind them."""

    examples: list[AuditedExample]
    """One for each text; with scope="person" also one for each other form of it. Numbers of the set, below, are those
    of the texts as they are."""
    non_members: NonMembers
    top_test: TopTest
    """Test that no more texts stand out than would of unseen ones: a small p-value rejects it."""
    null_test: ExposureTest
    """Test that the exposures, all together, follow the law of unseen texts: a small p-value rejects it."""
    left_pvalue: float | None
    """Chance that as many unseen texts would lie as high as the memorized ones do now, all together: see
    `metrics.left`. None where nothing was memorized, and without an original model."""
    forms_left_pvalue: float | None
    """The same of their other forms (scope="person"), over all of these. None where there are none, too."""
    membership: list[Membership]
    """One for each score; empty without a holdout, for sampled text is no fair comparison."""
    change: PairedDifference | None
    """Change of the forget set's mean log-likelihood, nats a token, from the original model to this one."""
    answer_prior: Interval | None
    """Mean nats a token by which the prompts help; None without prompts. Near 0: the answers can be guessed."""
    utility: RetainUtility | None
    """None without a retain set."""
    writing: Writing | None
    """None where decoding was left out."""
    writing_before: Writing | None
    passes: dict[str, int]
    """Number of texts that each model scored, token by token."""
    seconds: float
    settings: dict[str, Any] = field(repr=False)
    notes: list[str] = field(default_factory=list)
    """What was left out of the texts, how they are rendered, and how the holdout differs from the forget set: one
    sentence each."""
    rendering: str | None = None
    """Form in which the model read the records; None where no forget text has a prompt."""
    attack: AttackResult | None = None
    """Verdicts after attacks on the model, where some were tried (`attacks`)."""
    tasks: list[TaskScore] = field(default_factory=list)
    """Numbers of the tasks of lm-evaluation-harness that were run (`tasks`), and their change from the original model;
    `passed` does not depend on them."""

    @property
    def verdicts(self) -> dict[str, int]:
        """Number of texts with each verdict, the most frequent first."""
        return dict(Counter(e.verdict for e in self.examples).most_common())

    @property
    def documents(self) -> list[Document]:
        """Verdicts on the records that were read in several windows, or in other forms too."""
        return documents_of(self.examples)

    @property
    def collapsed(self) -> bool:
        """True where most continuations repeat themselves, and more than twice as many as under the original model.

        Greedy decoding loops in healthy models too, so without an original model it is False.
        """
        now, before = self.writing, self.writing_before
        if now is None or before is None:
            return False
        return now.collapsed.estimate > max(0.5, 2 * before.collapsed.estimate)

    @property
    def utility_lost(self) -> bool:
        """True where the retain set has lost more than the budget of `unlearn`, by the low end of the interval."""
        if self.utility is None or self.utility.change is None or self.utility.nll_before is None:
            return False
        allowed = UnlearnConfig.utility_budget * max(self.utility.nll_before.estimate, 1.0)
        return self.utility.change.low > allowed

    @property
    def exposed_together(self) -> bool:
        """True where texts are undecided, and the memorized ones all together lie too high for unseen text, at 5 %.

        Their other forms are tested for themselves.
        """
        return (pvalue := self.undecided_pvalue) is not None and pvalue <= 0.05

    @property
    def undecided_pvalue(self) -> float | None:
        """The smaller one of `left_pvalue`, if texts are undecided, and `forms_left_pvalue`, if other forms are."""
        undecided = {bool(e.form) for e in self.examples if e.verdict == UNDECIDED}
        pvalues = {False: self.left_pvalue, True: self.forms_left_pvalue}
        return min((p for is_form in undecided if (p := pvalues[is_form]) is not None), default=None)

    @property
    def passed(self) -> bool:
        """True where no text is still exposed or over-unlearned, nor the undecided ones together, and none comes back.

        Texts can come back only where attacks were tried.
        """
        each = all(e.verdict in (*PASSED, UNDECIDED) for e in self.examples)
        return each and not self.exposed_together and (self.attack is None or self.attack.passed)

    def to_dict(self, *, show_text: bool | None = None) -> dict[str, Any]:
        """Return all fields, ready for JSON; the texts and the continuations are masked unless `show_text`.

        None: as the audit's own option says.
        """
        show_text = self.settings.get("show_text", False) if show_text is None else show_text
        content: dict[str, Any] = plain_json(self)
        documents = [asdict(d) for d in self.documents]
        content["attack"] = None if self.attack is None else self.attack.to_dict(show_text=show_text)
        if not show_text:
            for e in content["examples"]:
                for name in ("prompt", "text", "opening", "truth"):
                    e[name] = masked(e[name])
                for side in (e["now"], e["before"]):
                    if side is not None and side["continuation"] is not None:
                        side["continuation"] = masked(side["continuation"])
        return {"passed": self.passed, "verdicts": self.verdicts, "documents": documents, **content}
