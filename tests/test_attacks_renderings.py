"""The attack `rendering`: records with a prompt, in the forms in which they were not trained on."""

import pytest
import tiny
import torch

import pyunlearn


def attack(world, **options):
    """The attack on a model."""
    settings = {"forget": world.forget, "holdout": world.holdout, "tokenizer": world.tokenizer, "template": "plain"}
    return pyunlearn.attack(world.fresh(), attacks=["rendering"], progress=False, **settings | options)


def names(result):
    """The names of the forms that were tried."""
    return [t.name for t in result.trials[1:]]


def test_records_are_read_in_every_other_form(answers):
    """Each form is compared with the holdout's texts in the same form, and the text as it is is none of them."""
    result = attack(answers)
    assert names(result) == [f"rendering, {key}" for key in ("short", "none", "joined", "alone")]
    assert all((t.tested, t.judged) == (len(answers.forget), True) for t in result.trials)
    others = names(attack(answers, template="none"))
    assert others == [f"rendering, {key}" for key in ("plain", "short", "joined", "alone")]


def test_with_the_original_only_the_forms_that_it_knew_count(answers):
    """The untrained model knows the records in none, and each form has a note."""
    torch.manual_seed(0)
    forget, untrained = answers.forget + answers.retain[:6], type(answers.model)(answers.model.config)
    known = attack(answers, original=answers.fresh(), forget=forget)
    unknown = attack(answers, original=untrained, forget=forget)
    assert "rendering, none" in names(known)
    assert names(unknown) == []
    assert sum("does not stand out by them under the original model" in note for note in unknown.notes) == 4


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"forget": tiny.sentences(2, 1), "holdout": tiny.sentences(60, 2), "template": "auto"},
            "no record has a prompt that could be written in another form",
        ),
        ({"holdout": None}, "takes a holdout of the forget set's kind"),
    ],
)
def test_where_it_cannot_be_tried_a_note_says_why(options, reason, answers):
    """The attack is left out; the others are not stopped by it."""
    result = attack(answers, **options)
    assert any("rendering was left out" in note and reason in note for note in result.notes)


def test_records_in_windows_are_left_out(answers):
    """A window has no prompt of its own, so a form of it would be another text: here the whole answer."""
    long = {"question": " ".join(tiny.sentences(5, 5)), "answer": " ".join(tiny.sentences(5, 6))}
    result = attack(answers, forget=[long, *answers.forget], template="none")
    assert len(result.examples) > 1 + len(answers.forget)
    assert {t.tested for t in result.trials[1:]} == {len(answers.forget)}
