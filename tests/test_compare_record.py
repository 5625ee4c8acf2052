"""Saved settings and scores that differ from those of a comparison are named."""

import pytest

from pyunlearn.comparing.record import scores_difference, settings_difference

SETTINGS = {"tau": 0.95, "seed": 0, "methods": ("ga", "npo"), "mask": None, "method_options": {"ga": {"beta": 1.0}}}
SAVED = SETTINGS | {"methods": ["ga", "npo"]}  # as JSON gives it back
SCORES = {"forget": [1.5, 2.5], "non_members": [3.0, 4.0]}


def test_equal_settings_do_not_differ():
    """A tuple comes back as a list; what only the saved run has is not compared."""
    assert settings_difference(SAVED, SETTINGS) is None
    assert settings_difference(SAVED | {"torch": "2"}, SETTINGS) is None


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_that_differs_is_named(name):
    """Both values are in the sentence."""
    message = settings_difference(SAVED, SETTINGS | {name: "other"})
    assert message == f"{name}={SAVED[name]!r}, not 'other'"


def test_a_setting_that_the_saved_run_lacks_is_named():
    """A run of an older version did not have it."""
    saved = {name: value for name, value in SAVED.items() if name != "tau"}
    assert settings_difference(saved, SETTINGS) == "tau=None, not 0.95"


def test_scores_that_differ_by_rounding_are_the_same():
    """The same texts on other hardware; a difference of a thousandth is another model."""
    assert scores_difference(SCORES, SCORES) is None
    assert scores_difference(SCORES, SCORES | {"forget": [1.50005, 2.5]}) is None
    assert scores_difference(SCORES, SCORES | {"forget": [1.5015, 2.5]}) == "another model or other forget texts"


@pytest.mark.parametrize("scores", [[3.0], [3.0, 4.0, 5.0], [4.0, 3.0]])
def test_scores_of_other_texts_are_named(scores):
    """Fewer, more, or in another order."""
    assert scores_difference(SCORES, SCORES | {"non_members": scores}) == "another model or other non-members texts"


def test_scores_of_a_role_that_the_saved_run_lacks_are_named():
    """It was made without a holdout, for example."""
    assert scores_difference(SCORES, SCORES | {"utility": [1.0]}) == "another model or other utility texts"
