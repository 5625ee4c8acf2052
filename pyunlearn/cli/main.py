"""The program pyunlearn: its commands, one file each, and its entry point.

Nothing that a command imports at the top of its file imports torch, and only the command that is called is imported, so
that the help appears at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from pyunlearn import __version__
from pyunlearn.cli.interruption import explained

_FAILED = 70  # exit code of a failure that is no user's mistake, as in sysexits.h

COMMANDS = (
    "unlearn", "plan", "edit", "audit", "attack", "compare", "bench", "find", "study", "study-metrics", "demo",
    "methods", "edits", "info",
)  # fmt: skip
"""The commands, in the order of the help."""

_FILES = {"methods": "catalogue", "edits": "catalogue"}  # of the others the file has the command's name


def program(names: Sequence[str] = COMMANDS) -> typer.Typer:
    """Return the program with these commands."""
    app = typer.Typer(
        name="pyunlearn",
        no_args_is_help=True,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_program)
    for name in names:
        function = name.replace("-", "_")
        app.command()(getattr(importlib.import_module(f"pyunlearn.cli.{_FILES.get(name, function)}"), function))
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"pyunlearn {__version__}")
        raise typer.Exit


def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Remove chosen training examples from a language model, and measure that they are gone.

    Start with `pyunlearn demo`: it forgets three famous texts from a small real model in a few minutes on a laptop.

    Examples:

    `pyunlearn unlearn ./my-model --forget secrets.jsonl --retain keep.jsonl`

    `pyunlearn audit ./my-model-unlearned --original ./my-model --forget secrets.jsonl`
    """


def main() -> None:
    """Run the command line; a user's mistake is one sentence on standard error and exit code 2.

    Any other error is shown as Python shows it, with exit code 70, since 1 says that a text is still exposed.
    """
    import traceback

    from pyunlearn.errors import PyunlearnError

    # Threads that wait for each other would use up the cores that other programs need, and then wait for those. OpenMP
    # reads this when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' own bars; read when tqdm is loaded, which torch does
    try:
        with explained():
            called = [word for word in sys.argv[1:2] if word in COMMANDS]
            program(called or COMMANDS)()
    except (PyunlearnError, ValueError) as error:
        if not isinstance(error, PyunlearnError) and "PYUNLEARN_" not in str(error):
            traceback.print_exc()
            sys.exit(_FAILED)
        print(f"pyunlearn: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception:
        traceback.print_exc()
        sys.exit(_FAILED)


if __name__ == "__main__":
    main()
