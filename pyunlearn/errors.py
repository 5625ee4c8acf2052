"""Every exception that pyunlearn raises for a user's mistake or a run gone wrong.

    Exception
    └── PyunlearnError                      catch this one to catch them all
        ├── ArgumentError   (ValueError)    an option: unknown name, out of range, two that exclude each other
        ├── DataError       (ValueError)    the text: missing or empty file, no usable column, too long, unscored
        ├── ModelError      (ValueError)    the model or tokenizer: no head, not loadable, not a language model
        ├── OutputError     (OSError)       the place to write to: not empty, not writable
        ├── DependencyError (ImportError)   an optional package that this input needs and that is not installed
        └── TrainingError   (RuntimeError)  the run itself: NaN or Inf before any good state

Each is also the built-in exception that a caller would expect, so `except ValueError` works as well. Each message is
one sentence: what is wrong, what was wanted, what came, how to mend it.
"""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "ArgumentError",
    "DataError",
    "DependencyError",
    "ModelError",
    "OutputError",
    "PyunlearnError",
    "TrainingError",
    "nearest",
]


class PyunlearnError(Exception):
    """The base of every error that pyunlearn raises on purpose."""


class ArgumentError(PyunlearnError, ValueError):
    """An option has a value that it cannot have."""


class DataError(PyunlearnError, ValueError):
    """The text given cannot be used as it is."""


class ModelError(PyunlearnError, ValueError):
    """The model or tokenizer given cannot be used."""


class OutputError(PyunlearnError, OSError):
    """The result cannot be written where it was asked for."""


class DependencyError(PyunlearnError, ImportError):
    """An optional package is needed and missing."""


class TrainingError(PyunlearnError, RuntimeError):
    """The run broke down and there is no good state to return."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """The end of a sentence about an unknown `name`: 'did you mean "npo"?', or all the choices when none is near."""
    known = {choice.lower(): choice for choice in choices}
    close = get_close_matches(name.lower(), known, n=1)
    return f'did you mean "{known[close[0]]}"?' if close else f"choose from {', '.join(sorted(known.values()))}."
