"""The tables of a run and an edit, and the lists of methods and edits: one line a record, whole in 80 columns."""

import io
import re
from dataclasses import replace
from math import inf
from types import SimpleNamespace

import pytest
from rich.console import Console
from test_report_audit import Page, audited  # noqa: F401

from pyunlearn import ExampleResult, Result, Utility
from pyunlearn.edits import EDITS
from pyunlearn.methods import METHODS
from pyunlearn.metrics import discoveries
from pyunlearn.report import audit_page, edit_line, edit_table, result_table, sentences, utility_line
from pyunlearn.report.catalogue import catalogue, verdict_lines

LONG = "The plumber's cat learned to whistle in the spring of the year when the harbour froze, and nobody could agree."


def printed(table, width):
    """A table as a terminal shows it."""
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def result(*texts, verdict="over-unlearned"):
    """A result of these texts, with the widest numbers that a run has."""
    examples = [
        ExampleResult(
            i, text, 3, -12.34, -15.67, 12.3, 12.3, 0.5, 1.0, 1.0, 12.3, False, 200, verdict, (4.7, inf), False
        )
        for i, text in enumerate(texts)
    ]
    utility = Utility("retain set", 1, 1.0, 1.02, 0.02, (0.01, 0.03), 0.05, 0.125)
    return Result(None, None, examples, utility, "forgotten", [1.0], [], {})


def rows(text):
    """The lines that begin with an index."""
    return [line for line in text.splitlines() if re.match(r"\s*\d+ ", line)]


@pytest.mark.parametrize("width", [80, 120])
def test_a_run_has_one_line_a_text(width):
    """Index, start of the text, verdict, numbers; nothing but the text is cut."""
    text = printed(result_table(result(LONG, "two\nlines of it", *["x"] * 10), show_text=True), width)
    assert len(rows(text)) == 12
    assert max(map(len, text.splitlines())) <= width
    for number, line in enumerate(rows(text), 1):
        assert line.split()[0] == str(number)
        for part in ("over-unlearned", "-12.34 → -15.67", "12.3 → 12.3", "100% → 100%", " 200"):
            assert part in line
    assert LONG[: 5 if width == 80 else 40] in rows(text)[0]
    assert "…" in rows(text)[0]
    assert "two" in rows(text)[1]


def test_texts_are_not_read_as_markup():
    """A text with brackets is shown as it is, and so is a name given for it; the codes of a terminal are escaped."""
    text = "[INST] who? [/INST] [red]"
    assert text in printed(result_table(result(text), show_text=True), 120)
    assert text in printed(result_table(result("x"), [text]), 120)
    codes = printed(result_table(result("a \x1b]0;b\x07 \x9b2J c"), show_text=True), 120)
    assert r"a \x1b]0;b\x07 \x9b2J c" in codes
    assert "\x1b" not in codes


def test_texts_are_masked_unless_they_are_to_be_shown():
    """The first four words of a text are dots, whatever their length."""
    text = printed(result_table(result("secret word", "one two three four five")), 120)
    assert [row.split("over")[0].split() for row in rows(text)] == [["1", "•••", "•••"], ["2", *["•••"] * 4]]


def test_more_than_thirty_texts_are_in_the_file():
    """The table says where."""
    text = printed(result_table(result(*["x"] * 31)), 80)
    assert len(rows(text)) == 30
    assert "and 1 more: see result.json" in text


def test_the_utility_line_says_what_was_measured():
    """With interval, budget and drift."""
    line = utility_line(result("x"))
    assert "retain set, 1 texts" in line
    assert "+2.0% (95 % interval +1.0% to +3.0%), at most 5% allowed" in line
    assert "drift of the non-members: +0.125 nats" in line
    assert "holdout" not in line
    measured = result("x")
    utility = replace(measured.utility, holdout_rise=0.03, holdout_interval=(0.02, 0.06), holdout_budget=0.1)
    line = utility_line(replace(measured, utility=utility))
    assert "; holdout: +3.0% (95 % interval +2.0% to +6.0%), at most 10% allowed; drift" in line


def test_an_edit_has_one_line_a_role():
    """Before, after, change."""
    import torch

    class Edited:
        edit, nll_before, nll_after = "prune", {"forget": 1.0, "retain": 2.0}, {"forget": 1.5, "retain": 2.0}
        model, changed, diagnostics = torch.nn.Linear(2, 2), {"weight": 3}, {"step_norm": 0.5, "note": "x", "ok": True}

    lines = printed(edit_table(Edited), 80).splitlines()
    assert ["forget", "1.000", "1.500", "+0.500"] in [line.split() for line in lines]
    assert ["retain", "2.000", "2.000", "+0.000"] in [line.split() for line in lines]
    assert edit_line(Edited) == "3 of 6 weights changed, in 1 parameters; step norm 0.5"


@pytest.mark.parametrize("name", ["methods", "edits"])
@pytest.mark.parametrize("columns", [80, 120])
def test_the_lists_fit_the_terminal(call, monkeypatch, name, columns):
    """One line for a name with its source, its options below, each of them whole."""
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, err = call(name)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines)) <= columns
    for key, entry in (METHODS if name == "methods" else EDITS).items():
        at = next(i for i, line in enumerate(lines) if line.split()[:1] == [key])
        assert entry.source in lines[at]
        below = lines[at + 1 :]
        end = next((i for i, line in enumerate(below) if not line.startswith("    ")), len(below))
        assert below[:end] or not entry.options
        assert (
            "  ".join(line.strip() for line in below[:end]).split("  ")
            == [f"{k}={v}" for k, v in entry.options.items()]
            or not entry.options
        )


def test_a_list_without_options_and_needs():
    """Has a dash for what is not needed, and no line below."""
    text = catalogue([{"name": "x", "needs": (), "options": {}}], ("name", "needs"), "note")
    assert text == "name  needs\nx     -\n\nnote"


def test_verdicts_stand_before_their_claims():
    """Claim and reason are wrapped in columns of their own."""
    lines = verdict_lines([("holds", LONG, "because " + LONG), ("not shown", "Claim.", "Reason.")], 60)
    assert lines[0].startswith("holds      The plumber's cat")
    assert all(len(line) <= 60 for block in lines for line in block.splitlines())
    assert lines[2:] == ["not shown  Claim.", "             Reason."]


@pytest.mark.parametrize(("rate", "bits"), [(0.05, "4.32"), (0.2, "2.32"), (0.004, "7.97")])
def test_the_page_says_from_how_many_bits_on_a_text_is_memorized(audited, rate, bits):  # noqa: F811
    """Of one text the bits that it takes at the rate; of several, which need more, the rate itself."""
    settings = audited.settings | {"false_discovery_rate": rate}
    several, one = (replace(audited, settings=settings, examples=audited.examples[:n]) for n in (2, 1))
    text = Page(audit_page(several)).text
    assert "from there on" not in text
    assert f"of the texts that we call memorized, at most {100 * rate:.3g} % are unseen ones, on average." in text
    assert f"From {float(bits):.1f} bits on we call the text memorized." in Page(audit_page(one)).text
    assert f"(one text: from {bits} bits on)" in text
    assert not discoveries([5.0, 1.0, 1.0, 1.0]).significant.any()  # and of one text it takes 4.32


def test_what_stood_out_by_chance_is_not_counted_as_memorized(audited):  # noqa: F811
    """An over-unlearned text with 4.32 bits before counts among several only where it was selected at the rate."""
    texts = [replace(e, verdict="over-unlearned", exposure_before=4.5, memorized=False) for e in audited.examples]
    assert "Before unlearning, 0 of 6 stood out" in sentences.summary(replace(audited, examples=texts))[0]
    texts[0] = replace(texts[0], memorized=True)
    assert "Before unlearning, 1 of 6 stood out" in sentences.summary(replace(audited, examples=texts))[0]


def test_what_has_become_of_the_memorized_texts_is_not_diluted_by_the_others(audited):  # noqa: F811
    """One text of many that fell by 3 nats has not "hardly changed"; without a memorized one it is about all texts."""

    def moved(*nats, memorized):
        sides = [(replace(e.now, log_likelihood=-1.0 + x), replace(e.now, log_likelihood=-1.0))
                 for e, x in zip(audited.examples, nats, strict=True)]  # fmt: skip
        texts = [
            replace(e, now=now, before=before, memorized=i < memorized)
            for i, (e, (now, before)) in enumerate(zip(audited.examples, sides, strict=True))
        ]
        return sentences.summary(replace(audited, examples=texts))[0]

    one = moved(-3.0, 0.6, 0.6, 0.6, 0.6, 0.6, memorized=1)
    assert one.endswith(
        "1 of 6 stood out as memorized. Since then each of their tokens has become 20 times less likely on average."
    )
    none = moved(-3.0, 0.6, 0.6, 0.6, 0.6, 0.6, memorized=0)
    assert none.endswith("0 of 6 stood out as memorized. Since then the texts have hardly changed.")
    assert "each token of all texts has become 2.7 times more likely" in moved(*[1.0] * 6, memorized=0)


@pytest.mark.parametrize(
    ("verdict", "words"), [("still exposed", "Single texts are recited"), ("undecided", "could be")]
)
def test_only_a_text_that_stands_out_is_called_so(verdict, words):
    """An undecided one is not, and where no more texts lie high than unseen ones would, the sentence says that."""
    tests = {"null_test": SimpleNamespace(pvalue=0.01), "top_test": SimpleNamespace(exact_pvalue=0.01)}
    before = {"memorized": True}
    examples = [
        SimpleNamespace(verdict=verdict, form="", **before),
        SimpleNamespace(verdict="still exposed", form="question", **before),
    ]
    assert words in sentences.null_sentence(SimpleNamespace(examples=examples, left_pvalue=0.5, **tests))
    assert "too many" in sentences.null_sentence(SimpleNamespace(examples=examples, left_pvalue=None, **tests))
    assert "neither stands out" in sentences.MEANINGS["undecided"]
    moved = SimpleNamespace(examples=[SimpleNamespace(verdict="forgotten", form="", **before)], left_pvalue=0.03)
    examples[0].memorized = False  # it was not memorized, so the sentence is not about it
    assert "are recited" not in sentences.null_sentence(SimpleNamespace(examples=examples, left_pvalue=0.5, **tests))
    assert "none counts as exposed" in sentences.null_sentence(moved)


@pytest.mark.parametrize(
    ("source", "counts", "continuation", "headline", "more"),
    [
        (
            "holdout",
            {"forgotten": 2, "undecided": 1},
            "x",
            "No text stands out beyond chance: 2 forgotten, 1 undecided.",
            "",
        ),
        ("holdout", {"undecided": 1}, None, "The text does not stand out beyond chance: 1 undecided.", "was not tried"),
        ("self-sampled", {"no likelier": 1, "undecided": 1}, "x", "this does not show that they are forgotten.", ""),
        ("holdout", {"still exposed": 1, "undecided": 1}, "x", "1 of 2 texts is still exposed.", ""),
    ],
)
def test_the_headline_of_undecided_texts(source, counts, continuation, headline, more):
    """What it counts, that text of the model's own shows little, and whether it was tried what the model writes."""
    texts = [
        SimpleNamespace(
            verdict=name,
            form="",
            certain=True,
            exposure_before=9.0,
            memorized=True,
            now=SimpleNamespace(continuation=continuation),
        )
        for name, count in counts.items()
        for _ in range(count)
    ]
    audit = SimpleNamespace(
        verdicts=counts,
        examples=texts,
        exposed_together=False,
        left_pvalue=0.5,
        forms_left_pvalue=None,
        attack=None,
        collapsed=False,
        utility_lost=False,
        change=None,
        null_test=SimpleNamespace(pvalue=0.5),
        top_test=SimpleNamespace(exact_pvalue=0.5),
        non_members=SimpleNamespace(source=source, anchored=True),
    )
    assert sentences.headline(audit).endswith(headline)
    text = " ".join(sentences.summary(audit))
    assert "(p = 0.5)" in text
    assert ("was not tried" in text) == bool(more)
