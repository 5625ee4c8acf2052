"""What a comparison returns: a row for each method, and how they are written to disk."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyunlearn.errors import OutputError
from pyunlearn.metrics import Interval
from pyunlearn.output import plain_json
from pyunlearn.unlearning.result import VERDICTS

_FORMAT = "pyunlearn comparison"
_INTERVALS = ("forget_nll", "exposure", "extraction_strength", "utility_nll")


@dataclass(frozen=True)
class Standing:
    """Where a model stands between forgetting and keeping: means with 95 % bootstrap intervals over the texts."""

    forget_nll: Interval
    """Negative log-likelihood of the forget texts, nats a token; high = unlikely."""
    exposure: Interval
    """Anchored exposure of the forget texts, bits: 1.44 for unseen text, low = below what unseen text gets."""
    exposures: list[float]
    """Of each forget text."""
    verdicts: dict[str, int]
    """How many forget texts are forgotten, not memorized, still exposed, over-unlearned: see `pyunlearn.metrics.verdict`."""
    extraction_strength: Interval
    """Of the forget texts, 0 to 1; high = recited."""
    utility_nll: Interval
    """Negative log-likelihood of the text that has to keep working, nats a token; low = kept."""
    utility: float
    """The metric that is held equal, on that text; high = kept."""
    references_nll: float
    """Mean negative log-likelihood of the references, nats a token: text of the forget set's kind that was never trained on."""

    def share(self, verdict: str) -> float:
        """The share of the forget texts with this verdict, 0 to 1."""
        return self.verdicts[verdict] / sum(self.verdicts.values())


@dataclass(frozen=True)
class Row:
    """One method."""

    method: str
    status: str
    """done; refused: it needs what was not given; failed: it broke. `reason` says why."""
    reason: str | None = None
    calibrated: Standing | None = None
    """Of the mixture with the original that keeps tau of the utility: the one to compare."""
    uncalibrated: Standing | None = None
    """Of the model as the method left it."""
    weight: float | None = None
    """The unlearned model's share in the mixture; 1: the method itself keeps the utility."""
    monotone: bool | None = None
    """Whether the utility fell with the weight wherever it was tried; where not, a larger weight may exist."""
    steps: int | None = None
    """Optimizer steps taken, those that were taken back included."""
    stopped: str | None = None
    """Why the run ended: see `Result.stopped`."""
    seconds: float | None = None
    """Of the method's run, its own scoring included; not of calibration and measuring."""
    peak_memory: int | None = None
    """Bytes of the run at its highest: of the card, or on the CPU of the whole process; None where the system does not say."""

    @property
    def done(self) -> bool:
        """Whether there is something to compare."""
        return self.status == "done"


@dataclass
class Comparison:
    """Methods at equal utility."""

    rows: list[Row]
    original: Standing
    utility_text: str
    """What the utility was measured on: retain set, holdout, or text sampled from the model."""
    references: int
    """How many references the exposures were measured against: they reach log2(references + 1) bits at most."""
    scores: dict[str, list[float]] = field(repr=False)
    """Mean negative log-likelihoods (nats a token) under the original model, by role: what a comparison that goes on must agree in."""
    settings: dict[str, Any] = field(repr=False)

    @property
    def complete(self) -> bool:
        """Whether every method could be measured."""
        return all(row.done for row in self.rows)

    def utility_share(self, standing: Standing) -> float:
        """The utility as a share of the original's: tau or more once calibrated."""
        return standing.utility / self.original.utility

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON. It holds no text."""
        return {"format": _FORMAT, "complete": self.complete, **plain_json(self)}

    @classmethod
    def read(cls, directory: str | Path) -> Comparison:
        """What `save` wrote. Raises OutputError when the folder holds no comparison."""
        path = Path(directory) / "result.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.pop("format") != _FORMAT:
                raise KeyError("format")
            del found["complete"]
            rows = [_row(row) for row in found["rows"]]
            return cls(**{**found, "rows": rows, "original": _standing(found["original"])})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(
                f"{path} is not what a comparison wrote: choose another folder, or empty it first"
            ) from error

    def save(self, directory: str | Path) -> Path:
        """Writes result.json and table.csv, each under another name first, then renamed; earlier ones are replaced.

        Args:
            directory: new, empty, or of a comparison.

        Raises:
            OutputError: the folder holds something else or cannot be written.
        """
        target = check_folder(directory)
        self.write(target)
        write_file(target / "table.csv", self._csv())
        return target

    def write(self, target: Path) -> None:
        """result.json alone."""
        write_file(target / "result.json", json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")

    def _csv(self) -> str:
        out, writer = io.StringIO(newline=""), None
        for name, row in [("original", None), *((r.method, r) for r in self.rows)]:
            found = self._flat(name, row)
            if writer is None:
                writer = csv.DictWriter(out, list(found))
                writer.writeheader()
            writer.writerow(found)
        return out.getvalue()

    def _flat(self, name: str, row: Row | None) -> dict[str, Any]:
        s = self.original if row is None else row.calibrated
        numbers: dict[str, Any] = {}
        for part in _INTERVALS:
            x = None if s is None else getattr(s, part)
            numbers |= {
                f"{part}{end}": None if x is None else y
                for end, y in zip(("", "_low", "_high"), x or (None,) * 3, strict=True)
            }
        numbers |= {v.replace(" ", "_").replace("-", "_"): None if s is None else s.share(v) for v in VERDICTS}
        numbers |= {
            "utility_share": None if s is None else self.utility_share(s),
            "references_nll": None if s is None else s.references_nll,
            "utility_share_uncalibrated": None
            if row is None or row.uncalibrated is None
            else self.utility_share(row.uncalibrated),
            "exposure_uncalibrated": None
            if row is None or row.uncalibrated is None
            else row.uncalibrated.exposure.estimate,
        }
        for part in ("weight", "steps", "stopped", "seconds", "peak_memory", "reason"):
            numbers[part] = None if row is None else getattr(row, part)
        return {"method": name, "status": "original" if row is None else row.status} | numbers


def check_folder(directory: str | Path) -> Path:
    """The folder as a path, if it is new, empty, or holds a comparison. Raises OutputError otherwise."""
    given, target = Path(directory), Path(directory).resolve()
    if target.exists() and not target.is_dir():
        raise OutputError(f"the output folder {given} is a file: choose another name")
    if target.is_dir() and any(target.iterdir()) and not (target / "result.json").exists():
        raise OutputError(f"the output folder {given} is not empty: choose another, or empty it first")
    if (target / "result.json").exists():
        Comparison.read(target)
    return target


def write_file(path: Path, content: str | bytes) -> None:
    beside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(beside, path)
    except OSError as error:
        raise OutputError(f"the comparison could not be written to {path.parent}: {error}") from error
    finally:
        beside.unlink(missing_ok=True)


def _row(found: dict[str, Any]) -> Row:
    parts: dict[str, Any] = {k: _standing(v) if isinstance(v, dict) else v for k, v in found.items()}
    return Row(**parts)


def _standing(found: dict[str, Any]) -> Standing:
    """Back from JSON, where NaN is None."""
    ends = {k: Interval(**{n: math.nan if x is None else x for n, x in found[k].items()}) for k in _INTERVALS}
    return Standing(**{**found, **ends})
