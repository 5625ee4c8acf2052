"""What a run returns, and how it is written to disk."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pyunlearn.output import save_folder

VERDICTS = ("forgotten", "not memorized", "still exposed", "over-unlearned")


@dataclass(frozen=True)
class ExampleResult:
    """One forget example, before and after. Log-likelihoods are means over its scored tokens, in nats; exposures are bits, anchored."""

    index: int
    text: str
    tokens: int
    log_likelihood_before: float
    log_likelihood_after: float
    exposure_before: float
    exposure_after: float
    upper_exposure_after: float
    """The other side: how far below unseen text it lies. 4.32 bits and more is over-unlearned."""
    greedy_match_before: float
    """Share of its tokens that are the model's first choice."""
    greedy_match_after: float
    steps: int
    """Optimizer steps that ascended on it."""
    verdict: str

    @property
    def forgotten(self) -> bool:
        """Whether it was memorized and is now within what unseen text gets."""
        return self.verdict == "forgotten"


@dataclass(frozen=True)
class Utility:
    """What the run cost elsewhere: mean negative log-likelihood (nats a token) of text that had to keep working."""

    measured_on: str
    sequences: int
    nll_before: float
    nll_after: float
    relative_rise: float
    """(after - before) / max(before, 1 nat)."""
    interval: tuple[float, float]
    """95 % bootstrap interval of relative_rise over the sequences (paired, percentile)."""
    budget: float
    non_member_drift: float
    """Mean rise of the references' negative log-likelihood, nats a token: text of the same kind that became improbable."""


@dataclass
class Result:
    """The model without the forget set, and the evidence."""

    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    examples: list[ExampleResult]
    utility: Utility
    stopped: str
    """Why the run ended: forgotten, nothing memorized, max_steps, utility budget, over-unlearning, not finite or interrupted."""
    non_member_scores: list[float] = field(repr=False)
    """Mean negative log-likelihoods (nats a token) of the references under the original model: what exposures are measured against."""
    history: list[dict[str, Any]] = field(repr=False)
    settings: dict[str, Any] = field(repr=False)

    @property
    def forgotten(self) -> bool:
        """Whether nothing is left to forget: every example is forgotten or was never memorized."""
        return all(e.verdict in ("forgotten", "not memorized") for e in self.examples)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model, ready for JSON."""
        return {
            "forgotten": self.forgotten,
            "stopped": self.stopped,
            "utility": asdict(self.utility),
            "examples": [{**asdict(e), "forgotten": e.forgotten} for e in self.examples],
            "non_member_scores": self.non_member_scores,
            "settings": self.settings,
            "history": self.history,
        }

    def save(self, directory: str | Path) -> Path:
        """Writes the model (safetensors), the tokenizer and result.json into an empty or new directory; all of it or nothing.

        Raises OutputError when the directory holds something already or cannot be written.
        """
        return save_folder(directory, self.model, self.tokenizer, "result.json", self.to_dict())
