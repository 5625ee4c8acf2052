"""An audit for a terminal, and its files."""

from __future__ import annotations

import json
import os
from pathlib import Path

from rich.table import Table

from pyunlearn.auditing.result import Audit
from pyunlearn.errors import OutputError
from pyunlearn.output import check_output, new_private_file
from pyunlearn.report import sentences
from pyunlearn.report.html import audit_page
from pyunlearn.report.table import SHOWN, UNCERTAIN, record_table, text_cell, verdict_cell

_UNFINISHED = ("audit.html", ".audit.html.partial", ".audit.json.partial")  # what an interruption can leave


def audit_table(audit: Audit, *, show_text: bool = False) -> Table:
    """Return a row for each text, 30 at most, sorted by verdict and exposure, the most exposed first.

    Columns: exposure with its 95 % interval, exact memorization (first choice) and extraction strength (extracted).
    """
    anchored = audit.non_members.anchored
    numbers = ["exposure\nbits", "interval\nbits", "first\nchoice", "ex-\ntracted"]
    table = record_table("what the model remembers", numbers)
    order = sentences.worst_first(audit.examples)
    for e in order[:SHOWN]:
        exposure = f"{e.exposure_before:.1f} → {e.exposure:.1f}" if anchored else f"{e.exposure:.1f}"
        table.add_row(
            e.label,
            text_cell(e.text, show_text),
            verdict_cell(e.verdict, certain=e.certain),
            exposure,
            sentences.exposure_interval(e),
            f"{e.now.exact_memorization:.0%}",
            f"{e.now.extraction_strength:.0%}",
        )
    captions = [f"and {len(order) - SHOWN} more: see audit.json"] if len(order) > SHOWN else []
    captions += [UNCERTAIN] if not all(e.certain for e in audit.examples) else []
    table.caption = "\n".join(captions) or None
    return table


def audit_lines(audit: Audit) -> list[str]:
    """Return the sentences below the table: verdict on the whole set, non-members, membership scores, cost."""
    non_members = audit.non_members
    scored = ", scored under the original model" if non_members.anchored else ""
    lines = [sentences.headline(audit), *sentences.summary(audit)]
    forms = "; other forms with the same forms of these" if any(e.form for e in audit.examples) else ""
    lines.append(f"compared with {len(non_members.scores)} texts: {non_members.source}{scored}{forms}")
    lines += audit.notes
    for m in audit.membership:
        lines.append(
            f"membership, {m.score}: AUC {m.auc.estimate:.2f} ({m.auc.low:.2f} to {m.auc.high:.2f}; 0.5: not told "
            "apart from the holdout)"
        )
    return lines + sentences.cost(audit)


def audit_folder(directory: str | Path) -> Path:
    """Return the folder of an audit as a path, if it is new, empty, or that of an audit interrupted as it was written.

    Raises OutputError otherwise.
    """
    target = Path(directory).resolve()
    if target.is_dir() and {path.name for path in target.iterdir()} <= set(_UNFINISHED):
        return target
    return check_output(directory)


def write_audit(audit: Audit, directory: str | Path, *, html: bool, show_text: bool = False) -> Path:
    """Write audit.json, and audit.html where wanted, into an empty or new folder, and return the folder.

    Each file is written under another name and renamed, so that it is whole or not there; audit.json is the last.

    Raises:
        OutputError: the folder is not empty or cannot be written.
        DependencyError: a page is wanted, and jinja2 or matplotlib is missing.
    """
    target = audit_folder(directory)
    files = {"audit.html": audit_page(audit, show_text=show_text)} if html else {}
    files["audit.json"] = json.dumps(audit.to_dict(show_text=show_text), indent=2, ensure_ascii=False) + "\n"
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in _UNFINISHED:
            (target / name).unlink(missing_ok=True)
        for name, text in files.items():
            partial = target / f".{name}.partial"
            new_private_file(partial)
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, target / name)
    except OSError as error:
        raise OutputError(f"the audit could not be written to {target}: {error}") from error
    return target
