"""Checks of retain set and holdout: what is refused, what is left out and reported, and how often by chance."""

import warnings

import numpy as np
import pytest
import tiny

from pyunlearn.data import check_texts, read_examples, score_note
from pyunlearn.data.comparison import length_note
from pyunlearn.errors import DataError

SECRET = "The boat left the harbour at dawn, and nobody on the island ever saw it again."
COPY = "Dear aunt! THE BOAT left the harbour at dusk and nobody on the island ever saw it again. Yours, Tom"
ANSWER = (
    "They meet behind the old mill on the first night of each month, and they bring neither lamps nor dogs with them."
)


def check(**texts):
    """Check the texts of each role; without the reading."""
    return check_texts({role: read_examples(rows, role=role) for role, rows in texts.items()})


def completions(examples):
    return [e.completion for e in examples]


def refusal(**texts):
    """Return the one sentence with which these texts are refused."""
    with pytest.raises(DataError) as error:
        check(**texts)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_texts_without_overlap_are_left_as_they_are():
    """No note and no warning."""
    texts = {"forget": [SECRET, ANSWER], "retain": tiny.sentences(9, 1), "holdout": tiny.sentences(40, 2)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checked = check(**texts)
    assert {role: completions(each) for role, each in checked.examples.items()} == texts
    assert checked.notes == []


def test_copies_within_the_forget_set_are_one_group():
    """Exact and near ones, and one inside a longer text; each stays where it is, and the note has no warning."""
    forget = [SECRET, ANSWER, COPY, "Some other text.", ANSWER.replace("lamps", "lights"), SECRET.upper()]
    checked = check(forget=forget)
    assert completions(checked.examples["forget"]) == forget
    assert checked.notes == [
        "5 of 6 forget texts are copies or near copies of others, in 2 groups, and each has its own verdict: "
        "examples 1, 3, 6; 2, 5."
    ]
    assert (
        "in 1 group, and each has its own verdict: examples 2, 3."
        in check(forget=["One text."] + [SECRET] * 2).notes[0]
    )
    forms = [
        f"The secret word that the old miller told his daughter in the year of the flood is name{i}." for i in range(9)
    ]
    assert check(forget=forms).notes == []


def test_a_note_on_many_groups_is_short():
    """Five groups of five numbers at most; the others are counted."""
    forget = [text for text in tiny.sentences(7, 3) for _ in range(7)]
    note = check(forget=forget).notes[0]
    assert note.startswith("49 of 49 forget texts are copies or near copies of others, in 7 groups, and each has ")
    assert ": examples 1, 2, 3, 4, 5 and 2 more; 8, 9, 10, 11, 12 and 2 more; " in note
    assert note.endswith("; and 2 more groups.")


def test_a_copy_in_the_holdout_is_refused():
    """The sentence names both texts, by number, and says what to do."""
    holdout = tiny.sentences(20, 2)
    message = refusal(forget=["Some other text.", SECRET], holdout=[*holdout[:4], COPY, *holdout[4:]])
    assert message == (
        "holdout example 5 is a copy, or nearly one, of forget example 2: take it out, for the holdout is text that "
        "was never trained on"
    )
    assert ", and 2 more are too: take" in refusal(forget=[SECRET], holdout=[*holdout, SECRET, COPY, SECRET.upper()])


def test_a_part_of_a_forget_text_in_the_holdout_is_refused():
    """The forget text is long, and its paragraph was trained on as well."""
    assert "is a copy" in refusal(forget=[f"{ANSWER} {SECRET} {ANSWER.upper()}"], holdout=[SECRET])


def test_an_answer_alone_is_a_copy_where_it_is_long():
    """The question may be another one; a short answer comes by chance. Another answer to the question is no copy."""

    def row(question, answer):
        return {"question": question, "answer": answer}

    forget = [row("Where do the smugglers of the bay meet, and when do they do so?", ANSWER)]
    assert "is a copy" in refusal(forget=forget, holdout=[row("What is known?", ANSWER.replace("lamps", "lights"))])
    short = [row("Where do the smugglers of the bay meet, and when do they do so?", "At the mill.")]
    assert not check(forget=short, holdout=[row("Where is it?", "At the mill.")]).notes
    assert not check(forget=short, holdout=[row(short[0]["question"], "In a church.")]).notes
    long = f"{ANSWER} So it was told. When did they meet?"
    assert not check(forget=[row(long, "Last night.")], holdout=[row(long, "On Sunday.")]).notes
    assert "is a copy" in refusal(forget=short, holdout=[row(short[0]["question"].upper(), "At the mill!")])


def test_copies_in_retain_are_left_out_with_a_warning():
    """The others stay in order; the note is the warning, and has numbers but no text."""
    retain = tiny.sentences(9, 1)
    with pytest.warns(UserWarning, match="2 of 11 retain texts are copies of forget texts and are left out") as caught:
        checked = check(forget=[SECRET], retain=[retain[0], COPY, *retain[1:], SECRET])
    assert completions(checked.examples["retain"]) == retain
    assert checked.notes == ["2 of 11 retain texts are copies of forget texts and are left out: retain examples 2, 11."]
    assert str(caught[0].message) == checked.notes[0]


def test_retain_of_copies_alone_is_refused():
    """Nothing is left to keep."""
    assert refusal(forget=[SECRET], retain=[COPY, SECRET]).startswith(
        "all retain texts are copies of forget texts, so "
    )
    assert refusal(forget=[SECRET], retain=SECRET).startswith("the retain text is a copy of a forget text, so ")


def test_repeated_non_members_count_once():
    """Equal after case and punctuation; the first of each stays."""
    holdout = tiny.sentences(25, 2)
    with pytest.warns(UserWarning, match="3 of 28 holdout texts repeat others"):
        checked = check(forget=[SECRET], holdout=[*holdout, holdout[3].upper(), holdout[3], f"{holdout[7]}!!"])
    assert completions(checked.examples["holdout"]) == holdout
    assert checked.notes == ["3 of 28 holdout texts repeat others and are left out: 25 different ones count."]


def test_nineteen_different_ones_are_needed():
    """18 texts do not become 36 by being there twice."""
    few, enough = tiny.sentences(18, 2), tiny.sentences(19, 2)
    message = refusal(forget=[SECRET], holdout=few * 2)
    assert "of the holdout's 36 texts only 18 are different: give a holdout of 19 different texts" in message
    with pytest.warns(UserWarning, match="1 of 20 holdout texts repeats another one"):
        assert len(check(forget=[SECRET], holdout=[*enough, enough[0]]).examples["holdout"]) == 19


def test_a_holdout_of_another_length_is_noted():
    """By the completions, which are what is scored."""
    rows = [{"prompt": p, "completion": f"{ANSWER} {SECRET}"} for p in ("And then? " * 9, "What? ")]
    note = check(forget=rows, holdout=tiny.sentences(20, 2)).notes[-1]
    assert note.startswith("The holdout is of another length than the forget set: 11 words at the median, where the ")
    assert "where the forget texts have 38. Longer" in note
    assert not check(forget=[SECRET], holdout=tiny.sentences(20, 2)).notes


LENGTHS = {
    "log-normal, narrow": lambda r, n: r.lognormal(3, 0.3, n),
    "log-normal, wide": lambda r, n: r.lognormal(3, 1.0, n),
    "gamma": lambda r, n: r.gamma(1.5, 20, n),
    "short and long": lambda r, n: np.where(r.random(n) < 0.5, 4.0, 60.0) * r.lognormal(0, 0.2, n),
}


@pytest.mark.full
@pytest.mark.parametrize("law", LENGTHS)
@pytest.mark.parametrize(("n", "m"), [(1, 19), (3, 19), (20, 64), (100, 200)])
def test_a_holdout_of_the_same_source_is_seldom_reported(law, n, m):
    """In 2000 draws at most 1 in 100, up to the error of the count (3 standard deviations of 20)."""
    r = np.random.default_rng([n, m])
    draws = [np.ceil(LENGTHS[law](r, n + m)) for _ in range(2000)]
    assert sum(bool(length_note(x[:n], x[n:])) for x in draws) <= 20 + 3 * np.sqrt(20)


@pytest.mark.parametrize(("n", "m", "factor"), [(1, 19, 7), (3, 19, 3.5), (20, 64, 2.5)])
def test_another_length_is_detected(n, m, factor):
    """Longer or shorter by that factor, lengths of one set spread by 0.4 in the logarithm: 8 of 10 draws or more."""
    r = np.random.default_rng(0)
    for scale in (factor, 1 / factor):
        draws = [(60 * scale * r.lognormal(0, 0.4, n), 60 * r.lognormal(0, 0.4, m)) for _ in range(200)]
        assert sum(bool(length_note(*draw)) for draw in draws) >= 160


def test_texts_all_of_one_length():
    """Without spread there is no error of the mean to divide by."""
    assert length_note([7], [7] * 19) == length_note([7], [13] * 19) == []
    assert length_note([7], [30] * 19)
    assert length_note([30], [7] * 19)
    assert length_note([5], [50]) == []


@pytest.mark.full
def test_other_scores_under_the_reference_model_are_noted():
    """The shift and the p-value, in either direction; by chance in 1 of 1000 draws."""
    r = np.random.default_rng(1)
    forget, holdout = r.normal(3, 0.5, 30), r.normal(4, 0.5, 60)
    shift = np.median(holdout) - np.median(forget)
    assert score_note(forget, holdout)[0].startswith(
        f"Under the reference model the holdout is {shift:.2f} nats a token less likely than the forget set (Mann-"
    )
    assert f"{shift:.2f} nats a token more likely" in score_note(holdout, forget)[0]
    draws = [r.gamma(3, 1, 80) for _ in range(2000)]
    assert sum(bool(score_note(x[:20], x[20:])) for x in draws) <= 2 + 3 * np.sqrt(2)
    assert score_note(np.ones(5), np.ones(20)) == []
