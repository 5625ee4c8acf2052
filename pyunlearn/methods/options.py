"""Options of a method: which numbers they may be, and how they are words of the command line."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pyunlearn.errors import ArgumentError

_ABOVE_ZERO = {"temperature", *((method, "beta") for method in ("npo", "simnpo", "kto", "dpo", "idkdpo", "altpo"))}
"""Divided by: by whatever method, or by that one."""
_ANY_SIGN = {"retain_tolerance", ("simnpo", "delta")}
_OTHERWISE_NONE = {("hinge", "delta")}


def check_numbers(method: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises ArgumentError for an option that is a number by default and is none now, or not one that the method can take.

    A sign that is wrong would turn what is to be forgotten into what is to be learned, and nothing would say so.
    """
    for name, value in given.items():
        keys = {name, (method, name)}
        if not (isinstance(defaults[name], float) or keys & _OTHERWISE_NONE) or (
            value is None and keys & _OTHERWISE_NONE
        ):
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if keys & _ANY_SIGN:
            wanted, right = "a number", number
        elif keys & _ABOVE_ZERO:
            wanted, right = "a number above 0", number and value > 0
        else:
            wanted, right = "a number, 0 or more", number and value >= 0
        if not right:
            raise ArgumentError(f"{name} must be {wanted}, got {value!r}")


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
