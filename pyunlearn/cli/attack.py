"""pyunlearn attack: try to bring back what a model was made to forget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pyunlearn.attacks.config import AttackConfig
from pyunlearn.cli.options import (
    AsJson,
    Forget,
    Holdout,
    Model,
    Quiet,
    Retain,
    Tokenizer,
    folder_for,
    texts,
    with_settings,
)
from pyunlearn.cli.quiet import quiet_libraries, show_lines, terminal

Control = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="A model that never saw the texts, best MODEL retrained without them: it is attacked in the same way, and "
        "what comes back there does not count.",
        rich_help_panel="Model",
    ),
]
Original = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The model before unlearning, for the attacks merging, rendering and paraphrase.",
        rich_help_panel="Model",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Folder for attack.json; new or empty. Default: MODEL-attack, in this folder.",
        rich_help_panel="Output",
    ),
]


@with_settings(AttackConfig)
def attack(
    model: Model,
    config: AttackConfig,
    forget: Forget,
    retain: Retain = None,
    holdout: Holdout = None,
    control: Control = None,
    original: Original = None,
    tokenizer: Tokenizer = None,
    out: Out = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Try to bring forget texts back into a model that was made to forget them. The model is not changed.

    Weights are rounded to 4 bits, the model is fine-tuned on other text for some steps, the beginning of a text
    is given, and more. Each text gets a verdict: *stays forgotten*, *comes back* (and under which attack), *still
    exposed* (without any attack), *doubtful* (only the set as a whole comes back), *no likelier* (in place of stays
    forgotten, where the comparison is with text that the model wrote) or *untested*. It is compared with text that was
    never trained on and suffers the same attacks.

    Examples:

    `pyunlearn attack ./my-model-unlearned --forget secrets.jsonl --retain keep.jsonl --holdout unseen.jsonl`

    `pyunlearn attack ./my-model-unlearned --forget secrets.jsonl --holdout unseen.jsonl --attacks all --original
    ./my-model`

    Exit code 0: every tested text stays forgotten, or is no likelier. 1: a text is exposed, a text or the set as a
    whole comes back, or none could be tested. 2: an input cannot be used. 130: interrupted.
    """
    import pyunlearn
    from pyunlearn.output import check_output, require_writable, write_json

    quiet_libraries()
    show_lines(quiet=quiet)
    folder = folder_for(model, out, "attack")
    target = check_output(folder)
    require_writable(target)
    result = pyunlearn.attack(
        model,
        texts(forget, "forget"),
        retain=texts(retain, "retain"),
        holdout=texts(holdout, "holdout"),
        control=control,
        original=original,
        tokenizer=tokenizer,
        config=config,
        progress=False if quiet else None,
    )
    content, console = result.to_dict(show_text=config.show_text), terminal()
    if as_json:
        print(json.dumps(content, indent=2))
    else:
        from pyunlearn.report import show_attack

        show_attack(console, result, show_text=config.show_text)
    write_json(target / "attack.json", content)
    if not as_json:
        console.print(f"attack.json is in {folder}", highlight=False, markup=False)
    raise typer.Exit(0 if result.passed else 1)
