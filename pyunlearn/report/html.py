"""An audit as one HTML page: nothing is fetched, so it can be mailed, printed and kept."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from pyunlearn.auditing.redaction import MASK, masked, recited
from pyunlearn.auditing.result import Audit, AuditedExample
from pyunlearn.report import plots, sentences
from pyunlearn.report.pages import rendered

_ROWS, _WORST = 40, 5
_SCORES = {
    "loss": "likelihood", "zlib": "likelihood / zlib", "min_k": "least likely tokens (Min-K %)",
    "min_k_plus_plus": "standardized (Min-K %++)", "reference": "against the reference",
}  # fmt: skip


def require_page_packages() -> None:
    """Raises DependencyError unless pages can be made: before the work, not after it."""
    plots.require_packages()


def audit_page(audit: Audit, *, show_text: bool = False) -> str:
    """The page as text. Words of the forget texts, and of what the model wrote in their place, are masked unless `show_text`.

    Raises DependencyError when jinja2 or matplotlib is missing.
    """
    require_page_packages()
    return rendered(Path(__file__).parent / "templates" / "audit.html", _content(audit, show_text))


def _content(audit: Audit, show_text: bool) -> dict[str, Any]:
    examples, references = audit.examples, audit.non_members
    ranked = sorted(examples, key=lambda e: (list(sentences.MEANINGS).index(e.verdict), -e.exposure))
    verdicts = [e.verdict for e in examples]
    before = [e.exposure_before for e in examples if e.exposure_before is not None]
    names = [f"text {e.index + 1}" for e in examples]
    curves = [(f"{_SCORES.get(m.score, m.score)}: {m.auc.estimate:.2f}", m.roc) for m in audit.membership]
    source = {
        "holdout": "the holdout that was given", "sampled from the model": "written by the model itself, at random, since no holdout was given",
        "sampled from the original model": "written by the original model, at random, since no holdout was given",
    }[references.source]  # fmt: skip
    return {
        "audit": audit, "title": "Does the model remember these texts?", "model": Path(str(audit.settings["model"])).name, "total": len(examples),
        "date": time.strftime("%Y-%m-%d"), "show_text": show_text, "mask": MASK, "tone": sentences.tone(audit), "tones": sentences.TONES,
        "headline": sentences.headline(audit), "summary": sentences.summary(audit), "meanings": sentences.MEANINGS,
        "verdicts": [(name, audit.verdicts[name]) for name in sentences.MEANINGS if name in audit.verdicts],
        "source": source, "top": math.log2(len(references.scores) + 1), "anchored": references.anchored,
        "null_sentence": sentences.null_sentence(audit), "cost": sentences.cost(audit),
        "histogram": plots.exposure_histogram([e.exposure for e in examples], len(references.scores), verdicts),
        "arrows": plots.before_after(before, [e.exposure for e in examples], verdicts, names) if before else None,
        "roc": plots.roc(curves) if curves else None,
        "roc_sentence": "The number behind each score is the area under its line.",
        "worst": [_written(e, show_text) for e in ranked if e.now.continuation is not None][:_WORST],
        "rows": [_row(e, show_text) for e in ranked[:_ROWS]], "prior": any(e.now.answer_prior is not None for e in examples),
        "membership": [_attack(m) for m in audit.membership], "unresolved": not all(m.tpr_at_1_percent.resolved for m in audit.membership), "privleak": any(m.privleak is not None for m in audit.membership),
        "how": _how(audit, source),
    }  # fmt: skip


def _row(e: AuditedExample, show_text: bool) -> dict[str, Any]:
    low, high = e.interval
    return {
        "number": e.index + 1, "text": _beginning(e.text) if show_text else masked(_beginning(e.text)), "verdict": e.verdict,
        "exposure": f"{e.exposure:.1f}", "interval": f"{low:.1f} to {high:.1f}" if math.isfinite(high) else f"{low:.1f} or more",
        "before": "" if e.exposure_before is None else f"{e.exposure_before:.1f}", "match": f"{e.now.exact_memorization:.0%}",
        "extracted": f"{e.now.extraction_strength:.0%}", "prior": "" if e.now.answer_prior is None else f"{e.now.answer_prior:+.2f}",
    }  # fmt: skip


def _beginning(text: str, words: int = 12) -> str:
    parts = text.split()
    return " ".join(parts[:words]) + (" …" if len(parts) > words else "")


def _written(e: AuditedExample, show_text: bool) -> dict[str, Any]:
    show = (lambda text: " ".join(text.split())) if show_text else masked
    sides = [("the original model wrote", e.before)] if e.before is not None else []
    said = []
    for label, side in [*sides, ("the model writes", e.now)]:
        assert side is not None
        words = recited(side.continuation or "", e.truth)
        said.append((label, [(word if show_text else MASK, hit) for word, hit in words] or [("(nothing)", False)]))
    run = e.now.longest_run
    note = f"Longest run of the true text: {run} token{'s in a row' if run != 1 else ''}" + (
        f"; {e.before.longest_run} before." if e.before is not None else "."
    )
    return {
        "number": e.index + 1, "verdict": e.verdict, "opening": show(e.opening) or "(nothing)", "truth": show(e.truth), "said": said, "note": note,
    }  # fmt: skip


def _attack(m: Any) -> dict[str, str]:
    return {
        "score": _SCORES.get(m.score, m.score), "auc": f"{m.auc.estimate:.2f}", "interval": f"{m.auc.low:.2f} to {m.auc.high:.2f}",
        "found": f"{m.tpr_at_1_percent.estimate:.0%}", "before": "" if m.auc_before is None else sentences.with_interval(m.auc_before, ".2f"),
        "privleak": "" if m.privleak is None else sentences.with_interval(m.privleak, "+.0f", " %"),
    }  # fmt: skip


def _how(audit: Audit, source: str) -> list[tuple[str, str]]:
    s, references = audit.settings, audit.non_members
    mean = sentences.with_interval(audit.null_test.mean_interval, ".2f")
    said = [
        ("comparison texts", f"{len(references.scores)}, {source}"),
        (
            "exposure",
            "log2(m + 1) - log2(1 + number of comparison texts at least as likely), m of them, by mean log-likelihood per token"
            + ("; the comparison texts were scored by the original model, before and now alike (anchored)" if references.anchored else ""),
        ),
        (
            "verdicts",
            f"memorized from 4.32 bits on (likelier than 95 % of unseen text); forgotten at {s['target_exposure']:.2f} bits and less; over-unlearned when less likely than "
            "95 % of unseen text",
        ),
        (
            "readings",
            ", ".join(f"{name.replace('_', ' ')}: {n} texts, each once" for name, n in audit.passes.items())
            + f"; {audit.seconds:.0f} s in all",
        ),
        ("set", f"Kolmogorov-Smirnov distance {audit.null_test.statistic:.2f} from unseen text, p = {audit.null_test.pvalue:.2g}; mean exposure {mean} bits"),
    ]  # fmt: skip
    models = {name: s[name] for name in ("model", "original", "reference_model") if s[name]}
    said += [(name.replace("_", " "), str(path)) for name, path in models.items()]
    said.append(
        (
            "settings",
            ", ".join(
                f"{k} {v}" for k, v in s.items() if k in ("seed", "batch_size", "truncate", "pyunlearn", "torch")
            ),
        )
    )
    said.append(
        (
            "sources",
            "exposure: arXiv 1802.08232, 2411.04388; extraction strength and exact memorization: 2406.09179; formulas in docs/metrics.md",
        )
    )
    return said
