"""An audit for a terminal, and its files."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from pyunlearn.auditing.redaction import masked
from pyunlearn.auditing.result import Audit, AuditedExample
from pyunlearn.errors import OutputError
from pyunlearn.output import check_output
from pyunlearn.report import sentences
from pyunlearn.report.html import audit_page
from pyunlearn.report.table import COLOURS, SHOWN, beginning, narrow_table


def audit_table(audit: Audit, *, show_text: bool = False) -> Table:
    """A row for each text, the worst first (30 at most): exposure with its interval, exact memorization, extraction strength, verdict."""
    both = audit.non_members.anchored
    table = narrow_table(
        "what the model remembers", "text", ["exposure\nbits", "interval\nbits", "first\nchoice", "extracted"]
    )
    table.columns[0].no_wrap, table.columns[0].overflow = True, "ellipsis"
    table.add_column("verdict", no_wrap=True, min_width=16)
    order = sorted(audit.examples, key=lambda e: (list(sentences.MEANINGS).index(e.verdict), -e.exposure))
    for e in order[:SHOWN]:
        name = beginning(e.text) if show_text else masked(" ".join(e.text.split()[:4]))
        exposure = f"{e.exposure_before:.1f} → {e.exposure:.1f}" if both else f"{e.exposure:.1f}"
        table.add_row(
            f"{e.index + 1:>3}  {escape(name)}", exposure, _interval(e), f"{e.now.exact_memorization:.0%}", f"{e.now.extraction_strength:.0%}",
            f"[{COLOURS[e.verdict]}]{e.verdict}[/]{'' if e.certain else ' ?'}",
        )  # fmt: skip
    captions = [f"and {len(order) - SHOWN} more: see audit.json"] if len(order) > SHOWN else []
    captions += ["? more references might change this verdict"] if not all(e.certain for e in audit.examples) else []
    table.caption = "\n".join(captions) or None
    return table


def audit_lines(audit: Audit) -> list[str]:
    """What stands around the table: the verdict on the whole set, and what it cost elsewhere."""
    r = audit.non_members
    found = [sentences.headline(audit), *sentences.summary(audit)]
    found.append(
        f"compared with {len(r.scores)} texts: {r.source}{', scored under the original model' if r.anchored else ''}"
    )
    for m in audit.membership:
        found.append(
            f"membership, {m.score}: AUC {m.auc.estimate:.2f} ({m.auc.low:.2f} to {m.auc.high:.2f}; 0.5 = cannot be told from the holdout)"
        )
    return found + sentences.cost(audit)


def write_audit(audit: Audit, directory: str | Path, *, html: bool, show_text: bool = False) -> Path:
    """Writes audit.json, and audit.html where wanted, into an empty or new folder; each beside and renamed. Returns the folder.

    Raises:
        OutputError: the folder holds something already or cannot be written.
        DependencyError: a page is wanted, and jinja2 or matplotlib is missing.
    """
    target = check_output(directory)
    files = {"audit.json": json.dumps(audit.to_dict(show_text=show_text), indent=2, ensure_ascii=False) + "\n"}
    if html:
        files["audit.html"] = audit_page(audit, show_text=show_text)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            beside = target / f".{name}.partial"
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, target / name)
    except OSError as error:
        raise OutputError(f"the audit could not be written to {target}: {error}") from error
    return target


def _interval(e: AuditedExample) -> str:
    low, high = e.interval
    return f"{low:.1f} to {high:.1f}" if math.isfinite(high) else f"{low:.1f} or more"
