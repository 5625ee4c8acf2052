"""audit(scope="person"): is a record known in other words? Each form has a verdict among unseen text in that form."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from coverings import slow
from scopes import FORMS, knows_other_words, numbers, scores
from test_attacks_paraphrases import with_paraphrases
from test_audit_retrained import responses
from unlearning_runs import run

import pyunlearn
from pyunlearn.auditing.assemble import AuditAssembler
from pyunlearn.auditing.config import AuditConfig
from pyunlearn.errors import DataError
from pyunlearn.probes.non_members import uncalibrated
from pyunlearn.report import audit_lines, audit_page, audit_table, sentences
from pyunlearn.unlearning.config import UnlearnConfig

OF_THE_SET = ["top_test", "null_test", "left_pvalue", "non_members", "membership", "change", "answer_prior", "utility"]
OF_THE_SET += ["writing", "writing_before"]


@pytest.fixture(scope="module")
def answerer(one_thread):
    """A model that knows eight answers after key words of their questions alone."""
    return knows_other_words()


def audited(trained, forget=None, *, model=None, **options):
    """The audit with other forms of the texts, by default of what the model was trained on, with its holdout."""
    options = {"holdout": trained.holdout, "scope": "person", "progress": False, **options}
    texts = trained.forget if forget is None else forget
    return pyunlearn.audit(model or trained.model, texts, tokenizer=trained.tokenizer, **options)


# ---------------------------------------------------------------- verdicts by form


def judged(now, unseen_now, before=None, unseen=None, rate=0.05, kinds=(0, 1, 2, 3, 4)):
    """The assembler and its verdicts, of scores of texts and of non-members in several forms.

    `kinds`: number of each form; of forms of one kind, such as paraphrases, the non-members have the first.
    """
    k, first_of = len(kinds), [kinds.index(kind) for kind in sorted(set(kinds))]
    unseen_now, unseen = (None if x is None else x.reshape(-1, k)[:, first_of].ravel() for x in (unseen_now, unseen))
    n, m = len(now) // k, len(unseen_now)

    forms = np.tile(kinds, n), numbers(m // len(first_of), len(first_of))
    sides, plain = uncalibrated("holdout", k * n, [], m=m)._replace(forms=forms), [*range(0, k * n, k)]
    names = ["", *(f"form {i}" for i in range(1, k))] * n
    texts = SimpleNamespace(non_members=sides, openings=[], holdout=[], as_they_are=plain, forms=names)
    first = None if before is None else responses(before, unseen)
    config = AuditConfig(false_discovery_rate=rate)
    assembler = AuditAssembler(texts, None, config, responses(now, unseen_now), first)
    assembler.recited = np.zeros(k * n, dtype=bool)
    return assembler, assembler._verdict().verdict.reshape(n, k)


def far(verdicts):
    """Which verdicts fail an audit."""
    return np.isin(verdicts, ["still exposed", "over-unlearned"])


@pytest.mark.full
@pytest.mark.parametrize("rho", [0.0, 0.8])
@pytest.mark.parametrize(("n", "m", "sets"), [(1, 200, 600), (5, 200, 100), *slow((5, 200, 400), (20, 400, 100))])
def test_sets_of_unseen_texts_in_five_forms_rarely_fail(n, m, sets, rho):
    """By a text as it is in 5 % of the audits at most, and by any form in 15 %: these are two families more.

    Both with three standard errors for chance.
    """
    rng, alarms = np.random.default_rng(n + m), []
    for _ in range(sets):
        verdicts = judged(scores(rng, n, rho), scores(rng, m, rho))[1]
        alarms.append([far(verdicts)[:, 0].any(), far(verdicts).any()])
    rates, limits = np.mean(alarms, axis=0), np.array([0.05, 0.15])
    assert (rates <= limits + 3 * np.sqrt(limits * (1 - limits) / sets)).all()


ALL, PARAPHRASES = (0, 1, 2, 3, 4), (0, *[1] * 9)


@pytest.mark.full
@pytest.mark.parametrize(
    ("n", "m", "draws", "rho", "depth", "kinds"),
    [
        (1, 60, 200, 0.0, 8.9, ALL),
        (1, 60, 200, 0.8, 8.9, ALL),
        (1, 60, 200, 0.9, 8.9, PARAPHRASES),
        (12, 60, 50, 0.8, 2.8, ALL),
        *slow((12, 60, 200, 0.0, 8.9, ALL), (12, 60, 200, 0.8, 8.9, ALL)),
        *slow((1, 60, 600, 0.9, 8.9, PARAPHRASES), (12, 60, 200, 0.8, 2.8, ALL)),
    ],
)
def test_a_model_that_never_saw_the_texts_rarely_fails_in_other_forms(n, m, draws, rho, depth, kinds):
    """By other forms in 5 % of audits at most, with three standard errors for chance; by texts as they are too, but
    where the original knew them so little (2.8 standard deviations) that one that lies where it did is no surprise.
    """
    rng, alarms, k = np.random.default_rng(n + m), [], len(kinds)
    for _ in range(draws):
        now, unseen = (9 + scores(rng, count, rho, k) + np.tile(kinds, count) - numbers(count, k) for count in (n, m))
        unseen_now = unseen + 0.1 * rng.normal(size=k * m)
        before = np.full(k * n, 9 - depth) + np.tile(kinds, n)
        assembler, verdicts = judged(now, unseen_now, before, unseen, kinds=kinds)
        left = assembler.left
        together = [pvalue is not None and pvalue <= 0.05 for pvalue in (left.pvalue, left.forms_pvalue)]
        alarms.append(np.array([far(verdicts)[:, 0].any(), far(verdicts)[:, 1:].any()]) | together)
    texts, others = np.mean(alarms, axis=0)
    allowed = 0.05 + 3 * np.sqrt(0.05 * 0.95 / draws)
    assert others <= allowed
    assert depth < 3 or texts <= allowed


def test_texts_as_they_are_are_judged_as_without_their_forms():
    """Whether the others are known or not, before and now: verdicts and p-values are those of a set without forms."""
    rng = np.random.default_rng(0)
    unseen, before, now = 9 + scores(rng, 60, 0.5), np.full(40, 0.1), 9 + scores(rng, 8, 0.5)
    now[:5] = 0.1
    alone = None
    for others in (before, now):
        texts, first = now.copy(), before.copy()
        for k in range(1, 5):
            texts[k::5], first[k::5] = others[k::5], others[k::5]
        assembler, verdicts = judged(texts, unseen, first, unseen)
        alone = alone or (verdicts[:, 0].tolist(), assembler.left.pvalue)
        assert (verdicts[:, 0].tolist(), assembler.left.pvalue) == alone
        assert set(verdicts[:, 1:].ravel()) == ({"still exposed"} if others is before else {"not memorized"})
    assert alone[0][0] == "still exposed"
    assert "still exposed" not in alone[0][1:]


def test_one_kind_that_the_model_still_knows_is_named():
    """Eight texts by one of four kinds, with the original; the texts as they are, and the other kinds, are not."""
    rng = np.random.default_rng(0)
    unseen, now = 9 + scores(rng, 60, 0.7), 9 + scores(rng, 8, 0.7)
    before = now.copy()
    now[1::5], before[1::5] = 0.2, 0.1
    assembler, verdicts = judged(now, unseen, before, unseen)
    assert (verdicts[:, 1] == "still exposed").all()
    assert not far(np.delete(verdicts, 1, axis=1)).any()
    assert assembler.left.pvalue is None
    assert assembler.left.forms_pvalue <= 0.001


def test_what_can_be_guessed_is_seen_in_each_form(monkeypatch):
    """A recited text stands out; not in a form in which the model would recite unseen texts as well."""
    rng = np.random.default_rng(0)
    unseen, now = 9 + scores(rng, 60, 0.5), 9 + scores(rng, 8, 0.5)
    assembler, _ = judged(now, unseen, np.full(40, 0.1), unseen)
    forced = assembler.now.statistics["non_members"]
    forced.rank, forced.each = np.zeros(300), lambda hits: hits
    assembler.texts.tokens = {"non_members": numbers(60).tolist()}
    monkeypatch.setattr("pyunlearn.auditing.assemble.is_guessed", lambda form, hit: form == 1)
    assembler.recited[:5] = True
    stand_out = assembler._standing_out() & ~assembler.left.standing_out
    assert stand_out[:5].tolist() == [True, False, True, True, True]
    assert not stand_out[5:].any()


# ---------------------------------------------------------------- from end to end


def test_each_form_is_an_example_and_the_set_is_that_of_the_texts(story):
    """The users' paraphrases, among the holdout's first: the texts are judged as in scope="record"."""
    forget, holdout = with_paraphrases(story.forget + story.unseen, 2), with_paraphrases(story.holdout)
    options = {"holdout": holdout, "retain": story.retain, "original": story.model}
    plain, audit = (audited(story, forget, scope=scope, **options) for scope in ("record", "person"))
    assert [e.label for e in audit.examples[:4]] == ["1", "1 paraphrase 1", "1 paraphrase 2", "2"]
    assert [e.form for e in audit.examples] == ["", "paraphrase 1", "paraphrase 2"] * 4
    for mine, other in zip(audit.examples[::3], plain.examples, strict=True):
        assert (mine.verdict, mine.text, mine.now.continuation) == (other.verdict, other.text, other.now.continuation)
        assert (mine.exposure, *mine.interval) == pytest.approx((other.exposure, *other.interval))
        assert mine.now.membership == pytest.approx(other.now.membership, rel=1e-4)
    content, other = audit.to_dict(), plain.to_dict()
    for name in OF_THE_SET:
        assert json.dumps(shortened(content[name])) == json.dumps(shortened(other[name])), name
    assert [d.forms for d in audit.documents] == [2] * 4
    assert content["examples"][1]["form"] == "paraphrase 1"
    assert content["settings"]["scope"] == "person"
    assert audit.passes["model"] > plain.passes["model"]


def shortened(content):
    """Nested values with numbers to four digits: a text's last bits depend on its batch."""
    if isinstance(content, dict):
        return {name: shortened(x) for name, x in content.items()}
    if isinstance(content, list):
        return [shortened(x) for x in content]
    return float(f"{content:.4g}") if isinstance(content, float) else content


@pytest.mark.full
def test_what_is_known_in_other_words_alone_is_found_with_scope_person(answerer):
    """With scope="record" the audit passes; with the original in place of the model before, too."""
    record, person = (audited(answerer, scope=scope) for scope in ("record", "person"))
    assert record.passed
    assert not person.passed
    assert [e.form for e in person.examples] == FORMS * 8
    known = [(e.verdict, e.form) for e in person.examples if e.verdict != "not memorized"]
    assert known == [("still exposed", "question")] * 8
    assert {d.verdict for d in person.documents} == {"still exposed"}
    assert not audited(answerer, original=answerer.model).passed
    forgetful = run(answerer, method="auto", scope="person", learning_rate=1e-3).model
    after = audited(answerer, model=forgetful, original=answerer.model)
    assert after.passed
    assert {(e.form, e.verdict) for e in after.examples if e.verdict != "not memorized"} == {("question", "forgotten")}


@pytest.mark.full
def test_texts_that_are_known_in_no_words_pass(answerer):
    """In none of their five forms is one memorized, with the unseen texts of the model and its retain set."""
    audit = audited(answerer, answerer.unseen, retain=answerer.retain)
    assert audit.passed
    assert audit.verdicts == {"not memorized": 40}


@pytest.mark.full
def test_other_parts_of_an_audit_work_with_it(answerer, monkeypatch, tmp_path):
    """A reference model, attacks (on the texts as they are), a budget of continuations, the cache."""
    clean = answerer.fresh()
    clean.apply(clean._init_weights)
    tiny.train(clean, answerer.tokenizer, answerer.corpus, epochs=2)
    by_reference = audited(answerer, reference_model=clean, cache=tmp_path)
    questions = [e.verdict for e in by_reference.examples if e.form == "question"]
    assert questions == ["still exposed"] * 8
    assert {m.score for m in by_reference.membership} >= {"reference"}
    assert all(m.privleak is not None for m in by_reference.membership if m.score != "reference")
    again = audited(answerer, reference_model=clean, cache=tmp_path)
    assert [e.exposure for e in again.examples] == [e.exposure for e in by_reference.examples]
    attacked = audited(answerer, attacks=["paraphrase"])
    assert len(attacked.attack.examples) == 8
    assert not attacked.attack.passed
    few = audited(answerer, budget=4)
    assert sum(e.now.continuation is not None for e in few.examples) == 4
    assert [e.verdict for e in few.examples] == [e.verdict for e in attacked.examples]


@pytest.mark.full
def test_windows_of_a_long_text_have_forms(story):
    """Each window is rewritten; the verdict on the text covers windows and forms."""
    book = " ".join([*tiny.sentences(9, 201), *story.forget])
    audit = audited(story, [book])
    (document,) = audit.documents
    assert document.windows > 1
    assert document.forms == sum(bool(e.form) for e in audit.examples) > 0
    assert len(audit.examples) == document.windows + document.forms
    assert sentences.size(audit) == f"{document.windows} texts and {document.forms} other forms"
    assert any("Give a holdout of texts as long" in note for note in audit.notes)


# ---------------------------------------------------------------- what is read, and refused


def test_the_report_counts_records_by_all_their_forms(story):
    """Headline, table and page say which form is exposed; of the texts as they are none is."""
    forget, holdout = with_paraphrases(story.forget), with_paraphrases(story.holdout)
    audit = audited(story, forget, holdout=holdout, metrics=["membership"])
    names = {"": "not memorized", "paraphrase 1": "still exposed"}
    examples = [e.__class__(**(e.__dict__ | {"verdict": names[e.form], "certain": True})) for e in audit.examples]
    audit.examples = examples
    assert not audit.passed
    lines = audit_lines(audit)
    assert lines[0] == "All 2 texts are memorized."
    assert "as they are: 2 not memorized; other forms: 2 still exposed." in lines[1]
    assert "compared with 60 texts: holdout; other forms with the same forms of these" in lines
    audit.left_pvalue, audit.forms_left_pvalue = 0.5, 0.001
    assert sorted(list(audit_table(audit).columns[0].cells)[:2]) == ["1 paraphrase 1", "2 paraphrase 1"]
    page = " ".join(audit_page(audit).split())
    for words in ("2 texts and 2 other forms", "text in other words was compared", "1 paraphrase 1", "scope person"):
        assert words in page
    assert "these texts as they stand" not in page
    undecided = [e.__class__(**(e.__dict__ | {"verdict": "undecided" if e.form else e.verdict})) for e in examples]
    audit.examples = undecided
    assert (audit.passed, audit.undecided_pvalue) == (False, 0.001)
    assert (
        sentences.headline(audit)
        == "No text stands out by itself, but all together they do in other words (p = 0.001)."
    )
    assert "In other words they are no unseen text all together (p = 0.001)." in " ".join(sentences.summary(audit))
    audit.forms_left_pvalue = 0.2
    assert audit.passed


def test_an_audit_without_a_holdout_is_refused(story, tmp_path):
    """By the sentence of unlearn, before a model is loaded or anything is written."""
    with pytest.raises(DataError, match=r'scope="person" \(--scope person\) .* there is no holdout: give one of 39'):
        audited(story, holdout=None, model="nobody/nothing", cache=tmp_path / "cache")
    with pytest.raises(DataError, match="38 of the 38 holdout texts can be rewritten"):
        audited(story, holdout=story.holdout[:38])
    assert not list(tmp_path.iterdir())


def test_the_scope_of_a_run_is_taken_from_its_result(tmp_path):
    """--config RESULT, as all settings that an audit has too."""
    settings = UnlearnConfig(scope="person", false_discovery_rate=0.1).to_dict()
    (tmp_path / "result.json").write_text(json.dumps({"settings": settings | {"torch": "2"}}))
    config = AuditConfig.of(tmp_path / "result.json", {}, "audit")
    assert (config.scope, config.false_discovery_rate) == ("person", 0.1)


@pytest.mark.full
def test_the_command_finds_what_is_known_in_other_words(call, answerer, tmp_path):
    """Exit code 1 with --scope person, or with the settings of a run that had it, and 0 without."""
    answerer.model.save_pretrained(tmp_path / "model")
    answerer.tokenizer.save_pretrained(tmp_path / "model")
    for role in ("forget", "holdout"):
        (tmp_path / f"{role}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in getattr(answerer, role)))
    words = ("audit", "model", "--forget", "forget.jsonl", "--holdout", "holdout.jsonl", "--fast", "-q")
    assert call(*words, "--out", "record")[0] == 0
    code, out, _ = call(*words, "--out", "person", "--scope", "person")
    assert code == 1
    assert "All 8 texts are memorized." in out
    content = json.loads((tmp_path / "person" / "audit.json").read_text())
    assert content["verdicts"] == {"not memorized": 32, "still exposed": 8}
    assert [d["forms"] for d in content["documents"]] == [4] * 8
    (tmp_path / "result.json").write_text(json.dumps({"settings": {"scope": "person", "method": "match"}}))
    assert call(*words, "--out", "as-the-run", "--config", "result.json")[0] == 1
