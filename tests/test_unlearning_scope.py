"""scope="person": other forms of a record are forgotten with it, each with a verdict among unseen text in that form."""

import copy
import json

import gguf_files
import numpy as np
import pytest
import tiny
from scopes import exposures, knows_other_words
from test_attacks_paraphrases import with_paraphrases
from unlearning_runs import Interrupted, run, same, timeless, weights

import pyunlearn
from pyunlearn import models
from pyunlearn.errors import ArgumentError, DataError
from pyunlearn.methods import METHODS
from pyunlearn.metrics import NULL_MEAN, generalized_exposure, verdict
from pyunlearn.metrics.families import families_of
from pyunlearn.metrics.verdict import discoveries_within
from pyunlearn.probes.calibration import Expected
from pyunlearn.probes.non_members import NonMembers
from pyunlearn.unlearning.card import model_card
from pyunlearn.unlearning.robust import Robustness
from pyunlearn.unlearning.stopping import StoppingRule

PERSON = {"scope": "person", "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def answerer(one_thread):
    """A model that knows eight answers after key words of their questions alone."""
    return knows_other_words()


# ---------------------------------------------------------------- verdicts by form


def by_form(of_forget, own):
    """Non-members of two forms."""
    zeros = [Expected(np.zeros(len(x)), np.zeros(len(x))) for x in (of_forget, own)]
    return NonMembers("holdout", [], *zeros, "", forms=(np.array(of_forget), np.array(own)))


def test_each_form_is_compared_with_its_like():
    """Texts of form 1 are likelier whoever reads them: a text at their middle is not memorized, and has its own level.

    A text that lies in the middle of form 1 is memorized where it is none of them.
    """
    unseen = np.linspace(2.0, 4.0, 60)
    rule = StoppingRule(
        np.array([-0.1, -1.0, -1.0, -0.1]),
        np.concatenate([unseen, unseen - 2]),
        np.linspace(0, 0.5, 120),
        np.array([2.0]),
        target_exposure=NULL_MEAN,
        utility_budget=0.05,
        non_members=by_form([0, 0, 1, 1], [0] * 60 + [1] * 60),
    )
    assert rule.memorized.tolist() == [True, True, False, False]
    assert rule.level[0] == rule.level[1] == pytest.approx(rule.level[2] - 2)
    alone = generalized_exposure([1.0], unseen - 2).lower[0]
    assert rule.initial.exposure.lower[2] == alone
    judged = rule.verdict(np.full(4, 0.1), np.zeros(4, dtype=bool))
    assert judged.verdict.tolist() == ["still exposed", "still exposed", "not memorized", "not memorized"]
    rule.compare_with(np.concatenate([unseen, unseen - 2.5]))  # form 1 alone has become likelier
    np.testing.assert_array_equal(rule.anchor, np.concatenate([unseen, unseen - 2.5]))


def test_what_falls_below_the_non_members_with_another_form_is_unlearned_on():
    """Any number of times, as it is the other form's step that brings it there; alone a text is given up after four."""
    counts = []
    for forms in ([0, 1], [0, 0]):
        non_members = by_form(forms, [0] * 60 + [1] * 60) if any(forms) else None
        rule = StoppingRule(
            np.array([-0.1, -0.1]), np.tile(np.linspace(2, 4, 60), 2), np.zeros(120), np.ones(1),
            target_exposure=NULL_MEAN, utility_budget=0.05, non_members=non_members,
        )  # fmt: skip
        for level in (-9.0, -3.0) * 5:
            rule.accept(rule.measurement(np.array([level, level]), np.ones(1)), np.arange(2))
        counts.append(rule.overshoots.tolist())
    assert counts == [[0, 0], [5, 5]]


def test_the_texts_themselves_are_judged_as_without_their_forms():
    """However many forms there are: what is memorized of the texts as they are is what scope="record" calls so."""
    rng = np.random.default_rng(0)
    forget, unseen = rng.gamma(8, size=(20, 5)), rng.gamma(8, size=(60, 5))
    forget[:, 0] /= 20
    both = [np.tile(np.arange(5), n) for n in (20, 60)]
    options = {"target_exposure": NULL_MEAN, "utility_budget": 0.05}
    rule = StoppingRule(
        -forget.ravel(), unseen.ravel(), np.zeros(300), np.ones(3), non_members=by_form(*both), **options
    )
    alone = StoppingRule(-forget[:, 0], unseen[:, 0], np.zeros(60), np.ones(3), **options)
    assert alone.memorized.all()
    assert rule.memorized.reshape(20, 5)[:, 0].all()
    np.testing.assert_array_equal(rule.initial.exposure.lower[::5], alone.initial.exposure.lower)
    assert not rule.memorized.reshape(20, 5)[:, 1:].any()


@pytest.mark.parametrize("others", [9.0, 0.001])
def test_a_text_is_over_unlearned_as_without_its_forms(others):
    """Its verdict after the run is that of a set without forms: where they are like unseen text, and far below it."""
    unseen = np.linspace(1, 4, 60)
    before, after = np.full(5, 0.1), np.array([2.0, 2.1, 2.2, 2.3, 3.97])
    alone = verdict(before, after, unseen)
    both = [np.column_stack([own, *[np.full(5, each)] * 4]).ravel() for own, each in ((before, 0.1), (after, others))]
    forms = np.tile(np.arange(5), 5), np.tile(np.arange(5), 60)
    groups = verdict(*both, np.repeat(unseen, 5), groups=forms, families=np.minimum(forms[0], 1))
    assert groups.verdict[::5].tolist() == alone.verdict.tolist()


@pytest.mark.full
@pytest.mark.parametrize("rho", [0.0, 0.8])
@pytest.mark.parametrize(("n", "m", "sets"), [(1, 200, 1000), (5, 200, 200), (20, 400, 100)])
def test_sets_of_unseen_texts_in_five_forms_rarely_have_one_that_is_selected(n, m, sets, rho):
    """In 5 % of the sets a text as it is, at most, and with other forms, of two families, in 15 %.

    Both with three standard errors for chance.
    """
    rng, alarms = np.random.default_rng(n + m), []
    for _ in range(sets):
        bits, groups = exposures(rng, n, m, rho)
        selected, _ = discoveries_within(families_of(bits, *groups), bits)
        alarms.append([selected[groups[0] == 0].any(), selected.any()])
    rates, limits = np.mean(alarms, axis=0), np.array([0.05, 0.15])
    assert (rates <= limits + 3 * np.sqrt(limits * (1 - limits) / sets)).all()


def test_forms_by_which_a_set_stands_out_are_not_hidden_among_others():
    """Eight texts that are known by one of four kinds: 60 unseen texts would not do for 8 of 32, and do for 8 of 8."""
    rng = np.random.default_rng(0)
    bits, groups = exposures(rng, 8, 60, 0.7)
    bits[groups[0] == 1] = np.log2(61)
    families = families_of(bits, *groups)
    assert [np.unique(families[groups[0] == form]).tolist() for form in range(5)] == [[0], [1], [2], [2], [2]]
    assert discoveries_within(families, bits)[0].reshape(8, 5).sum(axis=0).tolist() == [0, 8, 0, 0, 0]
    assert not discoveries_within(np.minimum(groups[0], 1), bits)[0].any()
    assert set(families_of(bits[:20], groups[0][:20], groups[1])) == {0, 1}  # four texts are no set


@pytest.mark.full
def test_of_the_forms_that_are_selected_few_are_unseen():
    """8 of 40 texts are known in all forms: 5 % of those that are selected are unseen, with two points for chance."""
    rng, false, named = np.random.default_rng(0), [], []
    for _ in range(30):
        bits, groups = exposures(rng, 40, 200, 0.7, known=8)
        selected, _ = discoveries_within(families_of(bits, *groups), bits)
        false.append(selected[40:].sum() / max(1, selected.sum()))
        named.append(selected[:40].mean())
    assert np.mean(false) <= 0.07
    assert np.mean(named) >= 0.8


# ---------------------------------------------------------------- from end to end


@pytest.mark.full
def test_what_is_known_in_other_words_alone_is_forgotten_with_scope_person(answerer, tmp_path):
    """With scope="record" nothing is memorized and nothing changes; the answers after the key words stay."""
    attack = {"attacks": ["paraphrase"], "holdout": answerer.holdout, "tokenizer": answerer.tokenizer}
    record = run(answerer, method="auto", scope="record")
    plain = pyunlearn.attack(record.model, answerer.forget, progress=False, **attack)
    assert plain.verdicts.get("comes back", 0) >= 6
    result = run(answerer, method="auto", **PERSON)
    after = pyunlearn.attack(result.model, answerer.forget, progress=False, **attack)
    assert after.passed
    assert result.passed
    names = [e.form for e in result.examples]
    assert names == ["", "question", "statement", "turned", "cloze"] * 8
    questions = [e for e in result.examples if e.form == "question"]
    assert {e.verdict for e in questions} == {"forgotten"}
    assert all(e.exposure_after <= NULL_MEAN for e in questions)
    assert [e.label for e in result.examples[5:7]] == ["2", "2 question"]
    assert len(result.documents) == 8
    assert {(d.verdict, d.forms, d.windows) for d in result.documents} == {("forgotten", 4, 1)}
    assert "With 32 other forms of 8 records, the verdicts on the records as a whole: 8 forgotten." in result.notes
    assert result.utility.interval[1] <= 0.05
    result.save(tmp_path / "out")
    content = json.loads((tmp_path / "out" / "result.json").read_text())
    assert content["settings"]["scope"] == "person"
    assert content["examples"][1]["form"] == "question"
    card = model_card(result.model, content)
    assert "8 texts and 32 other forms of them" in card
    assert "the same of 32 other forms of the texts. It does not mean\nthat other paraphrases" in card


@pytest.mark.full
def test_one_form_that_is_left_fails_the_record_and_the_run(answerer):
    """Without a step the answers after the key words are still exposed."""
    result = run(answerer, method="auto", max_steps=0, **PERSON)
    assert not result.passed
    assert {e.verdict for e in result.examples if not e.form} == {"not memorized"}
    assert {d.verdict for d in result.documents} == {"still exposed"}
    assert "8 still exposed (not passed: 1, 2, 3, 4, 5 and 3 more)." in result.notes[-1]


@pytest.mark.full
def test_unseen_texts_in_five_forms_are_left_alone(answerer):
    """Nothing is memorized, in no form: no step, and the weights keep their bits."""
    start = answerer.fresh()
    result = run(answerer, answerer.unseen, method="auto", **PERSON)
    assert result.stopped == "nothing memorized"
    assert {e.verdict for e in result.examples} == {"not memorized"}
    assert same(result.model, start)


def test_the_users_paraphrases_are_forgotten(story):
    """Each by its own verdict, compared with the holdout's first."""
    forget = with_paraphrases(story.forget, 2)
    result = run(story, forget, holdout=with_paraphrases(story.holdout), **PERSON)
    assert [e.form for e in result.examples] == ["", "paraphrase 1", "paraphrase 2"] * 2
    assert result.passed


@pytest.mark.full
def test_an_interrupted_run_in_several_forms_resumes_to_the_same_numbers(story, tmp_path, monkeypatch):
    """The forms come from the texts, so they are the same again."""
    model = story.fresh()
    start, options = weights(model), {"max_steps": 6, "scope": "person"}
    whole = run(story, model=model, **options)
    model.load_state_dict(start)
    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "ga", tiny.with_loss("ga", Interrupted("ga", 4)))
        assert run(story, model=model, output_dir=tmp_path / "out", **options).stopped == "interrupted"
    model.load_state_dict(start)
    resumed = run(story, model=model, output_dir=tmp_path / "out", resume=True, **options)
    assert timeless(resumed.history) == timeless(whole.history)
    assert resumed.examples == whole.examples
    assert same(resumed.model, whole.model)


@pytest.mark.full
@pytest.mark.parametrize("adapter", [{}, {"lora": 8, "learning_rate": 1e-2}])
def test_forms_of_a_record_are_in_one_half_of_a_robust_run(story, monkeypatch, adapter):
    """A probe fine-tunes on all forms of one of two records and scores all forms of the other; of an adapter too."""
    if adapter:
        pytest.importorskip("peft")
    halves, original = [], Robustness._half

    def recorded(self, round_number):
        halves.append(original(self, round_number).reshape(2, 3).tolist())
        return original(self, round_number)

    monkeypatch.setattr(Robustness, "_half", recorded)
    options = {"method": "auto", "robust": True, "max_steps": 16, "utility_budget": 0.5}
    result = run(story, retain=story.retain, **options, **PERSON | adapter)
    assert any("returning" in record for record in result.history)
    assert all(sorted(half) == [[False] * 3, [True] * 3] for half in halves)


@pytest.mark.full
def test_what_is_known_in_other_words_is_forgotten_in_the_file_that_is_served(answerer, tmp_path):
    """The model is served in 4 bits, and known by questions there; an audit of the new file says the same."""
    served = gguf_files.write(tmp_path / "served.gguf", answerer.model, answerer.tokenizer, "Q4_1")
    on_grid = models.load(served, tokenizer=answerer.tokenizer)[0].eval()
    result = run(answerer, model=copy.deepcopy(on_grid), method="auto", gguf_like=served, **PERSON)
    assert {(e.form, e.verdict) for e in result.examples if e.steps} == {("question", "forgotten")}
    assert result.passed
    result.save_gguf(tmp_path / "new.gguf")
    options = {"holdout": answerer.holdout, "tokenizer": answerer.tokenizer, "scope": "person", "progress": False}
    before, after = (
        [d.verdict for d in pyunlearn.audit(tmp_path / file, answerer.forget, original=on_grid, **options).documents]
        for file in ("served.gguf", "new.gguf")
    )
    assert before.count("still exposed") >= 6
    assert after == ["forgotten" if verdict == "still exposed" else verdict for verdict in before]


@pytest.mark.full
@pytest.mark.parametrize(
    "options", [{"method": "idkdpo"}, {"method": "altpo"}, {"lora": 4}, {"attacks": ["paraphrase"]}, {"retain": None}]
)
def test_other_settings_work_with_it(story, options):
    """Methods with another text for each forget text, adapters, attacks on the result (on texts as they are)."""
    if "lora" in options:
        pytest.importorskip("peft")
    result = run(story, **{"max_steps": 2, **PERSON, **options})
    assert len({e.record for e in result.examples}) == 2
    assert len(result.examples) == 6
    assert result.attack is None or len(result.attack.examples) == 2


@pytest.mark.full
def test_own_lists_are_of_records_or_of_all_their_forms(story):
    """A difficulty holds for all forms of a record; token weights need a list for each, and the message says so."""
    options = {"forget": with_paraphrases(story.forget, 2), "holdout": with_paraphrases(story.holdout)}
    easy_first = {"order": "easy_first", "batch_size": 1, "max_steps": 6, **options, **PERSON}
    few, each = (run(story, difficulty=d, **easy_first) for d in ([2, 1], [2, 2, 2, 1, 1, 1]))
    assert timeless(few.history) == timeless(each.history)
    assert few.examples == each.examples
    with pytest.raises(ArgumentError, match=r"must be 2 numbers, .* example, or 6, one .* other form of them, got 3 "):
        run(story, difficulty=[1, 2, 3], **easy_first)
    with pytest.raises(ArgumentError, match=r'must be 6 lists, .* got 2: a window or another form .*scope="person"'):
        run(story, token_weights=[[1.0], [1.0]], **options, **PERSON)


def test_a_run_without_a_holdout_is_refused(story, tmp_path):
    """Before anything is read or changed."""
    model = story.fresh()
    start = weights(model)
    with pytest.raises(DataError, match=r'scope="person" \(--scope person\) .* there is no holdout: give one of 39'):
        run(story, model=model, holdout=None, output_dir=tmp_path / "out", **PERSON)
    assert same(model, start)
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_a_plan_counts_the_forms(story, tmp_path):
    """Each is one more text, and the run may take twice as many steps; without a holdout both are refused."""
    story.model.save_pretrained(tmp_path)
    story.tokenizer.save_pretrained(tmp_path)
    options = {"holdout": story.holdout, "gpu": "H100"}
    record, person = (
        pyunlearn.plan(tmp_path, tiny.sentences(40, 3), scope=scope, **options) for scope in ("record", "person")
    )
    assert person.most_steps == 2 * 3 * record.most_steps  # as it is, turned and cloze
    with pytest.raises(DataError, match="there is no holdout"):
        pyunlearn.plan(tmp_path, story.forget, gpu="H100", scope="person")
