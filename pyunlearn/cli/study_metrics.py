"""pyunlearn study-metrics: which metric of unlearning can be trusted for what."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pyunlearn.cli.interruption import interrupted
from pyunlearn.cli.options import AsJson, Quiet
from pyunlearn.cli.quiet import quiet_libraries, terminal
from pyunlearn.cli.study import Device


def study_metrics(
    study: Annotated[
        Path,
        typer.Argument(metavar="STUDY", help="Folder of a finished study of six seeds or more.", show_default=False),
    ],
    corpus: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="The corpus that the study had, given as there.", rich_help_panel="Data"),
    ] = None,
    test_corpus: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="The test corpus that the study had.", rich_help_panel="Data"),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Audit the forget sets of the first N seeds; below 6 no metric is called trusted. Default: of all.",
            rich_help_panel="Data",
        ),
    ] = None,
    device: Device = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder of the evaluation: new, empty, or that of the same one, interrupted. Default: STUDY/metrics.",
            rich_help_panel="Output",
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate the metrics of unlearning on the models of a finished study: which can be trusted for what.

    Each forget set is audited under the model that was trained on it, under models that never saw it, and after
    unlearners of which it is known what a metric should say: refuse always, noise, random relabelling, collapse. No
    model is trained from the beginning. An interrupted evaluation resumes when the same command is run again.

    Examples:

    `pyunlearn study-metrics ./study`

    `pyunlearn study-metrics ./study --corpus train.en --corpus train.de --out ./metrics`

    Exit code 0: done. 2: an input cannot be used. 130: interrupted.
    """
    from pyunlearn.study import evaluate_metrics

    quiet_libraries()
    try:
        result = evaluate_metrics(
            study,
            corpus=corpus or None,
            test_corpus=test_corpus or None,
            seeds=seeds,
            out=out,
            device=device,
            progress=False if quiet else None,
        )
    except KeyboardInterrupt:
        raise interrupted("finished parts are in the folder: run the same command again to resume") from None
    if as_json:
        print((result.folder / "metrics.json").read_text(encoding="utf-8"), end="")
        return
    console = terminal()
    for kind in dict.fromkeys(row["kind"] for row in result.rows):
        for line in _lines(kind, [row for row in result.rows if row["kind"] == kind]):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    for line in (*result.sanity, result.rule, f"all columns are in {result.folder / 'metrics.csv'}"):
        console.print(line, highlight=False, markup=False)


def _lines(kind: str, rows: list[dict[str, Any]]) -> list[str]:
    """Return the table of one kind of forget set: a line for each metric."""
    doses = [name for name in rows[0] if name.startswith("power_dose_")]
    power = "power, %, at doses " + ", ".join(name.removeprefix("power_dose_") for name in doses)
    cells = [[f"forget sets of kind {kind}", "type-I, %", power, "can be trusted for"]]
    for row in rows:
        shares = ", ".join(f"{100 * row[d]:.0f}" for d in doses)
        cells.append([row["metric"], f"{100 * row['type_1_error']:.0f}", shares, row["trusted_for"]])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells] + [""]
