"""The result of a study."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyunlearn.study.claims import Claim
from pyunlearn.study.config import StudyConfig


@dataclass(frozen=True)
class Study:
    """A finished study."""

    folder: Path
    """The folder with tables, figures, models and index.html, the page to begin with."""
    config: StudyConfig
    claims: list[Claim]
    """The decision on each claim, up to five, with one number per seed."""
    secondary: list[Claim]
    """Decisions on the claims that compare kinds, for further kinds of forget set."""
    notes: list[str]
    """Limits of these decisions, a sentence each: too few seeds, too much text out of distribution, runs that ended."""
    plan: str
    """The hash of study.yaml, which was written before anything was trained."""
