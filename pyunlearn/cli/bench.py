"""pyunlearn bench: the published numbers of a model in a benchmark of unlearning."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pyunlearn.benchmarking.config import NAMES, BenchConfig
from pyunlearn.cli.interruption import interrupted
from pyunlearn.cli.options import AsJson, Model, Quiet, Tokenizer, with_settings
from pyunlearn.cli.quiet import quiet_libraries, terminal

if TYPE_CHECKING:
    from rich.table import Table

    from pyunlearn.benchmarking import BenchResult, Column


@with_settings(BenchConfig)
def bench(
    benchmark: Annotated[
        str, typer.Argument(metavar="|".join(NAMES), help="The benchmark.", autocompletion=lambda: list(NAMES))
    ],
    model: Model,
    config: BenchConfig,
    data: Annotated[
        str,
        typer.Option(
            metavar="FOLDER|NAME",
            help="The folder with the benchmark's own files, listed above, or the name of a data set on the hub, of "
            "which these are downloaded; a name may end in @REVISION.",
            rich_help_panel="Data",
        ),
    ],
    retrained: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE.json",
            help="A model that was trained without the forget set, or the bench.json of one (same data, split, first "
            "and template): forget quality (tofu) and PrivLeak (muse) compare with it. --attacks needs the model.",
            rich_help_panel="Model",
        ),
    ] = None,
    tokenizer: Tokenizer = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder for bench.json, new or empty: the columns, and the numbers of each question; no text.",
            rich_help_panel="Output",
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Print the published numbers of a model in a benchmark of unlearning, with 95 % intervals over the questions.

    The benchmark's own files are read from a folder, as .jsonl, .json or .parquet, or from the hub:

    *tofu* (arXiv 2401.06121; the dataset locuslab/TOFU): forget10_perturbed, retain_perturbed, real_authors_perturbed,
    world_facts_perturbed, with the columns question, answer, perturbed_answer, and paraphrased_answer in the first two.

    *wmdp* (arXiv 2403.03218; cais/wmdp): one or more of wmdp-bio, wmdp-cyber, wmdp-chem, with the columns question,
    choices (four) and answer (0 to 3).

    *muse* (arXiv 2407.06460; muse-bench/MUSE-News and MUSE-Books): verbmem/forget (prompt, gt), knowmem/forget_qa and
    knowmem/retain_qa (question, answer), with solved questions in knowmem/forget_qa_icl and knowmem/retain_qa_icl;
    privleak/forget and privleak/holdout (text).

    *rwku* (arXiv 2406.10890; jinzhuoran/RWKU): forget_level1, forget_level2, forget_level3, neighbor_level1,
    neighbor_level2, with the columns query and answer, and type in forget_level3.

    The model is not changed.

    Examples:

    `pyunlearn bench tofu ./retrained --data ./TOFU --out ./retrained-tofu`

    `pyunlearn bench tofu ./unlearned --data ./TOFU --retrained ./retrained-tofu/bench.json`

    `pyunlearn bench wmdp ./unlearned --data cais/wmdp`

    `pyunlearn bench tofu ./unlearned --data locuslab/TOFU --retrained ./retrained --attacks default`

    `pyunlearn bench rwku ./unlearned --data ./RWKU`

    `pyunlearn bench muse ./unlearned --data ./MUSE-News --retrained ./retrained`

    Exit code 0: done. 2: an input cannot be used; nothing is written. 130: interrupted; nothing is written.
    """
    import pyunlearn
    from pyunlearn.output import check_output, require_writable, write_json

    quiet_libraries()
    target = None if out is None else check_output(out)
    if target is not None:
        require_writable(target)
    try:
        result = pyunlearn.bench(
            benchmark,
            model,
            data,
            retrained=retrained,
            tokenizer=tokenizer,
            config=config,
            progress=False if quiet else None,
        )
    except KeyboardInterrupt:
        raise interrupted("nothing was written") from None
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        _show(result)
    if target is not None:
        write_json(target / "bench.json", result.to_dict())
        if not as_json:
            terminal().print(f"bench.json is in {out}", highlight=False, markup=False)


def _show(result: BenchResult) -> None:
    """Print the tables, the numbers over several sets and the notes."""
    console = terminal()
    title = f"{result.benchmark}: {result.settings['model']}, read with {result.rendering}"
    console.print(title, highlight=False, markup=False)
    console.print(bench_table(result))
    if "attacks_any" in result.columns:
        console.print(attack_table(result))
    for line in (*lines_of(result), *result.notes):
        console.print(line, highlight=False, markup=False)


def bench_table(result: BenchResult) -> Table:
    """Return a row for each set of questions and a column for each measure, estimates with their intervals."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    columns = [column for column in result.columns.values() if column.set not in ("", "attacks")]
    measures = list(dict.fromkeys(column.measure for column in columns))
    table = Table(box=SIMPLE_HEAD)
    table.padding, table.pad_edge = (0, 1, 0, 0), False
    table.add_column("questions", no_wrap=True)
    for name in measures:
        table.add_column(_title(name), no_wrap=True)
    for name in dict.fromkeys(column.set for column in columns):
        own = {column.measure: column for column in columns if column.set == name}
        counts = "/".join(f"{n:,}" for n in dict.fromkeys(column.questions for column in own.values()))
        table.add_row(f"{name}, {counts}", *(_cell(own[m]) if m in own else "" for m in measures))
    return table


def attack_table(result: BenchResult) -> Table:
    """Return a row for each form of attack: the share of forget texts that come back under it, with its interval."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table("attack", "texts", "come back", box=SIMPLE_HEAD)
    for column in result.columns.values():
        if column.set == "attacks" and column.name != "attacks_p-value":
            table.add_row(column.measure, f"{column.questions:,}", _cell(column))
    return table


def lines_of(result: BenchResult) -> list[str]:
    """Return a line for each number over several sets."""
    columns = result.columns
    lines = []
    if "model_utility" in columns:
        lines.append(f"model utility {_cell(columns['model_utility'])}")
    if "forget_quality" in columns:
        p, distance = columns["forget_quality"].estimate, columns["forget_quality_distance"]
        lines.append(f"forget quality p = {p:.3g}, log10 {math.log10(max(p, 1e-300)):.2f}; distance {_cell(distance)}")
    if "privleak" in columns:
        leak = columns["privleak"]
        ends = "" if math.isnan(leak.low) else f" [{leak.low:.1f}, {leak.high:.1f}]"
        lines.append(f"PrivLeak {leak.estimate:.1f}{ends} %")
    if "attacks_p-value" in columns:
        p = columns["attacks_p-value"].estimate
        lines.append(f"under attack: p = {p:.3g} for the set")
    return lines


def _title(measure: str) -> str:
    return {
        "rouge": "ROUGE-L recall",
        "fill in the blank": "fill-in-the-blank",
        "question answer": "question-answer",
    }.get(measure, measure)


def _cell(column: Column) -> str:
    """Return an estimate with its interval, where there is one."""
    ends = "" if math.isnan(column.low) else f" [{column.low:.3f}, {column.high:.3f}]"
    return f"{column.estimate:.3f}{ends.replace('[0.', '[.').replace(', 0.', ', .')}"
