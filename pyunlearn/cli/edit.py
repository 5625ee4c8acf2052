"""pyunlearn edit: change the weights once, by a formula."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pyunlearn.cli.gguf_file import GgufAtLeast, GgufLike, audit_options, gguf_options, show_gguf, write_gguf_file
from pyunlearn.cli.options import AsJson, Forget, Model, Quiet, Retain, Tokenizer, folder_for, texts, with_settings
from pyunlearn.cli.quiet import quiet_libraries, terminal
from pyunlearn.edits.config import EditConfig

OwnOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="The edit's own options, such as rate=0.02. Repeatable.",
        rich_help_panel="Method",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Folder for the new model and edit.json; new or empty. Default: MODEL-edited, in this folder.",
        rich_help_panel="Output",
    ),
]


@with_settings(EditConfig, file=False)
def edit(
    model: Model,
    config: EditConfig,
    forget: Forget,
    edit: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="The edit; `pyunlearn edits` lists them with their needs.", rich_help_panel="Method"
        ),
    ],
    retain: Retain = None,
    options: OwnOptions = None,
    tokenizer: Tokenizer = None,
    out: Out = None,
    gguf_like: GgufLike = None,
    gguf_at_least: GgufAtLeast = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Change the weights once, by a formula, away from the texts of a file: no training loop and no early stopping.

    The table shows the negative log-likelihood of the texts before and after. Take a smaller rate where the retain
    texts suffer, and audit the result: `pyunlearn audit ./edited --original ./my-model --forget secrets.jsonl`

    Examples:

    `pyunlearn edit ./my-model --forget secrets.jsonl --retain keep.jsonl --edit ekfac_step --set rate=0.02`

    Prune, then unlearn: `pyunlearn edit ./my-model --forget secrets.jsonl --retain keep.jsonl --edit prune --set
    score=wanda --out ./pruned`, then `pyunlearn unlearn ./pruned --forget secrets.jsonl --retain keep.jsonl --mask
    nonzero`

    Exit code 0: the edit is made and saved. 2: an input cannot be used, or the edit cannot be made; nothing is written.
    130: interrupted.
    """
    from pyunlearn import models
    from pyunlearn.data.examples import read_examples, source_name
    from pyunlearn.edits.registry import edit_named, parse_edit_options
    from pyunlearn.models.condition import to_device
    from pyunlearn.output import check_output, is_filled, model_name, require_writable, save_folder

    quiet_libraries()
    chosen = edit_named(edit)
    target = folder_for(model, out, "edited")
    place = check_output(target)
    require_writable(place if is_filled(place) else place.with_name(f".{place.name}.probe"))  # it is replaced whole
    gguf = gguf_options(gguf_like, gguf_at_least, model, target)
    own = parse_edit_options(chosen, options or [])
    sources = {role: texts(source, role) for role, source in (("forget", forget), ("retain", retain))}
    examples = {
        role: source and read_examples(source, role=role, turns=config.turns) for role, source in sources.items()
    }
    loaded, loaded_tokenizer = models.load(model, tokenizer=tokenizer)
    result = chosen.function(
        to_device(loaded, models.default_device()),
        examples["forget"],
        retain=examples["retain"],
        tokenizer=loaded_tokenizer,
        config=config,
        progress=False if quiet else None,
        **own,
    )
    settings: dict[str, object] = {"model": model_name(model), "options": options or []}
    settings |= {role: source_name(source) for role, source in sources.items()}
    content = result.to_dict() | {"settings": settings | config.to_dict()}
    save_folder(target, result.model, loaded_tokenizer, "edit.json", content)
    report = write_gguf_file(gguf, result.model, loaded_tokenizer, label="edited", quiet=quiet)
    if as_json:
        print(json.dumps(content | ({} if report is None else {"gguf": asdict(report)}), indent=2))
        return
    from pyunlearn.report import edit_line, edit_table

    console = terminal()
    console.print(edit_table(result))
    for line in (edit_line(result), *result.notes):
        console.print(line, highlight=False, markup=False)
    console.print(f"model, tokenizer and edit.json are in {target}", highlight=False, markup=False)
    show_gguf(console, report, gguf, audit_options(model, forget, None, tokenizer))
