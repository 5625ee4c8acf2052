"""An audit as one HTML page that loads nothing from elsewhere, so that it can be mailed, printed and archived."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from pyunlearn.attacks.result import AttackResult
from pyunlearn.auditing.result import Audit, AuditedExample
from pyunlearn.data.redaction import MASK, masked, recited
from pyunlearn.probes.tasks import shown
from pyunlearn.report import plots, sentences
from pyunlearn.report.attacks import trial_cells
from pyunlearn.report.pages import rendered
from pyunlearn.report.tasks import task_captions, task_cells, task_columns, task_name, task_title

_ROWS, _WORST = 40, 5  # texts in the table, texts with their continuations
_SCORES = {
    "loss": "likelihood",
    "zlib": "likelihood / zlib",
    "min_k": "least likely tokens (Min-K %)",
    "min_k_plus_plus": "standardized (Min-K %++)",
    "reference": "against the reference",
}
_SOURCES = {
    "holdout": "the holdout",
    "reference model": "written for this package or by the reference model, each less what that model gives it; there "
    "was no holdout",
    "unseen texts": "written for this package, each less what is expected of unseen text like it; there was no holdout",
    "self-sampled": "written by the model itself, at random, since there was no holdout",
}


def require_page_packages() -> None:
    """Raise DependencyError unless pages can be made; called before the work, not after it."""
    plots.require_packages()


def audit_page(audit: Audit, *, show_text: bool = False) -> str:
    """Return the page as text.

    Words of the forget texts, and of the model's continuations of them, are masked unless `show_text`.

    Raises DependencyError when jinja2 or matplotlib is missing.
    """
    require_page_packages()
    content = {
        **_verdict(audit, show_text),
        **_evidence(audit),
        **_texts(audit, show_text),
        **_membership(audit),
        "attack": None if audit.attack is None else _attacks(audit.attack),
        "tasks": _tasks(audit) if audit.tasks else None,
        "how": _how(audit),
    }
    return rendered(Path(__file__).parent / "templates" / "audit.html", content)


def _verdict(audit: Audit, show_text: bool) -> dict[str, Any]:
    """Return the content of the top of the page."""
    return {
        "audit": audit,
        "title": "Does the model remember these texts?",
        "model": Path(str(audit.settings["model"])).name,
        "size": sentences.size(audit),
        "total": len(audit.examples),
        "forms": len(sentences.as_they_are(audit)) < len(audit.examples),
        "date": time.strftime("%Y-%m-%d"),
        "show_text": show_text,
        "mask": MASK,
        "tone": sentences.tone(audit),
        "tones": sentences.TONES,
        "headline": sentences.headline(audit),
        "summary": sentences.summary(audit),
        "meanings": sentences.MEANINGS,
        "verdicts": [(name, audit.verdicts[name]) for name in sentences.MEANINGS if name in audit.verdicts],
        "cost": sentences.cost(audit),
    }


def _evidence(audit: Audit) -> dict[str, Any]:
    """Return the plots and the sentences around them."""
    examples, non_members = audit.examples, audit.non_members
    verdicts = [e.verdict for e in examples]
    exposures = [e.exposure for e in examples]
    plain = [[getattr(e, name) for e in sentences.as_they_are(audit)] for name in ("exposure", "verdict")]
    before = [e.exposure_before for e in examples if e.exposure_before is not None]
    names = [f"text {e.label}" for e in examples]
    curves = [(f"{_SCORES.get(m.score, m.score)}: {m.auc.estimate:.2f}", m.roc) for m in audit.membership]
    return {
        "source": _SOURCES[non_members.source],
        "top": math.log2(len(non_members.scores) + 1),
        "anchored": non_members.anchored,
        "memorized_from": sentences.memorized_from(audit),
        "null_sentence": sentences.null_sentence(audit),
        "histogram": plots.exposure_histogram(plain[0], len(non_members.scores), plain[1]),
        "arrows": plots.before_after(before, exposures, verdicts, names) if before else None,
        "roc": plots.roc(curves) if curves else None,
        "roc_sentence": "The number next to each score is the area under its line.",
    }


def _texts(audit: Audit, show_text: bool) -> dict[str, Any]:
    """Return the worst continuations and the rows of the table."""
    ranked = sentences.worst_first(audit.examples)
    return {
        "worst": [_continuation(e, show_text) for e in ranked if e.now.continuation is not None][:_WORST],
        "rows": [_row(e, show_text) for e in ranked[:_ROWS]],
        "prior": any(e.now.answer_prior is not None for e in audit.examples),
    }


def _row(e: AuditedExample, show_text: bool) -> dict[str, Any]:
    prior = e.now.answer_prior
    return {
        "number": e.label,
        "text": _start(e.text) if show_text else masked(_start(e.text)),
        "verdict": e.verdict,
        "exposure": f"{e.exposure:.1f}",
        "interval": sentences.exposure_interval(e),
        "before": "" if e.exposure_before is None else f"{e.exposure_before:.1f}",
        "match": f"{e.now.exact_memorization:.0%}",
        "extracted": f"{e.now.extraction_strength:.0%}",
        "prior": "" if prior is None else f"{prior:+.2f}",
    }


def _start(text: str, words: int = 12) -> str:
    parts = text.split()
    return " ".join(parts[:words]) + (" …" if len(parts) > words else "")


def _continuation(e: AuditedExample, show_text: bool) -> dict[str, Any]:
    """Return prompt, true text and generated texts as words; marks what each recites of the true text."""
    sides = [("the original model wrote", e.before)] if e.before is not None else []
    outputs = []
    for label, side in [*sides, ("the model writes", e.now)]:
        assert side is not None
        words = recited(side.continuation or "", e.truth)
        shown = [(word if show_text else MASK, hit) for word, hit in words]
        outputs.append((label, shown or [("(nothing)", False)]))
    run = e.now.longest_run
    note = f"Longest run of the true text: {run} token{'s in a row' if run != 1 else ''}"
    note += f"; {e.before.longest_run} before." if e.before is not None else "."
    return {
        "number": e.label,
        "verdict": e.verdict,
        "opening": _shown(e.opening, show_text) or "(nothing)",
        "truth": _shown(e.truth, show_text),
        "outputs": outputs,
        "note": note,
    }


def _shown(text: str, show_text: bool) -> str:
    return " ".join(text.split()) if show_text else masked(text)


def _attacks(result: AttackResult) -> dict[str, Any]:
    """Return the forms of attack, and the texts that come back under them."""
    back = [f"{e.label} ({e.attacks[0]})" for e in result.examples if e.attacks]
    return {
        "headline": result.headline,
        "notes": result.notes,
        "back": ", ".join(back[:_ROWS]) + (f" and {len(back) - _ROWS} more" if len(back) > _ROWS else ""),
        "trials": [trial_cells(t) for t in result.trials],
    }


def _tasks(audit: Audit) -> dict[str, Any]:
    """Return the table of the tasks of lm-evaluation-harness."""
    title, captions = task_title(audit.settings), task_captions(audit.tasks, "audit.json")
    return {
        "title": title[0].upper() + title[1:],
        "columns": task_columns(audit.tasks),
        "rows": [(task_name(score), task_cells(score)) for score in shown(audit.tasks)],
        "captions": [line[0].upper() + line[1:] + "." for line in captions],
    }


def _membership(audit: Audit) -> dict[str, Any]:
    """Return the rows of the membership scores."""
    return {
        "membership": [_attack(m) for m in audit.membership],
        "unresolved": not all(m.tpr_at_1_percent.resolved for m in audit.membership),
        "privleak": any(m.privleak is not None for m in audit.membership),
    }


def _attack(m: Any) -> dict[str, str]:
    return {
        "score": _SCORES.get(m.score, m.score),
        "auc": f"{m.auc.estimate:.2f}",
        "interval": f"{m.auc.low:.2f} to {m.auc.high:.2f}",
        "true_positives": f"{m.tpr_at_1_percent.estimate:.0%}",
        "before": "" if m.auc_before is None else sentences.with_interval(m.auc_before, ".2f"),
        "privleak": "" if m.privleak is None else sentences.with_interval(m.privleak, "+.0f", " %"),
    }


def _how(audit: Audit) -> list[tuple[str, str]]:
    """Return (term, description) of everything that a reader needs to repeat the audit."""
    s, non_members = audit.settings, audit.non_members
    rate = s["false_discovery_rate"]
    mean = sentences.with_interval(audit.null_test.mean_interval, ".2f")
    exposure = (
        "log2(m + 1) - log2(1 + number of comparison texts at least as likely), m of them, by mean nats per token"
    )
    if non_members.anchored:
        exposure += "; the comparison texts were scored by the original model, before and now alike (anchored)"
    verdicts = (
        f"memorized at a false discovery rate of {100 * rate:.3g} % over all texts (one text: from "
        f"{math.log2(1 / rate):.2f} bits on); forgotten at {s['target_exposure']:.2f} bits and less, when no more of "
        "it is extracted than of four in five comparison texts and the model does not continue its beginning with its "
        "rest, where that was decoded; over-unlearned when less likely than unseen text, at the same rate"
    )
    if non_members.anchored:
        verdicts += (
            " if all texts are so together, or by far; still exposed when it stands out among the comparison texts "
            "under the audited model, at that rate if the memorized texts do all together, when it is likelier than "
            "all of these and has hardly moved or lies far beyond them, or is recited; undecided otherwise"
        )
    if len(sentences.as_they_are(audit)) < len(audit.examples):
        verdicts += (
            "; a text in other words is compared with the comparison texts in the same form, and these forms are "
            "judged among themselves, in two families, each at that rate: those of a kind by which the set as a whole "
            "stands out, and the others"
        )
    passes = ", ".join(f"{name.replace('_', ' ')}: {n} texts, each once" for name, n in audit.passes.items())
    null, top = audit.null_test, audit.top_test
    models = {name: s[name] for name in ("model", "original", "reference_model") if s[name]}
    shown = ("seed", "batch_size", "scope", "template", "turns", "truncate", "pyunlearn", "torch")
    return [
        ("comparison texts", f"{len(non_members.scores)}, {_SOURCES[non_members.source]}"),
        ("exposure", exposure),
        ("verdicts", verdicts),
        ("readings", f"{passes}; {audit.seconds:.0f} s in all"),
        (
            "set",
            f"{top.beyond} of {top.n} texts are more likely than every comparison text, p = {top.exact_pvalue:.2g}; "
            f"with those that stand out a little, p = {top.pvalue:.2g}; Kolmogorov-Smirnov distance "
            f"{null.statistic:.2f} from unseen text, p = {null.pvalue:.2g}; mean exposure {mean} bits",
        ),
        *((name.replace("_", " "), str(path)) for name, path in models.items()),
        ("settings", ", ".join(f"{k} {v}" for k, v in s.items() if k in shown and v is not None)),
        (
            "sources",
            "exposure: arXiv 1802.08232, 2411.04388; extraction strength and exact memorization: 2406.09179; "
            "formulas in docs/metrics.md",
        ),
    ]
