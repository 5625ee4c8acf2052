"""The budgets of a run: the texts they are measured on, which no retain loss reads, and the end of a run by them."""

from itertools import pairwise

import numpy as np
import pytest
import tiny
from unlearning_runs import apart, run

from pyunlearn.data import Tokens
from pyunlearn.metrics import NULL_MEAN
from pyunlearn.models import sampling
from pyunlearn.probes.non_members import uncalibrated
from pyunlearn.progress import Progress
from pyunlearn.unlearning import objectives, utility_set
from pyunlearn.unlearning.budget import UTILITY_BUDGET, Budget, budget_notes
from pyunlearn.unlearning.utility_set import evenly_spaced, non_members_as_utility_set, retain_texts, split_retain

pytestmark = pytest.mark.usefixtures("one_thread")


def texts(count, length=10):
    """Return different texts of `length` scored tokens each."""
    return [Tokens((i, *range(length)), first=1) for i in range(count)]


def unlikely(tokens):
    """Return log-likelihoods of texts that the model does not know by heart."""
    return np.full(len(tokens), -3.0)


# ---------------------------------------------------------------- the texts


def test_of_text_that_the_model_wrote_a_third_is_set_apart():
    """The rest is trained on, and what one text gains makes up for what others lose up to the budget alone."""
    own = texts(9)
    retained = retain_texts(None, own, {}, trains=True, log_likelihood=unlikely)
    assert retained.utility.tokens == own[::3]
    assert not retained.utility.trained
    assert set(retained.tokens) == set(own) - set(own[::3])
    budget = Budget(UTILITY_BUDGET, np.full(3, 2.0), 0.05, gains_capped=True)
    assert budget.rise(np.array([1.0, 2.06, 2.1])).estimate == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("count", "length", "most", "expected"),
    [
        (300, 32, None, 32),
        (300, 500, None, 8),
        (5, 500, None, 5),
        (20, 10, None, 20),
        (60, 10, 12, 12),
        (1, 9, None, 1),
    ],
)
def test_about_a_thousand_tokens_are_scored(count, length, most, expected):
    """Evenly spaced texts: 8 at least, where there are as many."""
    chosen = evenly_spaced(texts(count, length), most=most)
    assert len(chosen) == len(set(chosen)) == expected
    assert chosen[0] == 0
    assert {b - a for a, b in pairwise(chosen)} <= {count // expected, count // expected + 1}


@pytest.mark.parametrize(("count", "length", "size"), [(20, 10, 4), (60, 10, 12), (400, 64, 16), (400, 2000, 8)])
def test_a_fifth_of_the_retain_set_is_set_apart_at_most(count, length, size):
    """The texts set apart are not among those to train on, also where the retain set repeats them."""
    retain = texts(count, length)
    trained, utility = split_retain(retain + retain[:3] * 5, trains=True, log_likelihood=unlikely)
    assert len(utility.tokens) == size <= count / 5
    assert not set(trained) & set(utility.tokens)
    assert {*trained, *utility.tokens} == set(retain)
    assert (utility.source, utility.trained, utility.notes) == ("retain texts set apart", False, [])


def test_of_few_texts_none_is_set_apart():
    """Below 20 different ones the utility set is trained on, which a note says; without a retain loss it is not."""
    for retain in (texts(19), texts(19) * 3):
        trained, utility = split_retain(retain, trains=True, log_likelihood=unlikely)
        assert trained == retain == utility.tokens
        assert (utility.source, utility.trained) == ("retain set", True)
        (note,) = utility.notes
        assert note.startswith(f"Utility was measured on {len(retain)} texts that the run also trained on")
    trained, utility = split_retain(texts(40), trains=False, log_likelihood=unlikely)
    assert trained == utility.tokens == texts(40)
    assert (utility.source, utility.notes) == ("retain set", [])
    assert split_retain(None, trains=False, log_likelihood=unlikely) == (None, None)
    holdout = uncalibrated("holdout", 1, texts(30))
    assert non_members_as_utility_set(holdout) == (holdout.tokens, "holdout", False, False)


def test_of_a_set_that_is_known_by_heart_none_is_set_apart():
    """What is not trained on would be forgotten with the forget set; a note says where utility was measured."""
    retain = texts(60, 64)
    trained, utility = split_retain(retain, trains=True, log_likelihood=lambda tokens: np.full(len(tokens), -0.49))
    assert trained == retain
    assert (len(utility.tokens), utility.source, utility.trained) == (16, "part of the retain set", True)
    (note,) = utility.notes
    assert "the model knows them by heart" in note


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("longest", [512, 0])
def test_answers_to_other_prompts_are_held_where_the_retain_set_is_known_by_heart(story, monkeypatch, longest):
    """Each step holds as many of them as it takes retain texts; where there can be none, a note says so."""
    read = []

    def batch(self, indices, forget_indices=()):
        read.append([self.retain[i] for i in indices])
        return original(self, indices, forget_indices)

    original = objectives.RetainTerm.batch
    monkeypatch.setattr(objectives.RetainTerm, "batch", batch)
    monkeypatch.setattr(utility_set, "_KNOWN", 99.0)
    monkeypatch.setattr(sampling, "_LONGEST_PROMPT", longest)
    result = run(story, retain=story.retain, learning_rate=1e-5, max_steps=4)
    assert len(result.history) == 4
    own = {tuple(story.tokenizer(text)["input_ids"]) for text in story.retain}
    of_the_model = [each for each in read if not any(t.ids in own for t in each)]
    assert len(of_the_model) == (4 if longest else 0)
    assert len(read) - len(of_the_model) == 4
    assert any("nothing held what the model answers" in note for note in result.notes) == (not longest)


def test_texts_set_apart_are_never_trained_on(story, monkeypatch):
    """No retain loss reads one of them, over more than an epoch of the others; of fewer texts, all are trained on."""
    read = set()

    def batch(self, indices, forget_indices):
        read.update(self.retain[i].ids for i in indices)
        return original(self, indices, forget_indices)

    original = objectives.RetainTerm.batch
    monkeypatch.setattr(objectives.RetainTerm, "batch", batch)
    result = run(story, retain=story.retain, learning_rate=1e-5, max_steps=8)
    assert len(result.history) == 8
    ids = {text: tuple(story.tokenizer(text)["input_ids"]) for text in story.retain}
    unread = {ids[text] for text in apart(story.retain)}
    assert read == set(ids.values()) - unread
    assert len(read) == 48
    assert result.utility.sequences == len(unread) == 12
    others = [text for text in story.retain if ids[text] not in unread]
    alone = run(story, retain=others[:19], learning_rate=1e-5, max_steps=1)
    assert alone.utility.measured_on == "retain set"
    assert any("also trained on" in note for note in alone.notes)
    assert not any("also trained on" in note for note in result.notes)


def test_texts_that_became_likelier_do_not_end_a_run():
    """They widen the interval of the rise, but not that of the losses, which decides where its upper end is smaller."""
    budget = Budget(UTILITY_BUDGET, np.array([1.6, 1.9, 2.1, 1.7]), 0.05)
    rise = budget.rise(budget.before * [0.7, 0.9, 1.0, 1.01])
    assert rise.interval[1] > 0.05
    assert 0 < rise.upper == rise.of_losses < 0.05
    assert not budget.exceeded(rise)
    lost = budget.rise(budget.before * [1.01, 1.02, 1.03, 1.02])
    assert lost.upper == lost.interval[1] == pytest.approx(lost.of_losses, rel=0.2)


@pytest.mark.full
def test_a_run_ends_by_the_budget_of_the_holdout(story):
    """Measured from outside it is within the budget at its end, and a note says what to do; resumed or not."""
    result = run(story, learning_rate=1e-3, holdout_budget=0.002)
    assert result.stopped == "holdout budget"
    assert {e.verdict for e in result.examples} == {"still exposed"}
    rejected = [record for record in result.history if record.get("rejection_reason")]
    assert len(rejected) >= 7
    assert {record["rejection_reason"] for record in rejected} == {"holdout budget"}
    assert all(record["utility_rise_upper"] <= 0.05 and record["holdout_rise_upper"] > 0.002 for record in rejected)
    assert result.utility.holdout_rise <= result.utility.holdout_budget == 0.002
    before, after = (tiny.negative_log_likelihoods(story, story.holdout, m) for m in (story.model, result.model))
    assert after.mean() / before.mean() - 1 == pytest.approx(result.utility.non_member_drift / before.mean(), abs=1e-5)
    assert any(note.startswith("The run ended because unseen text like the forget set") for note in result.notes)
    assert any("More holdout texts" in note for note in result.notes)


def test_without_a_budget_the_holdout_does_not_end_a_run(story):
    """The same run as above is then forgotten; without a retain set the holdout has the utility budget alone."""
    result = run(story, learning_rate=1e-3, holdout_budget=None)
    assert result.stopped == "forgotten"
    assert (result.utility.holdout_rise, result.utility.holdout_interval, result.utility.holdout_budget) == (None,) * 3
    assert all(record["holdout_rise"] is None for record in result.history if "accepted" in record)
    assert all(e.exposure_after <= NULL_MEAN for e in result.examples)
    result = run(story, retain=None, holdout_budget=0.0)
    assert result.stopped == "forgotten"
    assert (result.utility.measured_on, result.utility.holdout_budget) == ("holdout", None)


# ---------------------------------------------------------------- words


def test_notes_on_a_run_that_ended_by_a_budget():
    """Only where the mean rise was within the budget more texts are recommended; no other end has a note."""
    budgets = [Budget("utility budget", np.ones(3), 0.05), Budget("holdout budget", np.ones(4), 0.1)]
    for rise, count in ((0.04, 1), (0.06, 0), (None, 0)):
        history = [{"step": 1}, {"rejection_reason": "utility budget", "utility_rise": rise, "holdout_rise": 0.0}]
        notes = budget_notes("utility budget", history, budgets)
        assert len(notes) == count
        assert all("with 3 texts" in note and "More retain and holdout texts" in note for note in notes)
        assert budget_notes("over-unlearning", history, budgets) == []
    (note,) = budget_notes("holdout budget", [{"rejection_reason": "holdout budget", "holdout_rise": 0.2}], budgets)
    assert "more than 10% (holdout_budget)" in note


def test_the_progress_bar_shows_each_budget(monkeypatch):
    """The upper end of the interval, and what is allowed."""
    bar, shown = Progress(False), {}
    bar.shown, bar.task = True, 0
    bar.bar = type("Bar", (), {"update": lambda self, task, **fields: shown.update(fields)})()
    costs = [("utility", 0.049, 0.05), ("holdout", 0.021, 0.1)]
    for exponent, rate in (
        (0, ""),
        (2, " · learning rate 4 times its start"),
        (-1, " · learning rate 1/2 of its start"),
    ):
        bar.update(6, 200, 3, 1, costs, exponent, 0.8, "5 min")
        assert shown["say"] == (
            "step 6 of at most 200 · 2 of 3 settled · about 5 min left · "
            "utility at most +4.9% of 5% · holdout at most +2.1% of 10% "
            f"allowed{rate}"
        )
        assert (shown["completed"], shown["total"]) == (0.8, 1)
