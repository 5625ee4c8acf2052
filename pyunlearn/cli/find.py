"""pyunlearn find: the records of a training corpus that contain one of given texts."""

from __future__ import annotations

import heapq
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pyunlearn.cli.options import FORMATS, AsJson, Quiet, with_settings
from pyunlearn.cli.options import texts as read_texts
from pyunlearn.cli.quiet import terminal
from pyunlearn.data.find import FindConfig

if TYPE_CHECKING:
    from rich.table import Table

    from pyunlearn.data import CorpusCopies

Texts = Annotated[
    Path,
    typer.Option(
        metavar="FILE",
        help=f"The texts to search for, as --forget of `pyunlearn unlearn`: {FORMATS}, or - for standard input.",
        rich_help_panel="Data",
    ),
]
Corpora = Annotated[
    list[Path],
    typer.Option(
        metavar="FILE",
        help=f"The training corpus: {FORMATS}, or a folder with such files. Read row by row (.json whole). Repeatable.",
        rich_help_panel="Data",
    ),
]
ShowText = Annotated[
    bool,
    typer.Option(
        "--show-text",
        help="Show the beginning of each text. Without it the table masks them, so that it can be passed on.",
        rich_help_panel="Output",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.jsonl",
        help="File for all copies, one a line: source, row, text (its number), share, exact; a new one. It holds no "
        "text.",
        rich_help_panel="Output",
    ),
]

SHOWN = 30  # copies in the table
_PLACE = 34  # characters of the longest place in the table


@with_settings(FindConfig)
def find(
    config: FindConfig,
    texts: Texts,
    corpus: Corpora,
    show_text: ShowText = False,
    out: Out = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """List the records of a training corpus that contain one of the texts of a file, or nearly contain it.

    Each has a share: of the text's runs of three words, those that the record has, close together. A record with all
    words of the text in a row, regardless of case and punctuation, is *exact*. The corpus may be larger than memory.
    No model is loaded.

    Examples:

    `pyunlearn find --texts secrets.jsonl --corpus train.jsonl`

    `pyunlearn find --texts secrets.jsonl --corpus ./shards --corpus more.parquet --threshold 0.8 --out copies.jsonl`

    Exit code 0: the corpus is searched, whether it has copies or not. 2: an input cannot be used; nothing is written.
    130: interrupted.
    """
    import pyunlearn

    if out is not None:
        _check_file(out)
    result = pyunlearn.find_copies(read_texts(texts, "texts"), corpus, config=config, progress=False if quiet else None)
    console = terminal()
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        if result.rows:
            console.print(copies_table(result, show_text=show_text, out=out))
        console.print(summary(result), highlight=False, markup=False)
    if out is not None:
        from pyunlearn.output import write_bytes

        write_bytes(out, "".join(json.dumps(row._asdict()) + "\n" for row in result).encode())
        if not as_json:
            console.print(f"all copies are in {out}", highlight=False, markup=False)


def _check_file(out: Path) -> None:
    """Raise OutputError where the file cannot be a new .jsonl file, or nothing can be written there."""
    from pyunlearn.errors import OutputError
    from pyunlearn.output import require_writable

    if out.suffix != ".jsonl":
        raise OutputError(f"the output file {out} should end in .jsonl: rename it")
    if out.exists():
        raise OutputError(f"the output file {out} exists already: choose another name, or remove it first")
    require_writable(out)


def copies_table(result: CorpusCopies, *, show_text: bool, out: Path | None = None) -> Table:
    """Return a row for each copy, 30 at most: those of the largest shares, in the order of the corpus."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from pyunlearn.data.redaction import masked
    from pyunlearn.errors import printable

    table = Table(title="copies in the corpus", title_justify="left", caption_justify="left", box=SIMPLE_HEAD)
    table.padding, table.pad_edge = (0, 1, 0, 0), False
    table.add_column("record", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("text", min_width=15)
    rows = result.rows
    if len(rows) > SHOWN:
        largest = heapq.nlargest(SHOWN, range(len(rows)), key=lambda i: (rows[i].exact, rows[i].share, -i))
        rows = [rows[i] for i in sorted(largest)]
        where = f"see {out}" if out else "--out FILE.jsonl writes all"
        table.caption = f"and {len(result) - SHOWN:,} more: {where}"
    for row in rows:
        place, text = printable(f"{row.source}:{row.row}"), " ".join(result.texts[row.text - 1].split())[:60]
        text = text if show_text else masked(" ".join(text.split()[:4]))
        table.add_row(
            Text(place if len(place) <= _PLACE else f"…{place[1 - _PLACE :]}"),
            "exact" if row.exact else f"{row.share:.0%}",
            str(row.text),
            Text(printable(text), no_wrap=True, overflow="ellipsis"),
        )
    return table


def summary(result: CorpusCopies) -> str:
    """Return one sentence: how many texts are in how many records."""
    texts, exact = result.texts_with_copies, sum(row.exact for row in result)
    records = f"{result.records_with_copies:,} of {result.records:,} records"
    words = f", {exact:,} of {len(result):,} copies word for word" if result.rows else ""
    return f"{texts:,} of {len(result.texts):,} texts {'is' if texts == 1 else 'are'} in {records}{words}"
