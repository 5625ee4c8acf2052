"""What an audit found, in words that ask for no training in the field."""

from __future__ import annotations

import math

from pyunlearn.auditing.result import Audit, Writing
from pyunlearn.metrics import SIGNIFICANT, Interval

MEANINGS = {
    "still exposed": "The model knows it better than text that it never saw.",
    "over-unlearned": "Pushed below what unseen text gets: the gap itself gives it away.",
    "forgotten": "It was memorized, and is now like text that was never seen.",
    "not memorized": "Was never known better than unseen text.",
}
"""Each verdict, the worst first."""
TONES = {"still exposed": "warn", "over-unlearned": "bad", "forgotten": "good", "not memorized": "plain"}


def headline(audit: Audit) -> str:
    """The verdict on the whole set, in one sentence."""
    counts, n = audit.verdicts, len(audit.examples)
    exposed, over = counts.get("still exposed", 0), counts.get("over-unlearned", 0)
    if exposed:
        said = "still exposed" if audit.non_members.anchored else "memorized"
        return f"{_of(exposed, n)} {'is' if exposed == 1 else 'are'} {said}."
    if over:
        return f"Nothing is exposed, but {_of(over, n).lower()} {'was' if over == 1 else 'were'} driven too far."
    if counts.get("forgotten"):
        return "Forgotten: no text stands out any more." if n > 1 else "Forgotten: the text no longer stands out."
    return "No text is memorized." if n > 1 else "The text is not memorized."


def tone(audit: Audit) -> str:
    """The colour of that sentence: good, plain, warn or bad."""
    return next(TONES[name] for name in MEANINGS if audit.verdicts.get(name))


def summary(audit: Audit) -> list[str]:
    """Two or three sentences below it."""
    found = []
    if audit.non_members.anchored and audit.change is not None:
        was = sum(e.exposure_before is not None and e.exposure_before >= SIGNIFICANT - 1e-9 for e in audit.examples)
        found.append(f"Before unlearning, {was} of {len(audit.examples)} stood out as memorized. {_moved(audit)}")
    else:
        found.append(
            "The model before unlearning was not given, so this says what the model knows now, not what it has forgotten (--compare)."
        )
    unsure = sum(not e.certain for e in audit.examples)
    if unsure:
        found.append(
            f"{_of(unsure, len(audit.examples))} {'has' if unsure == 1 else 'have'} a verdict that more comparison texts might still change: see the intervals below."
        )
    if audit.collapsed:
        found.append("Beware: the model repeats itself when it writes. It may be damaged rather than have forgotten.")
    return found


def null_sentence(audit: Audit) -> str:
    """Whether the exposures, all together, could be those of unseen text."""
    p = audit.null_test.pvalue
    if p >= 0.05 and audit.verdicts.get("still exposed"):
        return f"Single texts stand out; all together they are too few, or too mixed, to show it (p = {p:.2g})."
    if p >= 0.05:
        return f"All together they could be such texts (p = {p:.2g})."
    if audit.null_test.mean > 1.443:
        return f"All together they are not such texts (p = {p:.1g}): too many stand out."
    return f"All together they differ from such texts (p = {p:.1g}), without standing out."


def cost(audit: Audit) -> list[str]:
    """What unlearning cost the retain set, the references and the model's own writing."""
    found = []
    if (u := audit.utility) is not None:
        line = f"Text that must keep working ({u.texts} texts): {u.nll.estimate:.3f} nats a token (95 % interval {u.nll.low:.3f} to {u.nll.high:.3f}; low is good)"
        if u.change is not None and u.nll_before is not None:
            scale = 100 / max(u.nll_before.estimate, 1.0)
            line += f", {with_interval(u.nll_before, '.3f')} before: {scale * u.change.estimate:+.1f} % ({scale * u.change.low:+.1f} to {scale * u.change.high:+.1f} %)"
        found.append(line + ".")
    if (d := audit.non_members.drift) is not None:
        found.append(
            f"The comparison texts, which nobody wanted forgotten, became {d.estimate:+.3f} nats a token less likely ({d.low:+.3f} to {d.high:+.3f}; near 0 is good)."
        )
    if (now := audit.writing) is not None:
        was = audit.writing_before
        found.append(
            f"What it writes, with 95 % intervals: {_writing(now)}{'' if was is None else f'; before: {_writing(was)}'}. {'Greedy writing repeats itself in healthy models too: only the difference from the original tells.' if was is None else 'A model that has collapsed repeats itself.'}"
        )
    return found


def with_interval(value: Interval, form: str, unit: str = "") -> str:
    """An estimate with its interval behind it, where there is one: 0.41 (0.36 to 0.47)."""
    said = f"{value.estimate:{form}}{unit}"
    if math.isnan(value.low):
        return said
    return f"{said} ({value.low:{form}} {f'to {value.high:{form}}' if math.isfinite(value.high) else 'or more'})"


def _writing(w: Writing) -> str:
    return (
        f"{with_interval(w.distinct_2, '.0%')} of neighbouring tokens are new pairs, {with_interval(w.repetition, '.0%')} of four-token runs stood there before, "
        f"and {with_interval(w.collapsed, '.0%')} of the continuations mostly repeat themselves"
    )


def _of(count: int, n: int) -> str:
    if n == 1:
        return "The text"
    return f"All {n} texts" if count == n else f"{count} of {n} texts"


def _moved(audit: Audit) -> str:
    """By how much the texts have become less likely."""
    assert audit.change is not None
    nats, p = audit.change.estimate, audit.change.pvalue
    if abs(nats) < 0.05:
        return "Since then they have hardly changed."
    factor = math.exp(min(abs(nats), 50.0))
    times = f"{factor:.2g} times" if factor < 1000 else "over a thousand times"
    chance = "" if p < 0.05 or len(audit.examples) < 6 else f", which may be chance (p = {p:.2g})"
    return f"Since then each of their tokens has become {times} {'less' if nats < 0 else 'more'} likely on average{chance}."
