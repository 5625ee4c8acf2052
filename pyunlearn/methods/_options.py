"""Options of a method as words of the command line."""

import json
from collections.abc import Sequence
from typing import Any

from pyunlearn.errors import ArgumentError


def options_of(words: Sequence[str]) -> dict[str, Any]:
    """name=value words as options: the value as JSON where it is some, and as it stands where it is not. Raises ArgumentError for another word."""
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise ArgumentError(f"an option is set as name=value, got {word!r}")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found
