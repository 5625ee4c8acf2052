"""Result of a run: the model, a verdict for each example, the cost in utility, and how they are saved."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from pyunlearn.attacks.result import AttackResult
from pyunlearn.data.lazy import LazyList
from pyunlearn.data.redaction import masked
from pyunlearn.errors import ArgumentError
from pyunlearn.models.gguf_writing import GgufReport
from pyunlearn.models.hub import is_repository_name, upload
from pyunlearn.options import Flag, Text, require
from pyunlearn.output import plain_json, save_folder, save_gguf
from pyunlearn.probes.long_texts import document_verdict, label_of
from pyunlearn.unlearning.card import model_card
from pyunlearn.unlearning.run_folder import RESULT

VERDICTS = ("forgotten", "no likelier", "not memorized", "still exposed", "over-unlearned")
"""Verdicts on a text; "no likelier" stands for "forgotten" where the non-members were sampled from the model."""
PASSED = ("forgotten", "no likelier", "not memorized")
"""The verdicts with which nothing is left to do."""

_NAMED = 5  # records that were read in windows, in notes


@dataclass(frozen=True, slots=True)
class ExampleResult:
    """One forget example before and after the run.

    Log-likelihoods are means over its scored tokens, nats. Exposures are anchored, bits.
    """

    index: int
    text: str
    tokens: int
    log_likelihood_before: float
    log_likelihood_after: float
    exposure_before: float
    exposure_after: float
    upper_exposure_after: float
    """Exposure of the opposite side, for texts less likely than the non-members; over-unlearned from 4.32 bits on."""
    greedy_match_before: float
    """Share of its tokens that are the model's first choice, 0 to 1."""
    greedy_match_after: float
    extraction_after: float
    """Exposure of that share among the non-members', bits, as `exposure_after`."""
    recited_after: bool | None
    """True where the model continues the text's beginning, greedily, with its rest; None where that was not tried: of
    texts that are not memorized, or are still exposed all the same."""
    steps: int
    """Accepted optimizer steps that included it."""
    verdict: str
    """One of VERDICTS."""
    interval: tuple[float, float]
    """95 % interval, bits, of the exposure that decided: before for "not memorized", the upper one for
    "over-unlearned", else after. It shows the uncertainty from the choice of non-members."""
    certain: bool
    """True where that interval lies wholly on the verdict's side of the threshold."""
    record: int | None = None
    """Index of the record among those that were given: of a text longer than the context each window is an example."""
    window: int = 1
    """Number of the window, from 1."""
    windows: int = 1
    """Number of windows in which the record was read."""
    form: str = ""
    """With scope="person", the name of a text in other words: question, statement, turned, cloze, or "paraphrase 1";
    empty for the text as it is."""

    @property
    def label(self) -> str:
        """Number of the record, from 1, with its window where there are several, and its form: "3 (2/7) statement"."""
        return label_of(self.index, self.record, self.window, self.windows, self.form)

    @property
    def forgotten(self) -> bool:
        """True where it was memorized and its exposure is now that of non-members."""
        return self.verdict == "forgotten"


@dataclass(frozen=True)
class Document:
    """Verdict on a record of which several examples are: windows, where it was longer than the context, and forms."""

    record: int
    """Index of the record."""
    windows: int
    verdict: str
    """The first of these that an example of it has: still exposed, over-unlearned, undecided, no likelier, forgotten,
    not memorized. So it is forgotten only where every memorized window and form is."""
    verdicts: dict[str, int]
    """Verdict -> number of its examples."""
    forms: int = 0
    """Number of its examples that are other forms of it (scope="person")."""


def documents_of(examples: Sequence[Any]) -> list[Document]:
    """Return the verdicts on the records of which several examples are."""
    documents = []
    for record, parts in groupby(examples, key=lambda e: e.record):  # the parts of a record are neighbours
        own = [*parts]
        if record is not None and (len(own) > 1 or own[0].windows > 1):
            verdicts, forms = [e.verdict for e in own], sum(bool(getattr(e, "form", "")) for e in own)
            counts = dict(Counter(verdicts).most_common())
            documents.append(Document(record, own[0].windows, document_verdict(verdicts), counts, forms))
    return documents


def document_notes(documents: Sequence[Document]) -> list[str]:
    """Return a sentence with the verdict on each of five records in windows, or one on all records in other forms."""
    if any(d.forms for d in documents):
        return [_forms_note(documents)]
    notes = [
        f"Text {d.record + 1} as a whole: {d.verdict}, as {d.verdicts[d.verdict]} of its {d.windows} windows."
        for d in documents[:_NAMED]
    ]
    if len(documents) > _NAMED:
        notes.append(f"{len(documents) - _NAMED} more texts were read in windows: the JSON file has the verdicts.")
    return notes


def _forms_note(documents: Sequence[Document]) -> str:
    """Say how many records have which verdict, over all their forms, and which are not forgotten in some."""
    counts = Counter(d.verdict for d in documents)
    verdicts = ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common())
    left = [str(d.record + 1) for d in documents if d.verdict in ("still exposed", "over-unlearned")]
    named = ", ".join(left[:_NAMED]) + (f" and {len(left) - _NAMED} more" if len(left) > _NAMED else "")
    forms, records = sum(d.forms for d in documents), f"{len(documents)} record{'s' if len(documents) > 1 else ''}"
    return (
        f"With {forms} other forms of {records}, the verdicts on the records as a whole: {verdicts}"
        f"{f' (not passed: {named})' if left else ''}."
    )


@dataclass(frozen=True)
class Utility:
    """Cost of the run: mean negative log-likelihood per token, nats, of the utility set before and after."""

    measured_on: str
    sequences: int
    nll_before: float
    nll_after: float
    relative_rise: float
    """(after - before) / max(before, 1 nat); of a retain set that the model knows by heart, relative to the mean that
    the forget texts would have if they were unseen."""
    interval: tuple[float, float] | None
    """95 % interval of relative_rise over the sequences: Student's t of the paired changes; None for one sequence."""
    budget: float
    """Allowed relative rise, at the upper end of the interval; of one sequence the rise itself."""
    non_member_drift: float
    """Mean rise of the non-members' negative log-likelihood, nats per token."""
    holdout_rise: float | None = None
    """Relative rise of the holdout, over evenly spaced texts of it; None where the holdout has no budget of its own."""
    holdout_interval: tuple[float, float] | None = None
    """95 % interval of holdout_rise, as `interval`."""
    holdout_budget: float | None = None
    """Allowed relative rise of the holdout, at the upper end of the interval."""


@dataclass
class Result:
    """Result of `pyunlearn.unlearn`: the model without the forget set, and the evidence."""

    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    examples: Sequence[ExampleResult]
    utility: Utility
    stopped: str
    """Reason why the run ended.

    One of forgotten, no likelier, nothing memorized, still extracted (the likelihoods are those of non-members, and a
    text's tokens are still first choices), max_steps, utility budget, holdout budget, not finite, interrupted, undone
    by the merge (of an adapter into weights of too few digits).
    """
    non_member_scores: list[float] = field(repr=False)
    """Of the non-members under the original model: mean negative log-likelihoods, nats per token; less those of the
    reference model if there is one, or less what is expected of unseen text if there is no holdout."""
    history: list[dict[str, Any]] = field(repr=False)
    settings: dict[str, Any] = field(repr=False)
    notes: list[str] = field(default_factory=list)
    """What was left out of the texts, how the holdout differs from the forget set, what evidence and utility set cannot
    show, and why a budget ended the run: one sentence each."""
    evidence: str = "holdout"
    """What the verdicts rest on: holdout, reference model, unseen texts (written for this package) or self-sampled."""
    rendering: str | None = None
    """Form in which the model read the records; None where no forget text has a prompt."""
    attack: AttackResult | None = None
    """Verdicts after the attacks on the result, where the run was to try some (`attacks`)."""

    @property
    def documents(self) -> list[Document]:
        """Verdicts on the records that were read in several windows, or in other forms too."""
        return documents_of(self.examples)

    @property
    def forgotten(self) -> bool:
        """True where at least one example was memorized, and all of those are forgotten."""
        return self.passed and any(e.forgotten for e in self.examples)

    @property
    def passed(self) -> bool:
        """True where no example is still exposed or over-unlearned: forgotten, or nothing was memorized.

        And where none comes back under attack, if attacks were tried.
        """
        return all(e.verdict in PASSED for e in self.examples) and (self.attack is None or self.attack.passed)

    def to_dict(self, *, show_text: bool | None = None) -> dict[str, Any]:
        """Return all but the model and the tokenizer, ready for JSON; the texts are masked unless `show_text`.

        None: as the run's own option says.
        """
        content = self._content(show_text)
        return content | {"examples": content["examples"][:]}

    def _content(self, show_text: bool | None) -> dict[str, Any]:
        """Return what `to_dict` does, with the examples as a LazyList."""
        shows = self.settings.get("show_text", False) if show_text is None else show_text

        def example(i: int) -> dict[str, Any]:
            e = self.examples[i]
            content = {**plain_json(e), "forgotten": e.forgotten}
            return content if shows else content | {"text": masked(e.text)}

        return {
            "forgotten": self.forgotten,
            "passed": self.passed,
            "evidence": self.evidence,
            "rendering": self.rendering,
            "stopped": self.stopped,
            "notes": self.notes,
            "utility": asdict(self.utility),
            "examples": LazyList(len(self.examples), example),
            "documents": [asdict(d) for d in self.documents],
            "non_member_scores": self.non_member_scores,
            "attack": None if self.attack is None else self.attack.to_dict(show_text=shows),
            "settings": self.settings,
            "history": self.history,
        }

    def save(self, directory: str | Path, *, show_text: bool | None = None) -> Path:
        """Write the model (safetensors), tokenizer, model card and result.json into a new or empty directory.

        All of it or nothing. The folder holds nothing of the forget texts, so that it can be uploaded as it is, unless
        `show_text`.

        Args:
            directory: the path.
            show_text: write the forget texts to result.json, which masks them otherwise; None: as the run's own option
                says.

        Returns:
            The path.

        Raises:
            OutputError: the directory is not empty or cannot be written.
        """
        return write_result(self, directory, show_text=show_text)

    def save_gguf(self, path: str | Path, *, like: str | Path | None = None, at_least: str | None = None) -> GgufReport:
        """Write the model as a GGUF file with the metadata, the tokenizer and the tensor formats of another.

        No tokenizer is converted. The file is read back before it gets its name: each tensor is the weights within its
        format's rounding. K-quants become the next larger format that can be written. Rounding can bring a text back:
        run with `gguf_like`, whose numbers are those of rounded weights, or audit the file.

        Args:
            path: of the new file, which ends in .gguf.
            like: a GGUF file of the model as it was before the run; None: that of the run (gguf_like), or the file that
                the model was loaded from.
            at_least: one of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, F16, BF16, F32, for tensors that have a smaller format there;
                None: that of the run (gguf_at_least), where `like` is the file of the run.

        Returns:
            What was written: `.formats`, `.replaced`, `.rounding`, `.different`, `.sentences()`.

        Raises:
            ModelError: `like` is of another model, or of another architecture than llama (Llama, Mistral), qwen2 and
                qwen3.
            ArgumentError: the model has an adapter that is not merged, `like` is missing, or no such format.
            OutputError: there is a file already, or it cannot be written.
            DependencyError: without the package gguf.
        """
        own = self.settings.get("gguf_like")
        if own is not None and (like is None or Path(like).resolve() == Path(own).resolve()):
            like, at_least = own, at_least or self.settings["gguf_at_least"]
        return save_gguf(path, self.model, self.tokenizer, like=like, at_least=at_least)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        replace: bool = False,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Unlearned with pyunlearn",
    ) -> str:
        """Upload the model, the tokenizer and a model card with the verdict to the Hugging Face hub.

        Nothing of the forget texts leaves this machine: the model card has the numbers of texts, tokens and verdicts,
        mean exposures, the utility and the notes, and result.json is not uploaded. Of a sharded model, `save` and
        upload.

        Args:
            repo_id: NAME or ORGANIZATION/NAME of a new repository.
            private: whether it is private; None: as the account's settings say.
            replace: True replaces all files of a repository that is there already; its history, other branches and tags
                can still hold the model with the texts, and a warning says so.
            token: of the account; None: that of `hf auth login`.
            revision: the branch; None: main.
            commit_message: subject of the commit.

        Returns:
            The address of the commit.

        Raises:
            ArgumentError: no name of a repository.
            OutputError: the hub refuses, or cannot be reached; the repository is there already, or is public and should
                not be.
        """
        require(Text('a name such as "organization/my-model"'), repo_id=repo_id)
        if not is_repository_name(repo_id):
            raise ArgumentError(
                f"repo_id must be the name of a repository, such as organization/my-model, got {repo_id!r}: use "
                "letters, digits, -, _ and . in it"
            )
        require(Flag(), replace=replace, **({} if private is None else {"private": private}))
        with tempfile.TemporaryDirectory() as place:
            folder = write_result(self, Path(place) / "model", show_text=False)
            (folder / RESULT).unlink()
            options: dict[str, Any] = {"private": private, "replace": replace, "token": token, "revision": revision}
            return upload(folder, repo_id, commit_message=commit_message, **options)


def write_result(
    result: Result, directory: str | Path, *, show_text: bool | None = None, replace: bool = False
) -> Path:
    """Write a result as `Result.save` does; `replace`: also in place of an earlier one."""
    content = result._content(show_text)
    card = model_card(result.model, content)
    return save_folder(directory, result.model, result.tokenizer, RESULT, content, card=card, replace=replace)
