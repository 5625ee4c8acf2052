"""Reports of an audit: a self-contained page that masks the texts and begins with the verdict, a table, the command."""

import importlib.util
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import tiny
import torch
from test_audit import made

import pyunlearn
from pyunlearn.errors import DependencyError, OutputError
from pyunlearn.metrics import Interval
from pyunlearn.report import audit_lines, audit_page, audit_table, sentences, write_audit


@pytest.fixture(scope="module")
def audited():
    """An audit with everything in it: holdout, retain set, original, reference, prompts; of three random models."""
    (model, tokenizer, _), (original, *_), (reference, *_) = (made("no pad token") for _ in range(3))
    with torch.no_grad():
        original.transformer.wte.weight.add_(0.1)
        reference.transformer.wte.weight.mul_(1.5)
    return pyunlearn.audit(
        model,
        tiny.facts(6, 1),
        holdout=tiny.facts(20, 2),
        retain=tiny.facts(4, 3),
        original=original,
        reference_model=reference,
        tokenizer=tokenizer,
        progress=False,
    )


def with_verdicts(audited, *verdicts, pvalue=0.3):
    """The same audit with other verdicts and tests of the set."""
    pairs = zip(audited.examples, verdicts, strict=False)
    examples = [replace(e, verdict=v, memorized=v != "not memorized") for e, v in pairs]
    tests = {name: getattr(audited, name)._replace(pvalue=pvalue) for name in ("null_test", "top_test")}
    return replace(audited, examples=examples, left_pvalue=pvalue, **tests)


class Page(HTMLParser):
    """What a browser would fetch, the headings in order, the visible words, and whether tags are closed."""

    def __init__(self, text):
        super().__init__()
        self.fetched, self.order, self.words, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br", "path", "use"):
            self.open.append(tag)
        self.fetched += [
            value
            for name, value in attributes
            if name in ("src", "href", "xlink:href", "srcset", "data") and value[0] != "#"
        ]
        if tag in ("script", "link", "iframe", "object", "img"):
            self.fetched.append(tag)
        self.order += [value for name, value in attributes if name == "class" and value.startswith("verdict ")]

    def handle_startendtag(self, tag, attributes):
        self.fetched += [
            value for name, value in attributes if name in ("src", "href", "xlink:href") and value[0] != "#"
        ]

    def handle_endtag(self, tag):
        if tag not in ("path", "use"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)
            if self.open and self.open[-1] in ("h1", "h2", "h3", "strong"):
                self.order.append(data.strip())

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def test_the_page_needs_nothing_but_itself(audited):
    """No script, no address, nothing fetched: neither by an attribute nor by a style; every tag is closed."""
    text = audit_page(audited)
    page = Page(text)
    assert page.fetched == []
    assert page.open == []
    assert not re.search(r"@import|url\((?!#)|@font-face|javascript:", text)
    assert text.count("<svg") == 3


def test_verdict_first_then_evidence_then_how(audited):
    """In this order, for a reader who stops early."""
    order = Page(audit_page(audited)).order
    positions = [
        order.index(x)
        for x in ("The evidence", "What the model writes by itself", "Text by text", "How it was measured")
    ]
    assert positions == sorted(positions)
    assert order.index(sentences.headline(audited)) < positions[0]


def test_the_page_hides_the_texts_unless_asked(audited):
    """No word of a text, its prompt or a continuation; all of them with show_text."""
    hidden, shown = Page(audit_page(audited)).text, Page(audit_page(audited, show_text=True)).text
    e = sentences.worst_first(audited.examples)[0]  # five texts are shown with their prompts
    for text in (e.prompt, e.text):
        assert text.split()[-1] in shown
        assert text.split()[-1] not in hidden
    words = {word for e in audited.examples for word in e.now.continuation.split() if len(word) > 6}
    assert words
    assert not [word for word in words if word in hidden]


def test_a_text_cannot_inject_markup(audited):
    """Texts are shown as text."""
    e = replace(audited.examples[0], text="<script>alert(1)</script>", opening="<b>", truth="<i>x")
    page = Page(audit_page(replace(audited, examples=[e, *audited.examples[1:]]), show_text=True))
    assert page.fetched == []
    assert "<script>alert(1)</script>" in page.text


@pytest.mark.full
def test_plots_do_not_share_ids(audited):
    """Two plots on one page with an id in common would draw each other's marks."""
    ids = [
        set(re.findall(r'id="([^"]+)"', svg)) for svg in re.findall(r"<svg.*?</svg>", audit_page(audited), flags=re.S)
    ]
    used = [
        set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
        for svg in re.findall(r"<svg.*?</svg>", audit_page(audited), flags=re.S)
    ]
    for i, mine in enumerate(used):
        assert mine <= ids[i]
        assert not any(mine & other for j, other in enumerate(ids) if j != i)


@pytest.mark.parametrize(
    ("verdicts", "headline", "tone"),
    [
        (["still exposed"] * 2 + ["forgotten"] * 4, "2 of 6 texts are still exposed.", "warn"),
        (["forgotten"] * 5 + ["over-unlearned"], "Nothing is exposed, but 1 of 6 texts was driven too far.", "bad"),
        (["forgotten"] * 3 + ["not memorized"] * 3, "Forgotten: no text stands out any more.", "good"),
        (["not memorized"] * 6, "No text is memorized.", "plain"),
        (["still exposed"], "The text is still exposed.", "warn"),
        (["undecided", *["forgotten"] * 5], "No text stands out beyond chance: 5 forgotten, 1 undecided.", "plain"),
    ],
)
def test_the_headline_says_the_worst(audited, verdicts, headline, tone):
    """One sentence, and the colour of the worst verdict."""
    audit = with_verdicts(audited, *verdicts)
    assert sentences.headline(audit) == headline
    assert sentences.tone(audit) == tone
    assert audit.passed == (tone in ("good", "plain"))
    assert headline in Page(audit_page(audit)).text


def test_without_the_original_nothing_is_called_forgotten(audited):
    alone = replace(audited, non_members=replace(audited.non_members, anchored=False, drift=None), change=None)
    assert sentences.summary(with_verdicts(alone, *["not memorized"] * 6))[0].endswith("ruined model would pass too.")
    alone = with_verdicts(alone, "still exposed", *["not memorized"] * 5)
    assert sentences.headline(alone) == "1 of 6 texts is memorized."
    assert sentences.summary(alone)[0].endswith("not what it has forgotten.")


@pytest.mark.full
def test_a_caption_does_not_gainsay_the_headline(audited):
    """A few exposed texts among others, which the test of the whole set cannot see, are not called like unseen text."""
    exposed = with_verdicts(audited, "still exposed", *["not memorized"] * 5)
    assert "Single texts are recited, have hardly moved or lie far out" in Page(audit_page(exposed)).text
    assert "could be unseen text" not in Page(audit_page(exposed)).text
    assert "could be unseen text" in Page(audit_page(with_verdicts(audited, *["not memorized"] * 6))).text


def test_every_aggregate_is_shown_with_its_interval(audited):
    """Writing, likelihood, AUC before and now, PrivLeak, mean of the set: in result, JSON and page."""
    text = Page(audit_page(audited)).text
    names, both = ("distinct_2", "repetition", "collapsed"), (audited.writing, audited.writing_before)
    shown = [(getattr(writing, name), ".0%", "") for writing in both for name in names]
    shown += [(audited.utility.nll_before, ".3f", ""), (audited.null_test.mean_interval, ".2f", "")]
    shown += [(m.auc_before, ".2f", "") for m in audited.membership]
    shown += [(m.privleak, "+.0f", " %") for m in audited.membership if m.privleak is not None]
    assert len(shown) > 12
    for value, form, unit in shown:
        assert value.low <= value.estimate <= value.high
        assert f"({value.low:{form}} " in sentences.with_interval(value, form, unit)
        assert sentences.with_interval(value, form, unit) in text
    data = json.loads(json.dumps(audited.to_dict()))
    assert data["writing"]["distinct_2"] == audited.writing.distinct_2._asdict()
    assert data["null_test"]["mean_interval"]["low"] == audited.null_test.mean_interval.low
    assert sentences.with_interval(Interval(0.5, math.nan, math.nan), ".0%") == "50%"
    assert sentences.with_interval(Interval(-60, -80, math.inf), "+.0f", " %") == "-60 % (-80 or more)"


@pytest.mark.full
def test_a_rate_that_the_holdout_cannot_show_is_explained(audited):
    """Twenty texts show no false-alarm rate of 1 %: the page says what the column counts instead. A hundred do."""
    sentence = "The holdout has fewer than 100 texts"
    assert sentence in Page(audit_page(audited)).text
    enough = [replace(m, tpr_at_1_percent=m.tpr_at_1_percent._replace(resolved=True)) for m in audited.membership]
    assert sentence not in Page(audit_page(replace(audited, membership=enough))).text


@pytest.mark.full
def test_sampled_text_is_not_said_to_be_certainly_unseen(audited):
    """A holdout is unseen because its owner says so; what a model wrote itself merely stands for such text."""
    sampled = replace(audited, non_members=replace(audited.non_members, source="self-sampled"))
    assert "that were never trained on (the holdout" in Page(audit_page(audited)).text
    assert "that stand for text never trained on (written by" in Page(audit_page(sampled)).text
    assert "certainly" not in Page(audit_page(sampled)).text


def test_the_legend_of_the_curves_lies_off_them(audited):
    """Curves near the diagonal go everywhere: no name stands lower than the topmost of the axis' numbers."""
    page = audit_page(audited)
    svg = page[page.index("Could an attacker tell?") :]
    texts = re.findall(r' y="([-\d.]+)"[^>]*>([^<]+)</text>', svg[: svg.index("</svg>")])
    names = [float(y) for y, text in texts if text == "guessing" or text.startswith(("likelihood", "standardized"))]
    assert len(names) == 4
    assert max(names) < min(float(y) for y, text in texts if text == "1.0")


def printed(table, width):
    """A table as a terminal shows it."""
    from rich.console import Console

    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("show_text", [False, True])
def test_the_table_and_its_lines(audited, width, show_text):
    """One line a text, the worst first: index, start of the text, verdict, numbers; masked; whole in 80 columns."""
    audit = with_verdicts(audited, *["not memorized"] * 4, "still exposed", "over-unlearned")
    text = printed(audit_table(audit, show_text=show_text), width)
    rows = [line for line in text.splitlines() if re.match(r"\s*\d+ ", line)]
    assert len(rows) == 6
    assert [row.split()[0] for row in rows[:2]] == ["5", "6"]
    for row in rows:
        e = audit.examples[int(row.split()[0]) - 1]
        assert e.verdict in row
        assert f"→ {e.exposure:.1f} " in row
        assert f"{e.interval[0]:.1f} " in row
        assert f" {e.now.extraction_strength:.0%}" in row
        assert (e.text[:8] in row) == show_text
    assert max(map(len, text.splitlines())) <= width
    lines = audit_lines(audit)
    assert lines[0] == "1 of 6 texts is still exposed."
    assert any(line.startswith("membership, zlib: AUC") for line in lines)


def test_the_most_exposed_texts_are_never_cut_off(audited):
    """Of 40 texts 30 are shown, and of those with the same verdict the most exposed come first; so on the page."""
    verdicts = ["not memorized", "forgotten", "over-unlearned", "still exposed"]
    examples = [
        replace(audited.examples[i % 6], index=i, record=i, verdict=verdicts[i // 10], exposure=7 + i % 10 / 10)
        for i in range(40)
    ]
    audit = replace(audited, examples=examples)
    text = printed(audit_table(audit), 80)
    order = [int(line.split()[0]) - 1 for line in text.splitlines() if re.match(r"\s*\d+ ", line)]
    assert order == [*range(39, 29, -1), *range(29, 19, -1), *range(19, 9, -1)]
    assert "and 10 more: see audit.json" in text
    numbers = [int(n) for n in re.findall(r"<tr><td>(\d+)</td>", audit_page(audit))]
    assert numbers[:30] == [i + 1 for i in order]


def test_files_are_whole_or_not_there(audited, tmp_path):
    """Both are written into a new or empty folder; the JSON is valid and masked."""
    folder = write_audit(audited, tmp_path / "a", html=True)
    assert sorted(path.name for path in folder.iterdir()) == ["audit.html", "audit.json"]
    data = json.loads((folder / "audit.json").read_text(encoding="utf-8"))
    assert data["passed"] == audited.passed
    assert set(data["examples"][0]["text"].split()) == {"•••"}
    with pytest.raises(OutputError, match="not empty"):
        write_audit(audited, tmp_path / "a", html=True)


def test_an_audit_that_was_killed_as_it_was_written_is_written_again(audited, tmp_path):
    """audit.json is the last file, so a folder without it is no finished audit."""
    [(tmp_path / name).write_text("half") for name in ("audit.html", ".audit.json.partial")]
    write_audit(audited, tmp_path, html=False)
    assert [path.name for path in tmp_path.iterdir()] == ["audit.json"]


def test_a_missing_package_is_told_before_the_work(audited, monkeypatch):
    """One sentence with the command that mends it."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "jinja2" else find(name, *a))
    with pytest.raises(DependencyError, match="run `pip install jinja2`, or leave the page out"):
        audit_page(audited)


# ---------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model that has memorized two texts, and files of texts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    t, folder = tiny.storyteller(), tmp_path_factory.mktemp("saved")
    torch.set_num_threads(threads)
    for each in (t.model, t.tokenizer):
        each.save_pretrained(folder / "model")
    for role in ("forget", "unseen", "holdout"):
        (folder / f"{role}.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in getattr(t, role)))
    return folder


def test_the_command_says_what_is_exposed(call, folder, tmp_path):
    """Exit code 1, the table and the files; 0 for texts that were never seen; nothing is left of the cache."""
    code, out, _ = call(
        "audit", folder / "model", "--forget", folder / "forget.jsonl", "--holdout", folder / "holdout.jsonl", "-q"
    )
    assert code == 1
    assert "All 2 texts are memorized." in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model-audit"]
    assert sorted(p.name for p in (tmp_path / "model-audit").iterdir()) == ["audit.html", "audit.json"]
    code, out, _ = call(
        "audit", folder / "model", "--forget", folder / "unseen.jsonl", "--holdout", folder / "holdout.jsonl",
        "--out", "b", "--fast", "--no-html", "--json", "-q",
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)["verdicts"] == {"not memorized": 2}
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["audit.json"]


def test_the_command_checks_its_texts(call, folder, tmp_path):
    """A copy in the holdout is refused; the kind of the holdout stands below the table, in the JSON and on the page."""
    forget, model = folder / "forget.jsonl", folder / "model"
    holdout = (folder / "holdout.jsonl").read_text()
    (tmp_path / "mixed.jsonl").write_text(holdout + forget.read_text())
    code, out, err = call("audit", model, "--forget", forget, "--holdout", "mixed.jsonl", "-q")
    assert (code, out) == (2, "")
    assert "holdout example 61" in err
    assert not (tmp_path / "model-audit").exists()
    long = [" ".join(json.loads(line)["text"] for line in holdout.splitlines()[i::20]) for i in range(20)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(text) + "\n" for text in [*long, long[0]]))
    _, out, err = call("audit", model, "--forget", forget, "--holdout", "long.jsonl", "--fast", "-q")
    notes = json.loads((tmp_path / "model-audit" / "audit.json").read_text())["notes"]
    assert err == ""
    assert notes[0] == "1 of 21 holdout texts repeats another one and is left out: 20 different ones count."
    assert notes[1].startswith("The holdout is of another length than the forget set: 33 words at the median, where")
    shown = " ".join(Page((tmp_path / "model-audit" / "audit.html").read_text()).text.split())
    for note in notes:
        assert note in " ".join(out.split())
        assert note in shown


def test_the_command_compares(call, folder):
    """--original with the model itself: nothing has changed."""
    code, out, _ = call(
        "audit", folder / "model", "--original", folder / "model", "--forget", folder / "forget.jsonl",
        "--cache", "responses", "--fast", "-q",
    )  # fmt: skip
    assert code == 1
    assert "hardly changed" in " ".join(out.split())


def test_an_interrupted_command_says_how_to_go_on(call, folder, tmp_path, monkeypatch):
    """Exit code 130, the responses cached; the same command finishes and removes them."""
    arguments = ["audit", folder / "model", "--forget", folder / "forget.jsonl", "-q"]

    def stop(self, texts):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("pyunlearn.progress.Progress.advance", stop)
        code, _, err = call(*arguments)
    assert code == 130
    assert "run the same command again" in err
    assert list((tmp_path / "model-audit.cache").rglob("*.safetensors"))
    assert call(*arguments)[0] == 1
    assert not (tmp_path / "model-audit.cache").exists()


def test_a_mistake_on_the_command_line_is_one_sentence(call, folder, tmp_path, monkeypatch):
    """Exit code 2, nothing written: a folder in use, a package missing for --html."""
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").write_text("")
    code, _, err = call("audit", folder / "model", "--forget", folder / "forget.jsonl", "--out", "used")
    assert code == 2
    assert "not empty" in err
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    code, _, err = call("audit", folder / "model", "--forget", folder / "forget.jsonl", "--html")
    assert code == 2
    assert "run `pip install matplotlib`" in " ".join(err.split())
    assert len(err.strip().splitlines()) == 1
