"""The result of a comparison: one row for each method, saved as JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyunlearn.errors import OutputError
from pyunlearn.metrics import Interval
from pyunlearn.output import check_output, plain_json, require_writable, write_bytes, write_json
from pyunlearn.probes.tasks import TaskScore
from pyunlearn.unlearning.result import VERDICTS

_FORMAT = "pyunlearn comparison"
_INTERVALS = ("forget_nll", "exposure", "extraction_strength", "utility_nll")


@dataclass(frozen=True)
class Measurement:
    """Forgetting and utility of one model: means with 95 % intervals over the texts."""

    forget_nll: Interval
    """Negative log-likelihood of the forget texts, nats per token; high = unlikely."""
    exposure: Interval
    """Exposure of the forget texts, bits, anchored: the non-members' scores are those of the original, or the present
    ones where unlearning made them likelier (`pyunlearn.metrics.verdict`). 1.44 for non-members, low where texts are
    less likely than those. The non-members are drawn in its interval too."""
    exposures: list[float]
    """(n,) the exposure of each forget text, bits."""
    verdicts: dict[str, int]
    """Verdict -> number of forget texts with it: see `pyunlearn.metrics.verdict`."""
    extraction_strength: Interval
    """Extraction strength of the forget texts, 0 to 1; high = recited."""
    utility_nll: Interval
    """Negative log-likelihood of the utility texts, nats per token; low = retained."""
    utility: float
    """The metric that is made equal, the mean over the utility texts; high = retained."""
    non_members_nll: float
    """Mean negative log-likelihood of the non-members, nats per token."""
    tasks: list[TaskScore] = field(default_factory=list)
    """Numbers of the tasks of lm-evaluation-harness, of the original and of what is compared; `change` is from the
    original, over the same documents."""

    def share(self, verdict: str) -> float:
        """Return the share of the forget texts with this verdict, 0 to 1."""
        return self.verdicts[verdict] / sum(self.verdicts.values())


@dataclass(frozen=True)
class Row:
    """One method of a comparison."""

    method: str
    status: str
    """done; refused: it needs an input that is missing; failed: it raised an error. `reason` says more."""
    reason: str | None = None
    calibrated: Measurement | None = None
    """The mixture with the original that retains tau of the utility: the one to compare."""
    uncalibrated: Measurement | None = None
    """The model as the method left it."""
    weight: float | None = None
    """The unlearned model's share in the mixture; 1: the method itself retains the utility."""
    monotone: bool | None = None
    """True where the utility fell steadily with the weight; where it did not, a larger weight may retain it too."""
    equalized: bool | None = None
    """True where the utility is tau, or above it by less than 0.01 of the original's. False where mixing cannot bring
    it there: the method itself ended above it (weight 1), or a small part of its result already falls below (0)."""
    steps: int | None = None
    """Optimizer steps, including those that were rolled back."""
    stopped: str | None = None
    """The reason why the run ended: see `Result.stopped`."""
    seconds: float | None = None
    """Duration of the method's run with its own scoring; without calibration and measuring."""
    peak_memory: int | None = None
    """Peak bytes of the run: of the GPU, or on the CPU of the whole process; None where the system does not say."""
    versions: dict[str, str] | None = None
    """Versions of pyunlearn and torch with which the row was made."""
    method_options: dict[str, Any] = field(default_factory=dict)
    """The method's own options: those of methods that were compared in an earlier call are nowhere else."""

    @property
    def done(self) -> bool:
        """True where there is something to compare."""
        return self.status == "done"


@dataclass
class Comparison:
    """Methods at equal utility, as far as mixing can make it equal."""

    rows: list[Row]
    original: Measurement
    utility_text: str
    """The text on which utility is measured: retain set, holdout, unseen texts, or sampled text."""
    non_members: int
    """Number of non-members behind the exposures, which reach log2(non_members + 1) bits at most."""
    evidence: str
    """What the verdicts rest on, one of `pyunlearn.probes.non_members.GRADES`; where that is "self-sampled", text that
    the model wrote, a forget text is "no likelier" at best."""
    scores: dict[str, list[float]] = field(repr=False)
    """Role -> (n,) negative log-likelihoods, nats per token, under the original; "reference_model": of forget texts and
    non-members under that. A resumed comparison must agree."""
    settings: dict[str, Any] = field(repr=False)
    """As they were given, with the versions of the last call: each row has its own."""
    notes: list[str] = field(default_factory=list)
    """What was left out of the texts, how the holdout differs from the forget set, what the non-members cannot show:
    one sentence each."""

    @property
    def complete(self) -> bool:
        """True where every method could be measured."""
        return all(row.done for row in self.rows)

    @property
    def equalized(self) -> bool:
        """True where no mixture is known to be at another utility than tau."""
        return all(row.equalized is not False for row in self.rows)

    def utility_share(self, measurement: Measurement) -> float:
        """Return the utility as a share of the original's: tau or more once calibrated."""
        return measurement.utility / self.original.utility

    def unseen_share(self, measurement: Measurement) -> float:
        """Return the non-members' probability per token, its geometric mean, as a share of the original's."""
        return math.exp(self.original.non_members_nll - measurement.non_members_nll)

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON. It holds no text."""
        return {"format": _FORMAT, "complete": self.complete, **plain_json(self)}

    @classmethod
    def read(cls, directory: str | Path) -> Comparison:
        """Read a comparison that `save` wrote. Raises OutputError when the folder holds none."""
        path = Path(directory) / "result.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("format") != _FORMAT:
                raise KeyError("format")
            del content["complete"]
            rows = [_row(row) for row in content["rows"]]
            return cls(**{**content, "rows": rows, "original": _measurement(content["original"])})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(
                f"{path} is not what a comparison wrote: choose another folder, or empty it first"
            ) from error

    def save(self, directory: str | Path) -> Path:
        """Write result.json and table.csv, each all of it or nothing; earlier ones are replaced.

        Args:
            directory: new, empty, or that of a comparison.

        Raises:
            OutputError: the folder holds something else or cannot be written.
        """
        folder = check_folder(directory)
        self.write(folder)
        write_bytes(folder / "table.csv", self._csv().encode())
        return folder

    def write(self, folder: Path) -> None:
        """Write result.json alone."""
        write_json(folder / "result.json", self.to_dict())

    def _csv(self) -> str:
        rows = [self._flat("original", None), *(self._flat(row.method, row) for row in self.rows)]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def _flat(self, name: str, row: Row | None) -> dict[str, Any]:
        """Return a line of table.csv: column -> value, None where there is none."""
        measured = self.original if row is None else row.calibrated
        before = None if row is None else row.uncalibrated
        line: dict[str, Any] = {"method": name, "status": "original" if row is None else row.status}
        for part in _INTERVALS:
            interval = (None, None, None) if measured is None else getattr(measured, part)
            for suffix, value in zip(("", "_low", "_high"), interval, strict=True):
                line[f"{part}{suffix}"] = value
        for verdict in VERDICTS:
            share = None if measured is None else measured.share(verdict)
            line[verdict.replace(" ", "_").replace("-", "_")] = share
        for score in self.original.tasks:
            of_this = next((x for x in (measured.tasks if measured else ()) if _same(x, score)), None)
            for suffix, interval in (("", of_this and of_this.now), ("_change", of_this and of_this.change)):
                for end, value in zip(("", "_low", "_high"), interval or (None, None, None), strict=True):
                    line[f"{score.task}_{score.metric}{suffix}{end}".replace(", ", "_")] = value
        line["utility_share"] = None if measured is None else self.utility_share(measured)
        line["non_members_nll"] = None if measured is None else measured.non_members_nll
        line["utility_share_uncalibrated"] = None if before is None else self.utility_share(before)
        line["exposure_uncalibrated"] = None if before is None else before.exposure.estimate
        line["unseen_share"] = None if measured is None else self.unseen_share(measured)
        for part in ("weight", "equalized", "steps", "stopped", "seconds", "peak_memory", "reason"):
            line[part] = None if row is None else getattr(row, part)
        return line


def check_folder(directory: str | Path) -> Path:
    """Return the folder as a path, if it is new, empty, or holds a comparison, and can be written.

    Raises OutputError otherwise.
    """
    folder = check_output(directory, marker="result.json")
    require_writable(folder)
    if (folder / "result.json").exists():
        Comparison.read(folder)
    return folder


def _row(content: dict[str, Any]) -> Row:
    measured = {name: content[name] and _measurement(content[name]) for name in ("calibrated", "uncalibrated")}
    return Row(**content | measured)


def _measurement(content: dict[str, Any]) -> Measurement:
    """Make a measurement from JSON, where NaN is None."""
    intervals = {
        name: Interval(**{end: math.nan if value is None else value for end, value in content[name].items()})
        for name in _INTERVALS
    }
    tasks = [TaskScore.of(score) for score in content.get("tasks", [])]
    return Measurement(**{**content, **intervals, "tasks": tasks})


def _same(a: TaskScore, b: TaskScore) -> bool:
    return (a.task, a.metric) == (b.task, b.metric)
