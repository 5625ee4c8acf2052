"""pyunlearn plan: the memory and the time of a run, without loading weights."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyunlearn.cli.options import (
    AsJson,
    Forget,
    Holdout,
    Model,
    ReferenceModel,
    Retain,
    Tokenizer,
    flag_of,
    folder_for,
    texts,
    with_settings,
    written,
)
from pyunlearn.cli.quiet import quiet_libraries, terminal
from pyunlearn.models.config import LoadOptions
from pyunlearn.options import Config, Flag, Table, default_of
from pyunlearn.unlearning.config import UnlearnConfig

if TYPE_CHECKING:
    from rich.table import Table as Rows

    from pyunlearn.unlearning.planning import Plan

GpuName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|GB",
        help="The GPU to plan for: A100-40, A100-80, H100-80, H200-141, L4-24, L40S-48, A10-24, RTX4090-24, "
        "RTX3090-24, T4-16, or its memory in GB. Default: this machine.",
        rich_help_panel="Model",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Output folder of the run, for the command that is printed; nothing is written. Default: as of unlearn.",
        rich_help_panel="Output",
    ),
]


_SHOWN = 1e-3  # share of the memory from which a part has a row


@with_settings(UnlearnConfig)
def plan(
    model: Model,
    config: UnlearnConfig,
    forget: Forget,
    retain: Retain = None,
    holdout: Holdout = None,
    tokenizer: Tokenizer = None,
    reference_model: ReferenceModel = None,
    gpu: GpuName = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Show the memory that unlearning would take, part by part, whether it fits, and the time. No weights are loaded.

    The settings are those of `pyunlearn unlearn`. Where the run does not fit, the cheapest options with which it does
    are printed as a command. A reference model is not counted: it is loaded before the run trains, and removed.

    Examples:

    `pyunlearn plan ./my-model --forget secrets.jsonl --retain keep.jsonl`

    `pyunlearn plan ./my-model --forget secrets.jsonl --dtype bfloat16 --gpu A100-80`

    Exit code 0: the run fits, or the free memory is unknown. 1: it does not fit. 2: an input cannot be used.
    """
    quiet_libraries()
    from pyunlearn.models.loading import present_options
    from pyunlearn.unlearning.planning import plan as plan_run

    loading = present_options()
    result = plan_run(
        model,
        texts(forget, "forget"),
        retain=texts(retain, "retain"),
        holdout=texts(holdout, "holdout"),
        tokenizer=tokenizer,
        config=config,
        output_dir=folder_for(model, out, "unlearned"),
        gpu=gpu,
        loading=loading,
    )
    files = {"--forget": forget, "--retain": retain, "--holdout": holdout, "--tokenizer": tokenizer}
    files |= {"--reference-model": reference_model, "--out": out}
    command = None
    if result.options is not None:
        command = command_of(model, files, config, loading, result.options)
    if as_json:
        print(json.dumps(result.to_dict() | {"command": command}, indent=2))
    else:
        _print(result, command, loading)
    raise typer.Exit(1 if result.fits is False else 0)


def _print(result: Plan, command: str | None, loading: LoadOptions) -> None:
    """Print the table and the lines below it."""
    console = terminal()
    title = f"memory of a run: {result.parameters:,} parameters, {result.trained:,} trained"
    console.print(title, highlight=False)
    console.print(memory_table(result))
    lines = [result.line]
    if result.fits is False and result.memory_then is not None:
        lines.append(f"the cheapest options that fit take about {result.memory_then.device / 1e9:.1f} GB:")
        lines.append(f"  {command}")
    elif result.fits is False:
        lines.append("no combination of options fits: take a larger machine or a smaller model")
    lines.append(result.time_line)
    if loading.device == "auto" and result.machine.device != "cpu":
        lines.append("planned for one GPU; --device auto shares the layers out over all GPUs of the machine")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def memory_table(result: Plan) -> Rows:
    """Return a row for each part of the memory: GB and bytes a parameter, on the device and in main memory."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as Rows

    on_gpu = result.machine.device == "cuda"
    table = Rows(box=SIMPLE_HEAD)
    table.padding, table.pad_edge = (0, 1, 0, 0), False
    table.add_column("part", no_wrap=True)
    table.add_column("GPU, GB" if on_gpu else "GB", justify="right")
    table.add_column("bytes a parameter", justify="right")
    if on_gpu:
        table.add_column("main memory, GB", justify="right")
    whole = result.memory.device, result.memory.main
    rows = [part for part in result.memory.parts if part.device + part.main > _SHOWN * sum(whole)]
    for name, device, main in [*rows, ("in all", *whole)]:
        cells = [name, f"{device / 1e9:.2f}", f"{device / result.parameters:.1f}"]
        table.add_row(*cells, *([f"{main / 1e9:.2f}"] if on_gpu else []))
    return table


def command_of(
    model: str, files: dict[str, Any], config: UnlearnConfig, loading: LoadOptions, options: dict[str, Any]
) -> str:
    """Return the command that runs what was planned, with other options in addition.

    >>> config = UnlearnConfig(batch_size=4, learning_rate=1.234567e-5)
    >>> command_of("m", {"--forget": "f.txt"}, config, LoadOptions(), {"lora": 16})
    'pyunlearn unlearn m --forget f.txt --lora 16 --learning-rate 1.234567e-05 --batch-size 4'
    """
    words = ["pyunlearn", "unlearn", model]
    for flag, value in files.items():
        if value is not None:
            words += [flag, str(value)]
    for part in (loading, config):
        words += _words(part, options)
    return shlex.join(words)


def _words(config: Config, options: dict[str, Any]) -> list[str]:
    """Return the words of a command line that set what differs from the defaults."""
    words: list[str] = []
    for field in sorted(fields(config), key=lambda f: f.name not in options):
        option = config.options()[field.name]
        value = options.get(field.name, getattr(config, field.name))
        if value == default_of(field) or field.name == "revision":
            continue
        flag = flag_of(field.name, option)
        if isinstance(option.kind, Flag):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(option.kind, Table):
            words += [word for name, each in value.items() for word in (flag, f"{name}={json.dumps(each)}")]
        else:
            words += [flag, written(value, "")]
    return words
