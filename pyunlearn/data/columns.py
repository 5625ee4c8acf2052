"""Check the values of a row of a user's file: strings that a tokenizer can read."""

from __future__ import annotations

import unicodedata

from pyunlearn.errors import DataError

__all__ = ["string_of", "strings_of"]

_INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")  # categories of characters of which nothing is seen


def string_of(value: object, name: str, where: str, *, blank: bool = False) -> str:
    """Return the value of a column. Raises DataError unless it is a string of valid Unicode that shows something.

    Args:
        value: what the row has.
        name: the column.
        where: name of the row, for messages.
        blank: True where it may be empty.
    """
    if not isinstance(value, str):
        raise DataError(f'{where} must have a string as "{name}", and has a value of type {type(value).__name__}')
    if not blank and all(unicodedata.category(c) in _INVISIBLE for c in set(value)):
        raise DataError(f'{where} has an empty "{name}": fill it in, or drop it')
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair: valid in JSON, in no tokenizer
        at = f"character {error.start + 1} is half of a surrogate pair"
        raise DataError(f'{where} has a "{name}" that is not valid Unicode: {at}; mend or remove it') from error
    return value


def strings_of(value: object, where: str) -> tuple[str, ...]:
    """Return the strings of a "forget", without repetitions."""
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not all(isinstance(each, str) for each in values):
        got = type(value).__name__
        raise DataError(f'{where} must have a string or a list of strings as "forget", and has a value of type {got}')
    return tuple(dict.fromkeys(string_of(each, "forget", where) for each in values))
