"""The note of a run whose records stand out in another form than the one in which they were forgotten."""

import numpy as np
import planted
import pytest
import tiny

import pyunlearn
from pyunlearn.attacks.target import Trial
from pyunlearn.data import encode, read_examples
from pyunlearn.data.rendering import Rendering
from pyunlearn.errors import ModelError
from pyunlearn.unlearning.attacked import standing_out


def forms_of(rng, known=0, records=12, non_members=80):
    """Scores of records and of unseen ones in two forms that depend on each other; of the first some are known."""
    own = rng.normal(size=records + non_members)
    scores = [own + rng.normal(size=own.size) * width for width in (0.3, 1.0)]
    scores[0][:known] -= 5
    return {str(k): Trial(str(k), x[:records], x[records:]) for k, x in enumerate(scores)}


@pytest.mark.full
def test_of_unseen_records_one_set_in_twenty_stands_out_at_most():
    """In any of the forms together."""
    rng, draws = np.random.default_rng(0), 300
    named = sum(standing_out(forms_of(rng), range(12), 0.05, seed) is not None for seed in range(draws))
    assert named <= draws * 0.05 + 2.5 * np.sqrt(draws * 0.05 * 0.95)


def test_records_that_are_known_in_one_form_are_named():
    """With their number; copies of one record count once."""
    trials = forms_of(np.random.default_rng(0), known=6)
    known = standing_out(trials, range(12), 0.05, 0)
    assert (known.form, known.tested) == ("0", 12)
    assert 6 <= known.returned <= 8
    assert standing_out(trials, [0] * 6 + [*range(6, 12)], 0.05, 0) is None


def test_records_that_were_not_tested_are_not_counted():
    """A form that no record has says nothing."""
    trials = forms_of(np.random.default_rng(0), known=6)
    trials["0"].forget[4:] = np.nan
    assert standing_out(trials, range(12), 0.05, 0).tested == 4
    trials["0"].forget[0] = np.nan
    assert standing_out(trials, [0, 0, *range(1, 11)], 0.05, 0).tested == 3  # of two copies the one that was tested
    trials["0"].forget[:] = np.nan
    assert standing_out(trials, range(12), 0.05, 0) is None


def run(w, model, **options):
    """A run of one step in the form in which the records are written, and its notes on other forms."""
    texts = {"retain": w.retain, "holdout": w.holdout, "tokenizer": w.tokenizer, "template": "none", "progress": False}
    result = pyunlearn.unlearn(model, w.forget, max_steps=1, **texts | options)
    return [note for note in result.notes if "In another one" in note]


@pytest.mark.full
def test_a_run_says_where_its_records_stand_out_in_another_form(one_thread):
    """The model has read them with labels too; with the attack `rendering` or without a holdout there is no note."""
    w = planted.world()
    rows = read_examples(w.forget, role="x")
    labelled = [Rendering("plain", "plain", everything=True).of(e) for e in rows]
    both = encode([*labelled, *rows], w.tokenizer, role="x", max_length=None)
    model = planted.tuned(w, lambda likelihood: planted.nll(w, likelihood, both).mean() - 0.05, steps=150)
    (note,) = run(w, model)
    assert '"Question: ... Answer: ..."' in note
    assert "8 of 8 records" in note
    assert "without `template`" in note
    assert run(w, model, attacks=["rendering"]) == []
    assert run(w, model, holdout=None) == []
    assert len(run(w, model, holdout=tiny.facts(120, 3), false_discovery_rate=0.02)) == 1  # takes 99 non-members


@pytest.mark.full
def test_a_note_that_cannot_be_made_ends_no_run(answers, monkeypatch):
    """The run is finished by then: it says what the error was."""

    def fails(*_):
        raise ModelError("the model is gone")

    monkeypatch.setattr("pyunlearn.unlearning.attacked.in_forms", fails)
    texts = {"holdout": answers.holdout, "tokenizer": answers.tokenizer, "progress": False}
    result = pyunlearn.unlearn(answers.fresh(), answers.forget, max_steps=1, **texts)
    assert "The records were not read in another form: the model is gone." in result.notes
