"""pyunlearn audit: measure what a model remembers of the texts of a file."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pyunlearn.auditing.config import AuditConfig
from pyunlearn.cli.interruption import interrupted
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

if TYPE_CHECKING:
    from pyunlearn.auditing import Audit

Original = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The model before unlearning: only with it can a text get the verdict forgotten.",
        rich_help_panel="Model",
    ),
]
Retrained = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="A model that never saw the texts, at best retrained without them, or MODEL before fine-tuning: "
        "calibrates the verdicts and the membership attacks.",
        rich_help_panel="Model",
    ),
]
Fast = Annotated[
    bool, typer.Option("--fast", help="Leave out continuations, the slow measure.", rich_help_panel="Method")
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Folder for audit.json and audit.html; new or empty. Default: MODEL-audit, in this folder.",
        rich_help_panel="Output",
    ),
]
Html = Annotated[
    bool | None,
    typer.Option(
        "--html/--no-html",
        help="Write audit.html, the report for people. Default: where jinja2 and matplotlib are installed.",
        rich_help_panel="Output",
        show_default=False,
    ),
]
Cache = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Folder that caches each model's responses for later audits; it can give the texts back. Default: next to "
        "--out, then removed.",
        rich_help_panel="Output",
    ),
]


@with_settings(AuditConfig)
def audit(
    model: Model,
    config: AuditConfig,
    forget: Forget,
    retain: Retain = None,
    holdout: Holdout = None,
    original: Original = None,
    reference_model: Retrained = None,
    tokenizer: Tokenizer = None,
    fast: Fast = False,
    out: Out = None,
    html: Html = None,
    cache: Cache = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure what a model remembers of the texts of a file. The model is not changed.

    Each text gets a verdict: *not memorized* (it does not stand out among text that was not trained on), *still
    exposed* (it does), *forgotten* (it was memorized, and is now like text that was not trained on), *no likelier* (in
    place of it, where the comparison is with text that the model wrote), *undecided* (it was memorized, and neither
    stands out nor is clearly forgotten) or *over-unlearned* (less likely than text that was not trained on, which
    reveals it again). An interrupted audit resumes when the same command is run again.

    Examples:

    Is it memorized? `pyunlearn audit ./my-model --forget secrets.jsonl --holdout unseen.jsonl`

    Is it forgotten? `pyunlearn audit ./my-model-unlearned --original ./my-model --forget secrets.jsonl`

    Exit code 0: nothing is exposed. 1: something is still exposed or over-unlearned, or undecided texts lie too high
    all together; with --attacks also where a text or the set comes back, or no text could be tested. 2: an input cannot
    be used. 130: interrupted.
    """
    import pyunlearn
    from pyunlearn.output import require_writable
    from pyunlearn.probes.cache import remove_cache
    from pyunlearn.report import require_page_packages, write_audit
    from pyunlearn.report.audit import audit_folder

    quiet_libraries()
    show_lines(quiet=quiet)
    if html is None:
        html = all(importlib.util.find_spec(name) for name in ("jinja2", "matplotlib"))
    elif html:
        require_page_packages()
    if fast:
        config = replace(config, metrics=tuple(name for name in config.metrics if name != "continuations"))
    target = folder_for(model, out, "audit")
    place = target.resolve()
    responses = cache if cache is not None else place.parent / f"{place.name}.cache"
    if cache is None and (target / "audit.json").exists():  # killed after it was written
        remove_cache(responses)
    require_writable(audit_folder(target))
    try:
        result = pyunlearn.audit(
            model,
            texts(forget, "forget"),
            retain=texts(retain, "retain"),
            holdout=texts(holdout, "holdout"),
            original=original,
            reference_model=reference_model,
            tokenizer=tokenizer,
            config=config,
            cache=responses,
            progress=False if quiet else None,
        )
    except KeyboardInterrupt:
        raise interrupted(f"responses are cached in {responses}: run the same command again to resume") from None
    write_audit(result, target, html=html, show_text=config.show_text)
    if cache is None:
        remove_cache(responses)
    _show(result, target, html, config.show_text, as_json)
    raise typer.Exit(0 if result.passed else 1)


def _show(result: Audit, target: Path, html: bool, show_text: bool, as_json: bool) -> None:
    """Print the table and the sentences, or the JSON."""
    if as_json:
        print(json.dumps(result.to_dict(show_text=show_text), indent=2))
        return
    from pyunlearn.report import audit_lines, audit_table, show_attack, task_table

    console = terminal()
    console.print(audit_table(result, show_text=show_text))
    for line in audit_lines(result):
        console.print(line, highlight=False, markup=False)
    if result.attack is not None:
        show_attack(console, result.attack, show_text=show_text)
    if result.tasks:
        console.print(task_table(result.tasks, result.settings))
    files = "audit.json and audit.html are" if html else "audit.json is"
    console.print(f"{files} in {target}", highlight=False, markup=False)
