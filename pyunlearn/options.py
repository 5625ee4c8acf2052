"""Options: one description of each setting for validation, the command line, settings files and the docs.

A configuration is a frozen dataclass whose fields are made with `option(default, kind, help)`:

    >>> @dataclass(frozen=True, kw_only=True)
    ... class Demo(Config):
    ...     steps: int = option(10, Whole(1), "Optimizer steps.")
    >>> Demo(steps=0)
    Traceback (most recent call last):
    pyunlearn.errors.ArgumentError: steps must be a whole number, 1 or more, got 0: leave it out for the default, 10
"""

from __future__ import annotations

import inspect
import json
import math
import numbers
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from pyunlearn.errors import ArgumentError, DataError, brief, nearest, path_fault

_LARGEST = 2**63 - 1  # whole number that arrays and generators of random numbers take, and JSON's readers
C = TypeVar("C", bound="Config")
F = TypeVar("F", bound=Callable[..., Any])


class Kind:
    """Set of values that an option accepts."""

    @property
    def wanted(self) -> str:
        """Description of the accepted values, as in "steps must be {wanted}"."""
        raise NotImplementedError

    def accepts(self, value: Any) -> bool:
        """Return True for an accepted value."""
        raise NotImplementedError

    def parse(self, word: str) -> Any:
        """Turn a word of the command line into a value. Raises ValueError where it cannot be one."""
        return word


@dataclass(frozen=True)
class Whole(Kind):
    """Whole numbers from `minimum` on, below 2**63; True and False are not accepted."""

    minimum: int = 0

    @property
    def wanted(self) -> str:
        return f"a whole number, {self.minimum} or more"

    def accepts(self, value: Any) -> bool:
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        return whole and self.minimum <= int(value) <= _LARGEST

    def parse(self, word: str) -> int:
        return int(word)


@dataclass(frozen=True)
class Number(Kind):
    """Finite real numbers between bounds; `above` and `below` exclude the bound itself."""

    minimum: float = -math.inf
    maximum: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    @property
    def wanted(self) -> str:
        low = f"{self.minimum:g} or more" if math.isfinite(self.minimum) else ""
        low = f"above {self.above:g}" if math.isfinite(self.above) else low
        high = f"at most {self.maximum:g}" if math.isfinite(self.maximum) else ""
        high = f"below {self.below:g}" if math.isfinite(self.below) else high
        bounds = " and ".join(part for part in (low, high) if part)
        return f"a number{', ' if bounds else ''}{bounds}"

    def accepts(self, value: Any) -> bool:
        try:
            x = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
        except OverflowError:  # a whole number of hundreds of digits
            return False
        return math.isfinite(x) and self.minimum <= x <= self.maximum and self.above < x < self.below

    def parse(self, word: str) -> float:
        return float(word)


@dataclass(frozen=True)
class Choice(Kind):
    """One of a few names."""

    names: tuple[str, ...]

    @property
    def wanted(self) -> str:
        return f"one of {', '.join(self.names)}"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and value in self.names


@dataclass(frozen=True)
class Flag(Kind):
    """True or False; no other truth value is accepted."""

    @property
    def wanted(self) -> str:
        return "True or False"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, bool)

    def parse(self, word: str) -> bool:
        if word.lower() not in ("true", "false"):
            raise ValueError(word)
        return word.lower() == "true"


@dataclass(frozen=True)
class Text(Kind):
    """Text that is not blank; `what` describes it in messages."""

    what: str = "a text that is not blank"

    @property
    def wanted(self) -> str:
        return self.what

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and bool(value.strip())


@dataclass(frozen=True)
class Several(Kind):
    """A list of one value or more of another kind, all different; `names`, if any, says which they may be."""

    each: Kind
    empty: bool = False

    @property
    def wanted(self) -> str:
        return f"a list of different values, each {self.each.wanted}"

    def accepts(self, value: Any) -> bool:
        if not isinstance(value, (list, tuple)) or not (value or self.empty):
            return False
        return all(self.each.accepts(x) for x in value) and len(set(value)) == len(value)

    def parse(self, word: str) -> tuple[Any, ...]:
        inside = word.strip().removeprefix("[").removesuffix("]")
        return tuple(self.each.parse(part.strip().strip("\"'")) for part in inside.split(",") if part.strip())


@dataclass(frozen=True)
class Table(Kind):
    """Dict with strings as keys."""

    @property
    def wanted(self) -> str:
        return "a dict of names and values"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)

    def parse(self, word: str) -> Any:
        return json.loads(word)


@dataclass(frozen=True)
class ChoiceOrObject(Kind):
    """One of a few names, or a Python object that `other` describes, such as a list of numbers."""

    names: tuple[str, ...]
    other: str

    @property
    def wanted(self) -> str:
        return f"{', '.join(map(repr, self.names))} or {self.other}"

    def accepts(self, value: Any) -> bool:
        return value in self.names if isinstance(value, str) else hasattr(value, "__len__")


@dataclass(frozen=True)
class Option:
    """Description of one setting, without its name and default."""

    kind: Kind
    help: str
    group: str
    optional: bool  # None is accepted
    fixed: bool  # a resumed run must have the same value
    flag: str | None  # on the command line; None: the name

    def checked(self, name: str, value: Any, default: Any) -> Any:
        """Return the value as a plain int, float or tuple.

        Raises ArgumentError, with the name, what is wanted, what came and how to correct it.
        """
        if value is None and self.optional:
            return None
        if not self.kind.accepts(value):
            alternative = " or None" if self.optional and default is not None else ""
            mend = "" if default is MISSING else ": leave it out for the default"
            mend += "" if default is MISSING or default is None else f", {default!r}"
            if isinstance(value, str) and isinstance(self.kind, Choice):
                mend = f": {nearest(value, self.kind.names)}"
            giant = isinstance(self.kind, Whole) and isinstance(value, numbers.Integral) and int(value) > _LARGEST
            wanted = "a whole number below 2**63" if giant else self.kind.wanted
            raise ArgumentError(f"{name} must be {wanted}{alternative}, got {brief(value)}{mend}")
        if isinstance(self.kind, Whole):
            return int(value)
        if isinstance(self.kind, Number):
            return float(value)
        return tuple(value) if isinstance(self.kind, Several) else value

    def parsed(self, name: str, word: str) -> Any:
        """Return the value of a word of the command line. Raises ArgumentError, see `checked`."""
        if word.lower() == "none" and self.optional:
            return None
        try:
            value = self.kind.parse(word)
        except (ValueError, TypeError):
            value = word
        return self.checked(name, value, MISSING)


def option(
    default: Any,
    kind: Kind,
    help: str,
    *,
    group: str = "Loop",
    optional: bool | None = None,
    fixed: bool = False,
    flag: str | None = None,
) -> Any:
    """Make a field of a `Config`.

    Args:
        default: the default value.
        kind: the accepted values.
        help: a sentence for the command line and the docs.
        group: heading under which the command line lists it.
        optional: True where None is accepted; by default where None is the default.
        fixed: True where a resumed run must have the same value.
        flag: name on the command line; None: the field's name.
    """
    metadata = {"option": Option(kind, help, group, default is None if optional is None else optional, fixed, flag)}
    if isinstance(default, Mapping):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one function; the constructor checks each value, and `check` their combination."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = f.metadata["option"].checked(f.name, getattr(self, f.name), default_of(f))
            object.__setattr__(self, f.name, value)
        self.check()

    def check(self) -> None:
        """Raise ArgumentError where two values contradict each other."""

    @classmethod
    def options(cls) -> dict[str, Option]:
        """Return name -> description, in the order of the fields."""
        return {f.name: f.metadata["option"] for f in fields(cls)}

    @classmethod
    def of(cls: type[C], config: Config | str | Path | None, settings: Mapping[str, Any], function: str) -> C:
        """Return the configuration of a call: `config`, or the file at that path, with the keywords' values replaced.

        Args:
            config: a configuration, a path for `read`, or None for the defaults.
            settings: keyword -> value.
            function: name of the function, for messages.

        Raises ArgumentError for an unknown keyword or a wrong value.
        """
        known = cls.options()
        for name in settings:
            if name not in known:
                raise ArgumentError(f"{function} has no option {name!r}: {nearest(name, known)}")
        if config is None:
            return cls(**settings)
        if isinstance(config, (str, Path)):
            config = cls.read(config)
        if not isinstance(config, cls):
            raise ArgumentError(f"config must be a {cls.__name__} or a path, got {type(config).__name__}")
        return replace(config, **settings)

    @classmethod
    def read(cls: type[C], path: str | Path) -> C:
        """Read a TOML file, or the settings of a result.json.

        Raises DataError where the file cannot be read or has another format; ArgumentError for a wrong name or value.
        """
        return cls(**read_settings(path, cls.options()))

    def to_dict(self) -> dict[str, Any]:
        """Return name -> value in JSON's types."""
        return {f.name: shown(getattr(self, f.name)) for f in fields(self)}

    def fixed(self) -> dict[str, Any]:
        """Return the settings that a resumed run must have in common with the interrupted run."""
        return {name: value for name, value in self.to_dict().items() if self.options()[name].fixed}


def default_of(f: Any) -> Any:
    """Return the default of a field of a Config."""
    return f.default if f.default is not MISSING else f.default_factory()


def read_settings(path: str | Path, known: Mapping[str, Option]) -> dict[str, Any]:
    """Return the settings in a TOML file, or those in `known` of a result.json, which holds more.

    Raises DataError and ArgumentError, see `Config.read`.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
        whole = json.loads(text) if file.suffix == ".json" else _toml(text)
    except OSError as error:
        raise DataError(f"the settings file {file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"the settings file {file} is neither TOML nor JSON: {error}") from error
    if file.suffix == ".json":
        settings = whole.get("settings", whole) if isinstance(whole, dict) else None
        if not isinstance(settings, dict):
            raise DataError(f'the settings file {file} has no "settings": give a result.json or a TOML file')
        return {name: value for name, value in settings.items() if name in known}
    for name in whole:
        if name not in known:
            raise ArgumentError(f"the settings file {file} has no option {name!r}: {nearest(name, known)}")
    return whole


def _toml(text: str) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib
    return dict(tomllib.loads(text))


def shown(value: Any) -> Any:
    """Return a value as JSON has it: itself, the beginning of a long text, or the name of its type."""
    if isinstance(value, (str, Path)):
        return str(value) if len(str(value)) <= 200 else str(value)[:200] + "..."
    if isinstance(value, Mapping):
        return {key: shown(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)) and len(value) <= 50 and all(isinstance(x, (str, int, float)) for x in value):
        return list(value)
    return value if isinstance(value, (int, float, bool, type(None))) else type(value).__name__


def accepts(config: type[Config]) -> Callable[[F], F]:
    """Decorate a function with `**settings`: its signature, and its docstring at {options}, list those of `config`."""

    def decorate(function: F) -> F:
        own = inspect.signature(function)
        keyword = inspect.Parameter.KEYWORD_ONLY
        settings = [
            inspect.Parameter(f.name, keyword, default=default_of(f), annotation=f.type) for f in fields(config)
        ]
        parameters = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        function.__signature__ = own.replace(parameters=[*parameters, *settings])  # type: ignore[attr-defined]
        if function.__doc__:  # Python 3.13 takes the indentation of the function's body away
            lines = [f"{name}: {o.help}" for name, o in config.options().items()]
            function.__doc__ = re.sub(r"(\n *)\{options\}", lambda m: m[1] + m[1].join(lines), function.__doc__)
        return function

    return decorate


def require(kind: Kind, **values: Any) -> None:
    """Raise ArgumentError for the first of some named values that the kind does not accept."""
    for name, value in values.items():
        Option(kind, "", "", False, False, None).checked(name, value, MISSING)


def require_path(name: str, value: Any) -> None:
    """Raise ArgumentError unless a value is None or a path: a string or a pathlib.Path, not empty, without a NUL."""
    fine = isinstance(value, (str, Path)) and str(value) != "" and "\0" not in str(value)
    if value is not None and not fine:
        raise ArgumentError(f"{name} must be the path of a file or folder, got {brief(value)}: give a string")
    if value is not None and (fault := path_fault(value)):
        raise ArgumentError(f"{name} cannot be used as a path: {fault}; give another")
