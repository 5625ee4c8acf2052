"""pyunlearn study: repeat the experiment of arXiv 2411.04388."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyunlearn.cli.interruption import interrupted
from pyunlearn.cli.options import AsJson, Quiet, with_settings
from pyunlearn.cli.quiet import quiet_libraries, terminal
from pyunlearn.study.config import StudyConfig


@with_settings(StudyConfig)
def study(
    config: StudyConfig,
    corpus: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="A file of pairs, of questions and answers or of plain text; given twice: two files of parallel "
            "lines; .gz too. Default: a small corpus made from the seed.",
            rich_help_panel="Data",
        ),
    ] = None,
    test_corpus: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="The same for the held-out text on which utility is measured. Default: part of the corpus.",
            rich_help_panel="Data",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="cpu or cuda. Default: cuda where there is a GPU.", rich_help_panel="Model"),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            help="Folder of the study: new, empty, or that of the same study, interrupted.",
            rich_help_panel="Output",
        ),
    ] = Path("pyunlearn-study"),
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Repeat the experiment of arXiv 2411.04388: unlearning in and out of distribution, memorization and difficulty.

    It trains models with forget sets of several kinds, unlearns them, and reports for each of the paper's claims
    whether it holds there: a page (index.html), figures and tables. The defaults below are those of the preset smoke.
    An interrupted study resumes when the same command is run again.

    Examples:

    `pyunlearn study --preset smoke --out ./study`

    `pyunlearn study --preset cpu --steps 60 --corpus train.en --corpus train.de --out ./study`

    Exit code 0: done, whichever the verdicts. 2: an input cannot be used. 130: interrupted.
    """
    from pyunlearn.study import run_study

    quiet_libraries()
    try:
        result = run_study(
            out,
            corpus=corpus or None,
            test_corpus=test_corpus or None,
            device=device,
            config=config,
            progress=False if quiet else None,
        )
    except KeyboardInterrupt:
        raise interrupted(f"finished parts are in {out}: run the same command again to resume") from None
    if as_json:
        print((result.folder / "claims.json").read_text(encoding="utf-8"), end="")
        return
    from pyunlearn.report.catalogue import verdict_lines

    console = terminal()
    for line in verdict_lines([(c.verdict, c.text, c.why) for c in result.claims], console.width):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"the page is {result.folder / 'index.html'}", highlight=False, markup=False)
