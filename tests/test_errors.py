"""The tree of errors, and the hint about a misspelled name."""

from pyunlearn import errors
from pyunlearn.errors import ArgumentError, OutputError, PyunlearnError, nearest, printable


def test_every_error_is_in_the_tree_and_a_builtin_too():
    """`except PyunlearnError` catches them all, and the docstring draws them all."""
    for name in errors.__all__:
        kind = getattr(errors, name)
        if isinstance(kind, type) and kind is not PyunlearnError:
            builtin = kind.__mro__[2]
            assert issubclass(kind, PyunlearnError)
            assert f"{name} " in errors.__doc__
            assert f"({builtin.__name__})" in errors.__doc__
            assert str(kind("a sentence.")) == "a sentence."


def test_a_message_shows_control_characters():
    """A file name or a text can hold them; a terminal would obey."""
    for kind in (ArgumentError, OutputError):
        assert str(kind("a\x1b]0;x\x07b\nc\x9b\u202ed")) == r"a\x1b]0;x\x07b\nc\x9b\u202ed"
    assert printable("Zürich 東京 👩\u200d👧 \ud83d") == "Zürich 東京 👩\u200d👧 \\ud83d"


def test_nearest_suggests_or_else_lists():
    """A typo gets the nearest name, anything else gets them all."""
    assert nearest("NPOO", ["ga", "npo", "simnpo"]) == 'did you mean "npo"?'
    assert nearest("xyzzy", ["npo", "ga"]) == "choose from ga, npo."
