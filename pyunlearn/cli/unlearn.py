"""pyunlearn unlearn: forget the texts of a file."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pyunlearn.cli.gguf_file import audit_options, gguf_options, show_gguf, write_gguf_file
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
    folder_for,
    texts,
    with_settings,
)
from pyunlearn.cli.quiet import quiet_libraries, show_lines, terminal
from pyunlearn.unlearning.config import UnlearnConfig


@with_settings(UnlearnConfig)
def unlearn(
    model: Model,
    config: UnlearnConfig,
    forget: Forget,
    retain: Retain = None,
    holdout: Holdout = None,
    tokenizer: Tokenizer = None,
    reference_model: ReferenceModel = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder for the new model and result.json; new or empty. Default: MODEL-unlearned, in this folder.",
            rich_help_panel="Output",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Resume an interrupted run from its checkpoint; give the same options and --out.",
            rich_help_panel="Output",
        ),
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Forget the texts of a file.

    Examples:

    `pyunlearn unlearn ./my-model --forget secrets.jsonl --retain keep.jsonl --out ./my-model-unlearned`

    `pyunlearn unlearn ./my-model --forget secrets.jsonl --retain keep.jsonl --method npo --set beta=0.3`

    `pyunlearn unlearn ./my-model --forget secrets.jsonl --gguf-like ./served.gguf --out ./my-model-unlearned`

    `echo "the text to forget" | pyunlearn unlearn ./my-model --forget -`

    Exit code 0: everything is forgotten (no likelier, where the comparison is with text that the model wrote) or was
    never memorized. 1: something is still exposed or over-unlearned, with --attacks also where a text or the set comes
    back, or no text could be tested; the best state within the utility budget is saved. 2: an input cannot be used. 70:
    a failure, with a traceback. 130: interrupted; --resume resumes the run.
    """
    import pyunlearn

    quiet_libraries()
    show_lines(quiet=quiet)
    target = folder_for(model, out, "unlearned")
    adapts, merges = config.lora is not None, config.merge
    gguf = gguf_options(config.gguf_like, config.gguf_at_least, model, target, adapts=adapts, merges=merges)
    try:
        result = pyunlearn.unlearn(
            model,
            texts(forget, "forget"),
            retain=texts(retain, "retain"),
            holdout=texts(holdout, "holdout"),
            tokenizer=tokenizer,
            reference_model=reference_model,
            config=config,
            output_dir=target,
            resume=resume,
            progress=False if quiet else None,
        )
    except KeyboardInterrupt:
        raise _interrupted(target) from None
    if result.stopped == "interrupted":
        raise _interrupted(target)
    report = write_gguf_file(gguf, result.model, result.tokenizer, label="unlearned", quiet=quiet)
    if os.environ.get("RANK", "0") != "0":  # of several processes, the main process prints
        pass
    elif as_json:
        print(json.dumps(result.to_dict() | ({} if report is None else {"gguf": asdict(report)}), indent=2))
    else:
        from pyunlearn.report import result_table, show_attack, utility_line

        console = terminal()
        console.print(result_table(result, show_text=config.show_text))
        console.print(utility_line(result), highlight=False)
        for note in result.notes:
            console.print(note, highlight=False, markup=False)
        if result.attack is not None:
            show_attack(console, result.attack, show_text=config.show_text)
        where = f"stopped: {result.stopped} · model, tokenizer, model card and result.json are in {target}"
        console.print(where, highlight=False, markup=False)
        if config.show_text:
            hint = "result.json holds the forget texts (--show-text): remove it before you pass the folder on"
            console.print(hint, highlight=False, markup=False)
        show_gguf(console, report, gguf, audit_options(model, forget, holdout, tokenizer), measured=True)
    raise typer.Exit(0 if result.passed else 1)


def _interrupted(target: Path) -> typer.Exit:
    """Return the exception that ends an interrupted run, after a sentence on its checkpoint, if there is one."""
    place = target.resolve()
    if (place.parent / f"{place.name}.checkpoint.pt").exists():
        return interrupted(f"the checkpoint is next to {target}: run the same command with --resume to resume")
    return interrupted("there is no checkpoint: run the same command again to start again")
