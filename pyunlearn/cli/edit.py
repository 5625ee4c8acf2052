"""The commands of the command line for edits: pyunlearn edit, and edits, which lists them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pyunlearn.cli.quiet import quiet_libraries


def edit(
    model: Annotated[str, typer.Argument(help="A folder that save_pretrained wrote, a .gguf file, or a name on the Hugging Face hub.")],
    forget: Annotated[Path, typer.Option(help="The texts to forget: .jsonl .json .csv .tsv .txt .parquet, as for `pyunlearn unlearn`.")],
    edit: Annotated[str, typer.Option(help="Which edit: `pyunlearn edits` lists them, with what each needs.")],
    retain: Annotated[Path | None, typer.Option(help="Text that must keep working: most edits need it, the others measure on it.")] = None,
    options: Annotated[list[str] | None, typer.Option("--set", help="One of the edit's own options, as name=value: --set rate=0.02 --set samples=4.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the new model and edit.json; new or empty. Default: MODEL-edited, here.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Where the tokenizer is, if not with the model.")] = None,
    batch_size: Annotated[int, typer.Option(help="Texts in one pass.")] = 8,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut texts longer than the model's context, instead of refusing.")] = False,
    seed: Annotated[int, typer.Option(help="The same seed gives the same edit.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar; the table alone.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of a table.")] = False,
) -> None:  # fmt: skip
    """Change the weights once, by a formula, away from the texts of a file: no loop, and no stop either.

    A short step: `pyunlearn edit ./my-model --forget secrets.jsonl --retain keep.jsonl --edit ekfac_step --set rate=0.02 --out ./edited`

    Prune, then unlearn: `pyunlearn edit ./my-model --forget secrets.jsonl --retain keep.jsonl --edit prune --set score=wanda --out ./pruned`, then
    `pyunlearn unlearn ./pruned --forget secrets.jsonl --retain keep.jsonl --mask nonzero`

    The table shows how likely the texts were and are: an edit knows no stop, so take a smaller rate where the retain texts suffer, and measure with
    `pyunlearn audit ./edited --compare ./my-model --forget secrets.jsonl`.

    Exit code 0: the edit is made and saved. 2: something given cannot be used, or the edit cannot be made; nothing is written. 130: interrupted.
    """
    import torch

    from pyunlearn import models
    from pyunlearn.edits.registry import edit_named, parse_edit_options
    from pyunlearn.output import check_output, save_folder

    quiet_libraries()
    chosen = edit_named(edit)
    target = out if out is not None else Path(f"{Path(model).resolve().name.removesuffix('.gguf')}-edited")
    check_output(target)
    given = parse_edit_options(chosen, options or [])
    loaded, found_tokenizer = models.load(model, tokenizer=tokenizer)
    found = chosen.function(
        loaded.to("cuda" if torch.cuda.is_available() else "cpu"), forget, retain=retain, tokenizer=found_tokenizer, batch_size=batch_size, truncate=truncate, seed=seed,
        progress=False if quiet else None, **given,
    )  # fmt: skip
    settings = {"model": model, "forget": str(forget), "retain": retain and str(retain), "options": options or [], "batch_size": batch_size, "seed": seed}  # fmt: skip
    content = found.to_dict() | {"settings": settings}
    save_folder(target, found.model, found_tokenizer, "edit.json", content)
    if as_json:
        print(json.dumps(content, indent=2))
        return
    from rich.console import Console

    from pyunlearn.report import edit_line, edit_table

    console = Console()
    console.print(edit_table(found))
    console.print(edit_line(found), highlight=False, markup=False)
    console.print(f"model, tokenizer and edit.json are in {target}", highlight=False, markup=False)


def edits(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """List the edits of `pyunlearn edit`: what each needs, its options with their defaults, its source."""
    from pyunlearn.edits import EDITS

    if as_json:
        found = [{"name": n, "needs": e.needs, "options": e.options, "source": e.source} for n, e in EDITS.items()]
        print(json.dumps({"edits": found}, indent=2))
        return
    from rich.console import Console

    from pyunlearn.report.table import catalogue

    Console().print(
        catalogue([{"name": n, "needs": e.needs, "options": e.options, "source": e.source} for n, e in EDITS.items()])
    )
    Console().print("Set an option with --set name=value. What each does: docs/edits.md.", highlight=False)
