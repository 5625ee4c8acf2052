"""Options of a method as words of the command line."""

import json
from collections.abc import Sequence
from typing import Any

from pyunlearn.errors import ArgumentError


def options_of(words: Sequence[str]) -> dict[str, Any]:
    """name=value words as options: numbers, lists, true, false and null as JSON has them, none as None, all else as text.

    Raises ArgumentError for a word without a name or a value; whether the method has such an option, `resolve` says.
    """
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        name, value = name.strip().replace("-", "_"), value.strip()
        if not equals or not name or not value:
            raise ArgumentError(f"an option of a method is set as name=value, got {word!r}")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = None if value.lower() == "none" else value
    return found


def options_by_method(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """METHOD.name=value words as method -> options. Raises ArgumentError for another word."""
    found: dict[str, dict[str, Any]] = {}
    for word in words:
        method, dot, rest = word.partition(".")
        if not dot or "=" in method:
            raise ArgumentError(f"an option of a method is set as METHOD.name=value, got {word!r}")
        found.setdefault(method.strip().lower(), {}).update(options_of([rest]))
    return found
