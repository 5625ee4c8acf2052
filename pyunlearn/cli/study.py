"""pyunlearn study: repeat the experiment of arXiv 2411.04388."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyunlearn.cli.interruption import interrupted
from pyunlearn.cli.options import AsJson, Quiet, with_settings
from pyunlearn.cli.quiet import quiet_libraries, terminal
from pyunlearn.study.config import StudyConfig

Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="cpu or cuda. Default: cuda where there is a GPU.", rich_help_panel="Model"),
]


@with_settings(StudyConfig)
def study(
    config: StudyConfig,
    corpus: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="A file of pairs, of questions and answers or of plain text; given twice: two files of parallel "
            "lines; .gz too. Default: a small corpus made from the seed. In setup twins: files of texts with a column "
            "duplicates or dose, and perhaps kind.",
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
    device: Device = None,
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

    It trains a model for each seed (setup twins trains none) with forget sets of several kinds, unlearns them, and
    decides up to five claims of the paper by tests over seeds: a page (index.html), figures and tables. The defaults
    below are those of the preset smoke, whose 3 seeds decide nothing. An interrupted study resumes when the same
    command is run again. In setup twins the seeds are sets of texts of a checkpoint that saw them, and its twin did
    not.

    Examples:

    `pyunlearn study --preset smoke --out ./study`

    `pyunlearn study --preset cpu --corpus train.en --corpus train.de --processes 2 --out ./study`

    `pyunlearn study --setup twins --checkpoint ./perturbed --twin ./standard --corpus texts.jsonl --preset cpu`

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
    from pyunlearn.study.claims import CLAIMS
    from pyunlearn.study.page import why

    console = terminal()
    rows = [(c.decision.outcome, CLAIMS[c.name].claim, why(c.name, c.decision)) for c in result.claims]
    for line in [*verdict_lines(rows, console.width), *result.notes]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    page = f"the page is {result.folder / 'index.html'}; SHA-256 of study.yaml {result.plan}"
    console.print(page, highlight=False, markup=False)
