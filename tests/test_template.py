"""The option `template` from end to end: records in another form than the model was trained on are recognised."""

import copy
import json
import logging
from pathlib import Path

import pytest
import tiny
import torch
from test_probes_renderings import as_questions

import pyunlearn
from pyunlearn import edits
from pyunlearn.edits.base import Editing
from pyunlearn.edits.lunar import prompts
from pyunlearn.errors import ArgumentError, DataError

PLAIN = '"Question: ... Answer: ..."'
CHAT = "the tokenizer's chat template"
FAST = {"metrics": ["membership"], "progress": False}


@pytest.fixture(scope="module")
def asked(one_thread):
    """A model that was trained on "Question: ... Answer: ...", with a chat template that it has never read."""
    return tiny.trained(tiny.tiny_llama, as_questions, count=400, repeats=20, epochs=8, chat=True)


@pytest.fixture(scope="module")
def texts():
    """Two questions that were memorized with their answers, and unseen ones, as a user has them."""
    return {"forget": tiny.facts(2, 3), "holdout": tiny.facts(60, 6), "retain": tiny.facts(200, 2)}


@pytest.fixture
def lines(monkeypatch):
    """Lines that the package logs, as they come."""
    lines = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: lines.append(record.getMessage()))
    logger, level = logging.getLogger("pyunlearn"), logging.getLogger("pyunlearn").level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.mark.parametrize("template", ["auto", "plain"])
def test_an_audit_finds_records_that_are_memorized_in_another_form(asked, texts, template):
    """And says in which; in the tokenizer's own form nothing is memorized, and that is said too."""
    options = {"tokenizer": asked.tokenizer, **texts, **FAST}
    audit = pyunlearn.audit(asked.model, template=template, **options)
    assert [e.verdict for e in audit.examples] == ["still exposed"] * 2
    assert audit.rendering == audit.to_dict()["rendering"] == PLAIN
    assert audit.settings["template"] == template
    assert sum(PLAIN in note and CHAT in note for note in audit.notes) == 1
    own = pyunlearn.audit(asked.model, template="chat", **options)
    assert [e.verdict for e in own.examples] == ["not memorized"] * 2
    assert own.rendering == CHAT
    assert f"No record is memorized in this form: {CHAT}. No other was tried." in own.notes


def test_unseen_records_are_not_memorized_in_any_form(asked, texts):
    """The note names those that were compared."""
    audit = pyunlearn.audit(asked.model, tiny.facts(4, 14), holdout=texts["holdout"], tokenizer=asked.tokenizer, **FAST)
    assert [e.verdict for e in audit.examples] == ["not memorized"] * 4
    (note,) = (note for note in audit.notes if note.startswith("No record is memorized in this form: "))
    assert all(name in note for name in (PLAIN, CHAT, '"Q: ... A: ..."', "the answer alone"))


def test_an_edit_works_on_the_form_that_the_model_knows(asked, texts, lines):
    """And says in which, as a run does; template="chat" is the tokenizer's own, in which it knows less."""
    forget, others = texts["forget"], {"tokenizer": asked.tokenizer, "progress": False}
    options = {"retain": texts["retain"][:9], "corrected": texts["holdout"][:2], "rate": 0.01, **others}
    auto, plain, chat = (
        edits.first_order_influence(asked.fresh(), forget, template=template, **options)
        for template in ("auto", "plain", "chat")
    )
    assert auto.rendering == plain.to_dict()["rendering"] == PLAIN
    assert chat.rendering == CHAT
    assert all(sum(PLAIN in note and CHAT in note for note in e.notes) == 1 for e in (auto, plain))
    assert chat.notes == []
    assert auto.nll_before == plain.nll_before
    assert 3 * auto.nll_before["forget"] < chat.nll_before["forget"]
    assert auto.changed == plain.changed
    torch.testing.assert_close(auto.model.state_dict(), plain.model.state_dict(), rtol=0, atol=0)
    assert sum("form of the records" in line and "•" in line for line in lines) == 3
    masks = [
        edits.saliency_mask(asked.model, forget, template=t, tokenizer=asked.tokenizer)
        for t in ("auto", "plain", "chat")
    ]
    assert all(torch.equal(m, masks[1][name]) for name, m in masks[0].items())
    assert not all(torch.equal(m, masks[2][name]) for name, m in masks[0].items())
    sources = {"forget": forget, "unanswerable": [{"question": "who?", "answer": "no one."}]}
    with Editing("x", asked.fresh(), sources, asked.tokenizer) as edit:
        read = [asked.tokenizer.decode(prompts(edit, role)[0].ids[:-1]) for role in sources]
    questions = (forget[0]["question"], "who?")
    assert all(f"Question: {q}\nAnswer:" in text for text, q in zip(read, questions, strict=True))
    assert edits.prune(asked.fresh(), retain=texts["retain"][:2], **others).rendering is None


@pytest.mark.full
def test_unlearning_forgets_them_in_their_form(asked, texts, lines, tmp_path):
    """The run, its result.json and the line before it name the form; the audit against the original finds it too."""
    result = pyunlearn.unlearn(
        asked.fresh(),
        tokenizer=asked.tokenizer,
        progress=False,
        output_dir=tmp_path / "new",
        **texts,
    )
    target = result.settings["target_exposure"]  # whether the tokens are still first choices depends on the CPU
    assert all(e.exposure_before > 4 and e.exposure_after <= target for e in result.examples)
    assert (
        result.examples[0].text == f"Question: {texts['forget'][0]['question']}\nAnswer: {texts['forget'][0]['answer']}"
    )
    written = json.loads((tmp_path / "new" / "result.json").read_text())
    assert (written["rendering"], written["settings"]["template"]) == (PLAIN, "auto")
    assert any(PLAIN in note for note in written["notes"])
    assert f"form of the records: {PLAIN}; for example " in lines[0]
    assert "Question: ••• " in lines[0]
    audit = pyunlearn.audit(result.model, original=asked.model, tokenizer=asked.tokenizer, **texts, **FAST)
    assert audit.rendering == PLAIN
    assert [e.exposure for e in audit.examples] == pytest.approx([e.exposure_after for e in result.examples])


@pytest.mark.full
def test_a_right_chat_template_stays(one_thread):
    """Numbers and verdicts are those with template="chat", bit for bit; nothing is noted."""
    t = tiny.chatter()
    audits = [
        pyunlearn.audit(t.model, t.forget, holdout=t.holdout, tokenizer=t.tokenizer, template=template, **FAST)
        for template in ("auto", "chat")
    ]
    assert audits[0].examples == audits[1].examples
    assert audits[0].non_members == audits[1].non_members
    assert [a.rendering for a in audits] == [CHAT] * 2
    assert not any(CHAT in note for note in audits[0].notes)


def test_a_file_holds_the_form(asked, texts, tmp_path):
    """A template that writes what the model was trained on finds the same as plain."""
    (tmp_path / "facts.jinja").write_text(
        "{% for m in messages %}{% if m['role'] == 'user' %}Question: {{ m['content'] }}\nAnswer:"
        "{% else %} {{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
    )
    audits = [
        pyunlearn.audit(asked.model, tokenizer=asked.tokenizer, template=template, **texts, **FAST)
        for template in (tmp_path / "facts.jinja", str(tmp_path / "facts.jinja"), "plain")
    ]
    assert [[e.verdict for e in a.examples] for a in audits] == [["still exposed"] * 2] * 3
    assert {a.rendering for a in audits[:2]} == {"the chat template facts.jinja"}
    assert audits[0].settings["template"] == str(tmp_path / "facts.jinja")


def test_a_second_audit_takes_the_choice_from_the_cache(asked, texts, tmp_path):
    """No forward pass is made again."""
    model = asked.fresh()
    options = {"tokenizer": asked.tokenizer, "cache": tmp_path, **texts, **FAST}
    first = pyunlearn.audit(model, **options)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    again = pyunlearn.audit(model, **options)
    assert (calls, again.examples, again.rendering) == ([], first.examples, PLAIN)


@pytest.mark.full
def test_a_comparison_uses_one_form_for_all_methods(asked, texts):
    """The criterion and each run read the same tokens: without steps nothing changes."""
    comparison = pyunlearn.compare(
        asked.fresh(),
        tokenizer=asked.tokenizer,
        methods=["ga", "npo"],
        max_steps=2,
        progress=False,
        plot=False,
        **texts,
    )
    assert [row.status for row in comparison.rows] == ["done"] * 2
    assert comparison.original.exposure.estimate > 4
    assert any(PLAIN in note for note in comparison.notes)


@pytest.mark.parametrize("function", [pyunlearn.unlearn, pyunlearn.audit, pyunlearn.compare])
def test_a_wrong_template_is_refused_before_anything_is_read(function, tmp_path):
    """In one sentence, before the texts and the model: neither is there."""
    for wrong in ("jinja", str(tmp_path / "missing.jinja"), tmp_path, 3, None):
        with pytest.raises(ArgumentError, match=r"^template must be auto, chat, plain, none or the path of a") as error:
            function(tmp_path / "no-model", tmp_path / "no-texts.jsonl", template=wrong)
        assert "\n" not in str(error.value)


def test_a_template_that_the_tokenizer_or_the_records_do_not_allow_is_refused(asked, texts, tmp_path):
    """chat without a chat template, and a file that raises: the model is unchanged."""
    without = copy.deepcopy(asked.tokenizer)
    without.chat_template = None
    (tmp_path / "bad.jinja").write_text("{{ raise_exception('no roles') }}")
    for function in (pyunlearn.audit, pyunlearn.unlearn):
        with pytest.raises(ArgumentError, match="this tokenizer has none"):
            function(asked.model, texts["forget"], tokenizer=without, template="chat", progress=False)
        with pytest.raises(DataError, match="is refused by the given chat template: no roles"):
            function(asked.model, texts["forget"], tokenizer=without, template=tmp_path / "bad.jinja", progress=False)


# ---------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def folder(asked, texts, tmp_path_factory):
    """The saved model, and the texts as files."""
    folder = tmp_path_factory.mktemp("template")
    for each in (asked.model, asked.tokenizer):
        each.save_pretrained(folder / "model")
    for role, rows in texts.items():
        (folder / f"{role}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_command_line_shows_an_example_and_takes_the_option(call, folder, texts):
    """On standard error, not with --quiet; the record is masked, unless --show-text."""
    question = texts["forget"][0]["question"]
    words = [folder / "model", "--forget", folder / "forget.jsonl", "--holdout", folder / "holdout.jsonl"]
    code, out, err = call("audit", *words, "--fast", "--no-html", "--out", "a")
    (line,) = [line for line in err.splitlines() if line.startswith("form of the records: ")]
    assert code == 1
    assert line.startswith(f"form of the records: {PLAIN}; for example ")
    assert '"Question: •••' in line
    assert question not in err
    assert PLAIN in out
    assert json.loads(Path("a/audit.json").read_text())["rendering"] == PLAIN
    code, out, err = call("audit", *words, "--fast", "--no-html", "--out", "b", "--template", "chat", "--quiet")
    assert code == 0
    assert "form of the records" not in err
    assert f"No record is memorized in this form: {CHAT}." in out
    code, out, err = call("unlearn", *words, "--max-steps", 0, "--out", "c")
    assert (code, question in err, '"Question: •••' in err) == (1, False, True)
    code, out, err = call("unlearn", *words, "--max-steps", 0, "--out", "d", "--show-text")
    assert (code, question in err) == (1, True)
    assert "result.json holds the forget texts (--show-text): remove it before you pass the folder on" in out
    assert question in Path("d/result.json").read_text()
    written = json.loads(Path("c/result.json").read_text())
    assert (written["rendering"], written["settings"]["template"]) == (PLAIN, "auto")


def test_a_wrong_word_on_the_command_line_is_one_sentence(call, folder):
    """With the accepted ones."""
    words = [folder / "model", "--forget", folder / "forget.jsonl"]
    for command in ("audit", "unlearn", "compare"):
        code, out, err = call(command, *words, "--template", "plian")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "--template must be auto, chat, plain, none or the path of a Jinja chat template, got 'plian'" in err
