"""Parser of method options given as words of the command line."""

import json
from collections.abc import Sequence
from typing import Any

from pyunlearn.errors import ArgumentError


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """Return the options in words name=value: JSON where it is valid JSON, none as None, anything else as text.

    Raises ArgumentError for a word without a name or a value; `resolve` checks whether the method has the option.

    >>> parse_options(["beta=0.5", "direction=toward"])
    {'beta': 0.5, 'direction': 'toward'}
    """
    options: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        name, value = name.strip().replace("-", "_"), value.strip()
        if not equals or not name or not value:
            raise ArgumentError(f"an option of a method is set as name=value, got {word!r}")
        try:
            options[name] = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            options[name] = None if value.lower() == "none" else value
    return options


def parse_options_by_method(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return method -> options from words METHOD.name=value. Raises ArgumentError for another word.

    >>> parse_options_by_method(["npo.beta=0.5"])
    {'npo': {'beta': 0.5}}
    """
    options: dict[str, dict[str, Any]] = {}
    for word in words:
        method, dot, rest = word.partition(".")
        if not dot or "=" in method:
            raise ArgumentError(f"an option of a method is set as METHOD.name=value, got {word!r}")
        options.setdefault(method.strip().lower(), {}).update(parse_options([rest]))
    return options
