"""pyunlearn compare: what several methods forget at equal utility."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pyunlearn.cli.interruption import interrupted
from pyunlearn.cli.options import (
    AsJson,
    Forget,
    Holdout,
    Model,
    Quiet,
    ReferenceModel,
    Retain,
    Tokenizer,
    assignments_by_method,
    folder_for,
    texts,
    with_settings,
)
from pyunlearn.cli.quiet import quiet_libraries, terminal
from pyunlearn.comparing.config import CompareConfig


@with_settings(CompareConfig, assign=assignments_by_method, form="METHOD.NAME=VALUE")
def compare(
    model: Model,
    config: CompareConfig,
    forget: Forget,
    retain: Retain = None,
    holdout: Holdout = None,
    tokenizer: Tokenizer = None,
    reference_model: ReferenceModel = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder for result.json, table.csv and the plot: new, empty, or that of an interrupted comparison, "
            "which is resumed. Default: MODEL-compare, in this folder.",
            rich_help_panel="Output",
        ),
    ] = None,
    plot: Annotated[
        bool | None,
        typer.Option(
            "--plot/--no-plot",
            help="Write comparison.svg and comparison.png. Default: where matplotlib is installed.",
            rich_help_panel="Output",
            show_default=False,
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run several methods from the same model, and show what each forgets at equal utility.

    Each method's result is mixed with the original to the point where it keeps `tau` of the original's utility; then
    exposure, memorization and cost are measured. The model is not changed. An interrupted comparison resumes when the
    same command is run again; other --methods are added to it.

    Examples:

    `pyunlearn compare ./my-model --forget secrets.jsonl --retain keep.jsonl --methods ga,npo,simnpo`

    `pyunlearn compare ./my-model --forget secrets.jsonl --retain keep.jsonl --methods npo+nll --set npo+nll.beta=0.3`

    Exit code 0: every method was measured. 1: one was refused or failed; the table says why. 2: an input cannot be
    used. 130: interrupted.
    """
    import pyunlearn
    from pyunlearn.comparing import comparison_table, require_plot_package
    from pyunlearn.comparing.plots import draws_plots
    from pyunlearn.report import comparison_task_table

    quiet_libraries()
    if plot:
        require_plot_package()
    target = folder_for(model, out, "compare")
    try:
        result = pyunlearn.compare(
            model,
            texts(forget, "forget"),
            retain=texts(retain, "retain"),
            holdout=texts(holdout, "holdout"),
            tokenizer=tokenizer,
            reference_model=reference_model,
            config=config,
            output_dir=target,
            plot=plot,
            progress=False if quiet else None,
        )
    except KeyboardInterrupt:
        raise interrupted(f"finished methods are in {target}: run the same command again to resume") from None
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        console = terminal()
        console.print(comparison_table(result, wide=console.width >= 120))
        if result.original.tasks:
            console.print(comparison_task_table(result))
        for note in result.notes:
            console.print(note, highlight=False, markup=False)
        drawn = draws_plots(plot)  # plots of an earlier call may be there, which lack the new methods
        files = "result.json, table.csv, comparison.svg and comparison.png" if drawn else "result.json and table.csv"
        console.print(f"{files} are in {target}", highlight=False, markup=False)
    raise typer.Exit(0 if result.complete else 1)
