"""Exceptions that pyunlearn raises for a wrong argument, text or model, or a failed run.

    Exception
    └── PyunlearnError                      base class of all
        ├── ArgumentError   (ValueError)    an option: unknown name, out of range, in conflict with another
        ├── DataError       (ValueError)    the texts: missing or empty file, no usable column, too long
        ├── ModelError      (ValueError)    the model or tokenizer: no head, cannot be loaded
        ├── OutputError     (OSError)       the output folder: not empty, not writable
        ├── DependencyError (ImportError)   an optional package that is needed and not installed
        └── TrainingError   (RuntimeError)  the run: NaN or Inf before the first step

Each class is also a subclass of the built-in exception in parentheses. Each message is one sentence: the argument, what
is wanted, what came, how to correct it. It quotes no text to forget, and its control characters are escaped.
"""

import os
import re
import reprlib
import unicodedata
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
    "brief",
    "first_line",
    "missing_packages",
    "nearest",
    "path_fault",
    "printable",
]

_SUSPECT = re.compile(r"[^\x20-\x7e\u00a1-\u00ac\u00ae-\u02ff]")  # anything else is looked up, character by character
_JOINERS = "\u200c\u200d"  # invisible, but part of words in Persian and Hindi, and of emoji


def printable(text: str) -> str:
    r"""Return a text with its control characters escaped, so that a terminal, a log or a page only shows them.

    Escaped are the codes of a terminal, line breaks, marks that reverse the direction of a line, and other invisible
    characters.

    >>> printable("a \x1b[2J\u202eb")
    'a \\x1b[2J\\u202eb'
    """
    return _SUSPECT.sub(_escaped, text)


def path_fault(path: str | os.PathLike[str]) -> str | None:
    """Return why a path can be none in this file system, or None: too long, forbidden, or not valid Unicode."""
    try:
        os.fsencode(path)
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or getattr(error, "reason", None) or type(error).__name__
    return None


def _escaped(match: re.Match[str]) -> str:
    character = match[0]
    if unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp") or character in _JOINERS:
        return character
    return character.encode("unicode_escape").decode()


class PyunlearnError(Exception):
    """Base class of the errors that pyunlearn raises."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ArgumentError(PyunlearnError, ValueError):
    """Wrong value of an option."""


class DataError(PyunlearnError, ValueError):
    """Texts that cannot be used."""


class ModelError(PyunlearnError, ValueError):
    """Model or tokenizer that cannot be used."""


class OutputError(PyunlearnError, OSError):
    """Raised where the result cannot be written to the output folder."""


class DependencyError(PyunlearnError, ImportError):
    """Missing optional package."""


class TrainingError(PyunlearnError, RuntimeError):
    """Failed run without an accepted state to return."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class where there is none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def brief(value: object) -> str:
    """Return a value as Python code, cut to a few words; its type where Python does not print it.

    >>> brief([1, "a"]), brief(10**5000)
    ("[1, 'a']", 'a value of type int')
    """
    try:
        return reprlib.repr(value)
    except ValueError:  # a whole number of thousands of digits
        return f"a value of type {type(value).__name__}"


def missing_packages(feature: str, *packages: str, otherwise: str = "") -> DependencyError:
    """Return the error for a feature whose optional packages are not installed, with the command that installs them.

    Args:
        feature: what needs the packages, the subject of the sentence.
        packages: their names on the package index.
        otherwise: what to do instead, the end of the sentence.

    >>> print(missing_packages("the plot", "matplotlib", otherwise="leave it out (--no-plot)"))
    the plot needs matplotlib, not installed here: run `pip install matplotlib`, or leave it out (--no-plot)
    """
    alternative = f", or {otherwise}" if otherwise else ""
    return DependencyError(
        f"{feature} needs {' and '.join(packages)}, not installed here: run `pip install {' '.join(packages)}`"
        f"{alternative}"
    )


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the nearest choice, or all choices where none is near.

    >>> nearest("nqo", ["npo", "ga"]), nearest("xyz", ["npo", "ga"])
    ('did you mean "npo"?', 'choose from ga, npo.')
    """
    known = {choice.lower(): choice for choice in choices}
    close = get_close_matches(name.lower(), known, n=1)
    return f'did you mean "{known[close[0]]}"?' if close else f"choose from {', '.join(sorted(known.values()))}."
