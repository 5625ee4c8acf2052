"""Sentences that present an audit to readers without training in the field."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from pyunlearn.auditing.result import UNDECIDED, Audit, AuditedExample, Writing
from pyunlearn.metrics import NULL_MEAN, Interval
from pyunlearn.probes.long_texts import document_verdict

MEANINGS = {
    "still exposed": "The model knows it better than text that it never saw.",
    "over-unlearned": "Pushed below what unseen text gets: the gap itself gives it away.",
    UNDECIDED: "It was memorized, and neither stands out now nor lies where it would be called forgotten.",
    "no likelier": "It was memorized, and is now no likelier than what the model writes by itself.",
    "forgotten": "It was memorized, and is now like text that was never seen.",
    "not memorized": "Was never known better than unseen text.",
}
"""Each verdict and its meaning, the worst first."""
TONES = {
    "still exposed": "warn",
    "over-unlearned": "bad",
    UNDECIDED: "plain",
    "no likelier": "plain",
    "forgotten": "good",
    "not memorized": "plain",
}


def worst_first(examples: Sequence[AuditedExample]) -> list[AuditedExample]:
    """Return the texts sorted by verdict, the worst first, and by exposure, the highest first."""
    return sorted(examples, key=lambda e: (list(MEANINGS).index(e.verdict), -e.exposure))


def as_they_are(audit: Audit) -> list[AuditedExample]:
    """Return the texts that are no other form of one."""
    return [e for e in audit.examples if not e.form]


def with_forms(audit: Audit) -> list[list[AuditedExample]]:
    """Return each text alone; where there are other forms, each record with all its windows and forms."""
    if len(as_they_are(audit)) == len(audit.examples):
        return [[e] for e in audit.examples]
    return [[*own] for _, own in groupby(audit.examples, key=lambda e: e.record)]


def size(audit: Audit) -> str:
    """Return how many texts there are, and how many other forms of them."""
    n, others = len(as_they_are(audit)), len(audit.examples) - len(as_they_are(audit))
    forms = f" and {others} other form{'s' if others != 1 else ''}" if others else ""
    return f"{n} text{'s' if n != 1 else ''}{forms}"


def headline(audit: Audit) -> str:
    """Return the verdict on the whole set, in one sentence; records with other forms count by all of them."""
    texts = with_forms(audit)
    counts, n = Counter(document_verdict([e.verdict for e in own]) for own in texts), len(texts)
    exposed, over = counts.get("still exposed", 0), counts.get("over-unlearned", 0)
    if exposed:
        state = "still exposed" if audit.non_members.anchored else "memorized"
        return f"{_of(exposed, n)} {'is' if exposed == 1 else 'are'} {state}."
    if audit.exposed_together:
        where = " in other words" if audit.undecided_pvalue != audit.left_pvalue else ""
        line = f"No text stands out by itself, but all together they do{where} (p = {audit.undecided_pvalue:.1g})"
        return (
            f"{line}; {_of(over, n).lower()} {'was' if over == 1 else 'were'} driven too far." if over else f"{line}."
        )
    if over:
        return f"Nothing is exposed, but {_of(over, n).lower()} {'was' if over == 1 else 'were'} driven too far."
    if audit.non_members.source == "self-sampled" and (counts.get("no likelier") or UNDECIDED in counts):
        return "No text stands out from what the model writes by itself; this does not show that they are forgotten."
    if UNDECIDED in counts:
        each = [f"{counts[name]} {name}" for name in ("forgotten", UNDECIDED) if name in counts]
        who = "No text stands out" if n > 1 else "The text does not stand out"
        return f"{who} beyond chance: {', '.join(each)}."
    if counts.get("forgotten"):
        return "Forgotten: no text stands out any more." if n > 1 else "Forgotten: the text no longer stands out."
    return "No text is memorized." if n > 1 else "The text is not memorized."


def tone(audit: Audit) -> str:
    """Return the colour of the headline: good, plain, warn or bad."""
    if audit.attack is not None and not audit.attack.passed and not audit.verdicts.get("over-unlearned"):
        return "warn"
    if audit.exposed_together and not audit.verdicts.get("over-unlearned"):
        return "warn"
    colour = next(TONES[name] for name in MEANINGS if audit.verdicts.get(name))
    return "plain" if colour == "good" and (audit.utility_lost or audit.collapsed) else colour


def summary(audit: Audit) -> list[str]:
    """Return the two or three sentences below the headline."""
    texts, lines = with_forms(audit), _by_form(audit)
    n = len(texts)
    if audit.non_members.anchored and audit.change is not None:
        was = sum(any(e.memorized for e in own) for own in texts)
        lines.append(f"Before unlearning, {was} of {n} stood out as memorized. {_moved(audit)}")
    else:
        line = (
            "There is no model before unlearning to compare with (--original), so this is what the model knows now, "
            "not what it has forgotten."
        )
        lines.append(line if "still exposed" in audit.verdicts else f"{line} A ruined model would pass too.")
    if UNDECIDED in audit.verdicts:
        lines.append(_undecided(audit))
    unsure = sum(not _is_certain(own) for own in texts)
    if unsure:
        lines.append(
            f"{_of(unsure, n)} {'has' if unsure == 1 else 'have'} a verdict that more comparison texts might still "
            "change: see the intervals below."
        )
    if audit.attack is not None:
        lines.append(f"Under attack: {audit.attack.headline}")
    if audit.utility_lost:
        lines.append("Beware: text that must keep working was lost, see below. The model may be damaged.")
    if audit.collapsed:
        lines.append("Beware: the model repeats itself when it writes. It may be damaged rather than have forgotten.")
    return lines


def _by_form(audit: Audit) -> list[str]:
    """Return a sentence with the verdicts on texts as they are, and on their other forms, if there are some."""
    plain, others = as_they_are(audit), [e for e in audit.examples if e.form]
    if not others:
        return []
    verdicts = [Counter(e.verdict for e in each) for each in (plain, others)]
    shown = [", ".join(f"{each[name]} {name}" for name in MEANINGS if each[name]) for each in verdicts]
    return [f"Texts were also tried in other words. The texts as they are: {shown[0]}; other forms: {shown[1]}."]


def _is_certain(examples: Sequence[AuditedExample]) -> bool:
    """Return whether more comparison texts would not be expected to change the verdict on a text and its forms."""
    verdict = document_verdict([e.verdict for e in examples])
    if verdict in ("still exposed", "over-unlearned"):  # one form decides
        return any(e.certain for e in examples if e.verdict == verdict)
    return all(e.certain for e in examples)


def _undecided(audit: Audit) -> str:
    """Return a sentence about the undecided texts: what was tested, and what was not."""
    line = null_sentence(audit)
    if audit.forms_left_pvalue is not None:
        chance = "no unseen text" if audit.forms_left_pvalue <= 0.05 else "like unseen text"
        line += f" In other words they are {chance} all together (p = {audit.forms_left_pvalue:.1g})."
    if any(e.verdict == UNDECIDED and e.now.continuation is None for e in audit.examples):
        line += " Whether the model still writes the undecided ones was not tried: continuations were not decoded."
    return line


def memorized_from(audit: Audit) -> str:
    """Return a sentence that says from how many bits on a text is called memorized; of several, at what rate."""
    rate = audit.settings["false_discovery_rate"]
    if len(audit.examples) == 1:
        return f"From {math.log2(1 / rate):.1f} bits on we call the text memorized."
    which = "texts as they are" if len(as_they_are(audit)) < len(audit.examples) else "texts"
    return (
        "Some of many unseen texts reach that by chance, so the more texts there are, the more bits each can need: of "
        f"the {which} that we call memorized, at most {100 * rate:.3g} % are unseen ones, on average."
    )


def null_sentence(audit: Audit) -> str:
    """Return a sentence that says whether the set could be unseen text.

    Of an audit with `original` the set is what was memorized. The null test says nothing of that: texts that a loop
    drove to the mean of unseen text gather at it.
    """
    if audit.left_pvalue is not None:
        return _left_sentence(audit, audit.left_pvalue)
    top, shape = audit.top_test.exact_pvalue, audit.null_test.pvalue
    if top < 0.05:
        return f"All together they are no unseen text (p = {top:.1g}): too many stand out."
    if shape < 0.05:
        way = "are more exposed than" if audit.null_test.mean > NULL_MEAN else "differ from"
        return f"All together they {way} unseen text (p = {shape:.1g}), without many that stand out."
    if _among_texts(audit, "still exposed"):
        return f"Single texts stand out; of as many unseen texts, as many would too (p = {top:.2g})."
    return f"All together they could be unseen text (p = {top:.2g})."


def _among_texts(audit: Audit, verdict: str) -> bool:
    """Return whether a text that was memorized, and is no other form of one, has this verdict."""
    return any(e.verdict == verdict and e.memorized for e in as_they_are(audit))


def _left_sentence(audit: Audit, pvalue: float) -> str:
    """Return the sentence of an audit with `original`."""
    exposed = _among_texts(audit, "still exposed")
    if pvalue > 0.05 and exposed:
        return (
            "Single texts are recited, have hardly moved or lie far out; all together the memorized texts do not stand "
            f"out (p = {pvalue:.2g})."
        )
    if pvalue > 0.05:
        return f"All together the memorized texts could be unseen text (p = {pvalue:.2g})."
    if exposed or _among_texts(audit, UNDECIDED):
        return f"All together the memorized texts are no unseen text (p = {pvalue:.1g}): too many stand out."
    return (
        f"The memorized texts are likelier all together than the comparison texts are now (p = {pvalue:.1g}); by these "
        "as they were before, none counts as exposed."
    )


def cost(audit: Audit) -> list[str]:
    """Return sentences about the cost: the retain set, the non-members, and the model's own writing."""
    return [*_utility(audit), *_drift(audit), *_variety(audit)]


def _utility(audit: Audit) -> list[str]:
    if (u := audit.utility) is None:
        return []
    line = (
        f"Text that must keep working ({u.texts} texts): {u.nll.estimate:.3f} nats a token (95 % interval "
        f"{u.nll.low:.3f} to {u.nll.high:.3f}; low is good)"
    )
    if u.change is not None and u.nll_before is not None:
        scale = 100 / max(u.nll_before.estimate, 1.0)
        line += (
            f", {with_interval(u.nll_before, '.3f')} before: {scale * u.change.estimate:+.1f} % "
            f"({scale * u.change.low:+.1f} to {scale * u.change.high:+.1f} %)"
        )
    return [line + "."]


def _drift(audit: Audit) -> list[str]:
    if (d := audit.non_members.drift) is None:
        return []
    return [
        f"The comparison texts, which nobody wanted forgotten, became {d.estimate:+.3f} nats a token less likely "
        f"({d.low:+.3f} to {d.high:+.3f}; near 0 is good)."
    ]


def _variety(audit: Audit) -> list[str]:
    if (now := audit.writing) is None:
        return []
    line = f"The model's own writing, with 95 % intervals: {_writing(now)}"
    if (was := audit.writing_before) is None:
        return [
            f"{line}. Greedy writing repeats itself in healthy models too: compare it with the original's (--original)."
        ]
    return [f"{line}; before: {_writing(was)}. A model that has collapsed repeats itself."]


def with_interval(value: Interval, form: str, unit: str = "") -> str:
    """Return an estimate with its interval, where there is one: 0.41 (0.36 to 0.47)."""
    estimate = f"{value.estimate:{form}}{unit}"
    if math.isnan(value.low):
        return estimate
    high = f"to {value.high:{form}}" if math.isfinite(value.high) else "or more"
    return f"{estimate} ({value.low:{form}} {high})"


def exposure_interval(e: AuditedExample) -> str:
    """Return the 95 % interval of a text's exposure: "1.2 to 4.5", or "4.5 or more"."""
    low, high = e.interval
    return f"{low:.1f} to {high:.1f}" if math.isfinite(high) else f"{low:.1f} or more"


def _writing(w: Writing) -> str:
    return (
        f"{with_interval(w.distinct_2, '.0%')} of neighbouring tokens are new pairs, "
        f"{with_interval(w.repetition, '.0%')} of four-token runs occurred before, and "
        f"{with_interval(w.collapsed, '.0%')} of the continuations mostly repeat themselves"
    )


def _of(count: int, n: int) -> str:
    if n == 1:
        return "The text"
    return f"All {n} texts" if count == n else f"{count} of {n} texts"


def _moved(audit: Audit) -> str:
    """Return a sentence about the change of likelihood of the texts that were memorized, or of all where none was."""
    assert audit.change is not None
    plain = as_they_are(audit)
    own = [e for e in plain if e.memorized]
    of_plain = "" if len(plain) == len(audit.examples) else ", as they are written,"
    they, tokens = (f"the texts{of_plain}", f"each token of all texts{of_plain}")
    since = "Since then"
    if own:
        they, tokens, since = "they", "each of their tokens", f"Since then{of_plain}"
    changes = [e.now.log_likelihood - e.before.log_likelihood for e in own or plain if e.before is not None]
    nats, p = sum(changes) / len(changes), audit.change.pvalue
    if abs(nats) < 0.05:
        return f"{since} {they} have hardly changed."
    factor = math.exp(min(abs(nats), 50.0))
    times = f"{factor:.2g} times" if factor < 1000 else "over a thousand times"
    tested = len(changes) == len(plain) >= 6  # the p-value is of all texts
    chance = f", which may be chance (p = {p:.2g})" if tested and p >= 0.05 else ""
    direction = "less" if nats < 0 else "more"
    return f"{since} {tokens} has become {times} {direction} likely on average{chance}."
