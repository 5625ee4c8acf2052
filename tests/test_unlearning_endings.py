"""One sentence on what to change after a run that did not settle every record."""

import random

import pytest
import tiny
from unlearning_runs import run

from pyunlearn.unlearning.endings import advice

SEEN = {"left": ["3", "5"], "memorized": 8, "visits": 64.0, "budget_used": 0.1, "limit": None, "has_retain": True}
SEEN["method"] = "wga"


@pytest.mark.parametrize(
    ("stopped", "change", "expected"),
    [
        ("max_steps", {"limit": 20}, "leave out max_steps, or raise it"),
        ("max_steps", {}, 'only 10% of the budget was used; method="auto"'),
        ("max_steps", {"budget_used": 0.9, "method": "match"}, "most of the budget was used; more retain texts"),
        ("still extracted", {}, 'method="auto" would help'),
        ("still extracted", {"method": "match"}, "a smaller target_exposure would help"),
        ("utility budget", {}, "a larger utility_budget would help"),
        ("utility budget", {"has_retain": False}, "a retain set (retain=) would help"),
        ("holdout budget", {}, "a larger holdout_budget would help"),
        ("undone by the merge", {}, "too small for the dtype of the weights; leave out merge"),
        ("undone by the merge", {"rounds": True}, "too small for the formats of the GGUF file; a run without an"),
    ],
)
def test_the_note_names_the_option_and_the_texts(stopped, change, expected):
    """It follows from what the run saw."""
    (note,) = advice(stopped, **SEEN | change)
    assert note.startswith("2 of 8 memorized texts (numbers 3, 5) are left")
    assert expected in note


def test_other_ends_have_no_note():
    """Nothing is left to do, or the user ended the run; of many texts five are named."""
    for stopped in ("forgotten", "nothing memorized", "interrupted", "not finite"):
        assert advice(stopped, **SEEN) == []
    assert advice("max_steps", **SEEN | {"left": []}) == []
    assert advice("max_steps", **SEEN | {"limit": 0}) == []
    (note,) = advice("max_steps", **SEEN | {"left": [str(i) for i in range(1, 10)], "memorized": 9})
    assert "(numbers 1, 2, 3, 4, 5 and others) are left" in note


@pytest.mark.full
def test_a_text_that_the_run_has_taught_is_named():
    """It was not memorized, and the retain set holds it in other words; without these there is no such note."""
    story = tiny.storyteller()
    draw, words = random.Random(0), [word for text in story.corpus for word in text.split()]

    def reworded():
        replaced = draw.sample(range(len(text)), len(text) // 4)
        return " ".join(draw.choice(words) if i in replaced else word for i, word in enumerate(text))

    text = story.unseen[0].split()
    copies = [reworded() for _ in range(80)]
    for retain, expected in ((story.corpus + copies, ["Text 3 stands out after the run"]), (story.corpus, [])):
        result = run(story, story.forget + story.unseen[:1], retain=retain, retain_loss="nll", retain_weight=20.0)
        assert result.examples[2].verdict == "not memorized"
        assert [note.partition(",")[0] for note in result.notes if "stands out" in note] == expected
