"""The option --gguf-like: also write the new model as a GGUF file, next to its folder."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from pyunlearn.errors import ArgumentError

if TYPE_CHECKING:
    from rich.console import Console

    from pyunlearn.models.gguf_writing import GgufReport

GgufLike = Annotated[
    Path | None,
    typer.Option(
        "--gguf-like",
        metavar="FILE.gguf",
        help="Also write the new model as a GGUF file, FOLDER.gguf, with the metadata, the tokenizer and the formats "
        "of this one: the GGUF file of MODEL that is served today, or MODEL itself.",
        rich_help_panel="Output",
    ),
]
GgufAtLeast = Annotated[
    str | None,
    typer.Option(
        "--gguf-at-least",
        metavar="FORMAT",
        help="Of --gguf-like: write weights that have a smaller format there in this one, since few bits can undo the "
        "run: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, F16, BF16 or F32. Default: the formats of that file.",
        rich_help_panel="Output",
    ),
]


class GgufOptions(NamedTuple):
    """The GGUF file that a run is to write."""

    like: str | Path
    at_least: str | None
    target: Path


def gguf_options(
    like: str | Path | None,
    at_least: str | None,
    model: str,
    folder: Path,
    *,
    adapts: bool = False,
    merges: bool = False,
) -> GgufOptions | None:
    """Return what GGUF file a run writes next to its folder; None without one.

    Raises an error, before the run, where no such file could be written: of another model, or where one is there.
    """
    if like is None and at_least is not None:
        raise ArgumentError("--gguf-at-least is an option of --gguf-like: give that too, or leave it out")
    if like is None:
        return None
    from pyunlearn.models.gguf_formats import require_format
    from pyunlearn.models.gguf_writing import require_like
    from pyunlearn.output import check_gguf

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ArgumentError(
            "--gguf-like needs a run in one process: leave it out, and write the file of the saved folder with "
            "pyunlearn.output.save_gguf"
        )
    require_format(at_least)
    folder = folder.resolve()
    target = check_gguf(folder.with_name(f"{folder.name}.gguf"))
    require_like(like, model, adapts=adapts, merges=merges)
    return GgufOptions(like, at_least, target)


def write_gguf_file(
    options: GgufOptions | None, model: Any, tokenizer: Any, *, label: str, quiet: bool
) -> GgufReport | None:
    """Write the GGUF file of a run, and return what was written; None without one."""
    if options is None:
        return None
    from pyunlearn.output import save_gguf

    like, at_least, target = options
    progress = False if quiet else None
    return save_gguf(target, model, tokenizer, like=like, at_least=at_least, label=label, progress=progress)


def show_gguf(
    console: Console,
    report: GgufReport | None,
    options: GgufOptions | None,
    command: list[str],
    *,
    measured: bool = False,
) -> None:
    """Print what was written, and the command that audits it where its weights were not measured.

    Args:
        console: where to print.
        report: of `write_gguf_file`; None prints nothing.
        options: the same.
        command: options of the audit.
        measured: whether the run measured the weights of the folder, rounded to the formats of the file.
    """
    if report is None or options is None:
        return
    words = shlex.join(["pyunlearn", "audit", os.path.relpath(options.target), *command])
    if measured and not report.rounding:
        last = "The run measured these weights, rounded as they are in the file: the verdicts above are the file's."
    elif measured:
        last = (
            "The run measured the weights of the folder, from which the file differs by that rounding; to be certain, "
            f"audit the file: {words}"
        )
    else:
        last = f"Rounding can bring a text back, so audit the file that is served: {words}"
    for line in (*report.sentences(), last):
        console.print(line, highlight=False, markup=False)


def audit_options(model: str, forget: Path, holdout: Path | None, tokenizer: str | None) -> list[str]:
    """Return the options of the command that audits the file, from those of a run."""
    options = {"--original": model, "--forget": forget, "--holdout": holdout, "--tokenizer": tokenizer}
    return [word for flag, value in options.items() if value is not None for word in (flag, str(value))]
