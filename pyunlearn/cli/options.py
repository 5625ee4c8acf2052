"""Options of the command line: aliases for those that several commands share, and the options of a `Config`."""

from __future__ import annotations

import functools
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from pyunlearn.data.config import ChoiceOrFile
from pyunlearn.errors import ArgumentError, DataError
from pyunlearn.models.config import LoadOptions
from pyunlearn.options import (
    Choice,
    ChoiceOrObject,
    Config,
    Flag,
    Kind,
    Number,
    Option,
    Several,
    Table,
    Whole,
    default_of,
    read_settings,
)

PANELS = ("Data", "Method", "Loop", "Model", "Output")
"""The groups of options in the help, in this order."""

FORMATS = ".jsonl .json .csv .tsv .txt .parquet"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A folder that save_pretrained wrote, a .gguf file, or a name on the Hugging Face hub."
    ),
]
Forget = Annotated[
    Path,
    typer.Option(
        metavar="FILE",
        help=f"The texts to forget: {FORMATS}, or - for standard input; with text, prompt and completion, question and "
        "answer, or chat messages.",
        rich_help_panel="Data",
    ),
]
Retain = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Text that must keep working; utility is measured on it.", rich_help_panel="Data"
    ),
]
Holdout = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Text of the same kind that was never trained on, 19 texts or more: the best evidence. Default: texts "
        "written for this package, or sampled from the model where these cannot serve.",
        rich_help_panel="Data",
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Folder or name of the tokenizer. Default: that of the model.", rich_help_panel="Model"
    ),
]
ReferenceModel = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="A model that never saw the forget texts, best MODEL before fine-tuning: calibrates the verdicts, and "
        "methods such as npo and kl compare with it (default for these: MODEL as it is).",
        rich_help_panel="Model",
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Show no progress bar and no example.", rich_help_panel="Output")
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON instead of a table.", rich_help_panel="Output", show_default=False)
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Settings from a TOML file, or those of a result.json; options on the command line come first.",
        rich_help_panel="Method",
    ),
]


def folder_for(model: str, out: Path | None, suffix: str) -> Path:
    """Return the output folder: `out`, or else the model's name with a suffix, in the current folder.

    >>> folder_for("models/tiny.gguf", None, "audit").name
    'tiny-audit'
    """
    return out if out is not None else Path(f"{Path(model).resolve().name.removesuffix('.gguf')}-{suffix}")


def texts(source: Path | None, role: str) -> Any:
    """Return a source of texts as the functions take it: a path, or for - the examples on standard input.

    Standard input may hold JSON lines, JSON, or plain text as in a .txt file. Raises DataError where it is empty, not
    UTF-8, or broken JSON.
    """
    if source is None or str(source) != "-":
        return source
    from pyunlearn.data.examples import parse_examples

    name = f"standard input (read for {role})"
    try:
        text = sys.stdin.read().removeprefix("\ufeff")  # a byte order mark
        text.encode()  # some locales read what is not UTF-8 as halves of surrogate pairs
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise DataError(f"{name} is not UTF-8 text: {error.reason}; convert it to UTF-8") from error
    return parse_examples(text, _suffix(text), name=name)


def _suffix(text: str) -> str:
    """Return the ending that a file with this content would have: what begins as JSON does is no plain text.

    >>> [_suffix(text) for text in ('{"text": "a"}', '[{"text": "a"},', '["Yes," he said]', "[1] A footnote.")]
    ['.jsonl', '.json', '.txt', '.txt']
    """
    first = text.lstrip().partition("\n")[0]
    for part, types, suffix in ((first, (dict, str), ".jsonl"), (text, (dict, list), ".json")):
        try:
            if isinstance(json.loads(part), types):
                return suffix
        except (ValueError, RecursionError):
            continue
    if first.startswith("{"):
        return ".jsonl"
    return ".json" if re.match(r"\[\s*(\{|$)", first) else ".txt"


def assignments(words: Sequence[str]) -> dict[str, Any]:
    """Read words name=value: numbers, lists, true, false and null as in JSON, none as None, all else as text.

    >>> assignments(["beta=0.3", "divergence=tv"])
    {'beta': 0.3, 'divergence': 'tv'}

    Raises ArgumentError for a word without a name or a value.
    """
    values: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        name, value = name.strip().replace("-", "_"), value.strip()
        if not (equals and name and value):
            raise ArgumentError(f"an option is set as name=value, got {word!r}")
        try:
            values[name] = json.loads(value)
        except (ValueError, RecursionError):
            values[name] = None if value.lower() == "none" else value
    return values


def assignments_by_method(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read words METHOD.name=value as method -> options. Raises ArgumentError for another word."""
    values: dict[str, dict[str, Any]] = {}
    for word in words:
        method, dot, rest = word.partition(".")
        if not dot or "=" in method:
            raise ArgumentError(f"an option of a method is set as METHOD.name=value, got {word!r}")
        values.setdefault(method.strip().lower(), {}).update(assignments([rest]))
    return values


def with_settings(
    config: type[Config],
    *,
    file: bool = True,
    assign: Callable[[Sequence[str]], dict[str, Any]] = assignments,
    form: str = "NAME=VALUE",
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace the parameter `config` of a command by one option for each field of a `Config`, and by --config FILE.

    Args:
        config: the class that is made from the options that were given; it checks their values.
        file: whether there is a --config.
        assign: turns the words of --set into a dict.
        form: the metavar of --set.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in own if p.name != "config"]
        own_first = sorted(fields(config), key=lambda f: f.name not in vars(config)["__annotations__"])
        parameters += [_parameter(f.name, _annotation(f, form)) for f in own_first]
        if file:
            parameters.append(_parameter("config_file", ConfigFile))
        takes_model = any(p.name == "model" for p in parameters)
        if takes_model:
            parameters += [_parameter(f.name, _annotation(f, form)) for f in fields(LoadOptions)]
        parameters.sort(key=_panel)

        @functools.wraps(command)
        def run(**given: Any) -> None:
            loading = _loading(given) if takes_model else nullcontext()
            words = {name: given.pop(name) for name in config.options()}
            settings = read_settings(source, config.options()) if (source := given.pop("config_file", None)) else {}
            for name, word in words.items():
                if word is not None and word != []:
                    settings[name] = _value(name, config.options()[name], word, settings.get(name), assign)
            with loading:
                command(config=config.of(None, settings, command.__name__), **given)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _loading(given: dict[str, Any]) -> AbstractContextManager[None]:
    """Take the options on models out of a command's arguments; return the context in which they hold."""
    from pyunlearn.models.loading import load_options

    known = LoadOptions.options()
    words = {name: word for name in known if (word := given.pop(name)) is not None}
    options = LoadOptions(**{name: _value(name, known[name], word, None, assignments) for name, word in words.items()})
    if options.revision is not None:
        given["model"] = f"{given['model']}@{options.revision}"
    return load_options(options)


def _parameter(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _panel(parameter: inspect.Parameter) -> int:
    panel = parameter.annotation.__metadata__[0].rich_help_panel
    return PANELS.index(panel) if panel in PANELS else -1


def flag_of(name: str, option: Option) -> str:
    """Return the option's name on the command line: --max-steps for max_steps."""
    return option.flag or f"--{name.replace('_', '-')}"


def _annotation(field: Any, form: str) -> Any:
    """Return the type and description from which typer makes the option of one field; None stands for "not given"."""
    option: Option = field.metadata["option"]
    flag, kind = flag_of(field.name, option), option.kind
    kinds: Any = str | None
    if isinstance(kind, Flag):
        flag, kinds = f"{flag}/{flag.replace('--', '--no-', 1)}", bool | None
    elif isinstance(kind, Table):
        kinds = list[str] | None
    names = choices(option)

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return Annotated[
        kinds,
        typer.Option(
            flag,
            metavar=None if isinstance(kind, Flag) else form if isinstance(kind, Table) else metavar(kind),
            help=help_of(option, default_of(field)),
            show_default=False,
            rich_help_panel=option.group,
            autocompletion=complete if names else None,
        ),
    ]


def choices(option: Option) -> tuple[str, ...]:
    """Return the words that an option accepts, if they can be counted."""
    kind = option.kind.each if isinstance(option.kind, Several) else option.kind
    names = kind.names if isinstance(kind, (Choice, ChoiceOrFile, ChoiceOrObject)) else ()
    return (*names, "none") if names and option.optional else names


def metavar(kind: Kind) -> str:
    """Return the word that stands for a value in the help."""
    plain = {
        Whole: "INTEGER",
        Number: "NUMBER",
        Several: "A,B,...",
        Choice: "CHOICE",
        ChoiceOrFile: "CHOICE|FILE",
        ChoiceOrObject: "CHOICE",
    }
    return plain.get(type(kind), "NAME")


def help_of(option: Option, default: Any) -> str:
    """Return the help text of an option with its choices and default."""
    text = option.help
    if names := choices(option):
        text += f" Choices: {', '.join(names)}."
    if isinstance(option.kind, Table):
        return f"{text} Repeatable."
    if default is not None and not isinstance(option.kind, Flag) and "Default:" not in text:
        text += f" Default: {written(default)}."
    return text


def written(value: Any, digits: str = ".5g") -> str:
    """Return a value as it is written on the command line, numbers with five digits; with all if `digits` is empty.

    >>> written((1 / 3, "a", None)), written(1 / 3, "")
    ('0.33333,a,none', '0.3333333333333333')
    """
    if isinstance(value, (tuple, list)):
        return ",".join(written(part, digits) for part in value)
    return "none" if value is None else format(value, digits) if isinstance(value, float) else str(value)


def _value(name: str, option: Option, word: Any, before: Any, assign: Callable[[Sequence[str]], dict[str, Any]]) -> Any:
    """Return the value of one option; of a table, merged into that of the settings file."""
    if isinstance(option.kind, Flag):
        return word
    if isinstance(option.kind, Table):
        return _merged(before or {}, assign(word))
    return option.parsed(flag_of(name, option), word)


def _merged(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(before)
    for name, value in after.items():
        deeper = isinstance(value, dict) and isinstance(both.get(name), dict)
        both[name] = _merged(both[name], value) if deeper else value
    return both
