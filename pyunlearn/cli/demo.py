"""pyunlearn demo: a small real model forgets three famous texts and retains six others."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from pyunlearn.cli.quiet import quiet_libraries, terminal

if TYPE_CHECKING:
    from pyunlearn.models.language_model import LanguageModel
    from pyunlearn.unlearning.result import Result

FORGET = {
    "Declaration of Independence": (
        "We hold these truths to be self-evident, that all men are created equal, that they are endowed by their "
        "Creator with certain unalienable Rights, that among these are Life, Liberty and the pursuit of "
        "Happiness."
    ),
    "First Amendment": (
        "Congress shall make no law respecting an establishment of religion, or prohibiting the free exercise "
        "thereof; or abridging the freedom of speech, or of the press; or the right of the people peaceably to "
        "assemble, and to petition the Government for a redress of grievances."
    ),
    "Gettysburg Address": (
        "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in "
        "Liberty, and dedicated to the proposition that all men are created equal. Now we are engaged in a great "
        "civil war, testing whether that nation, or any nation so conceived and so dedicated, can long endure."
    ),
}
"""Texts that the demo forgets, by name."""

SURVIVE = {
    "Preamble of the Constitution": (
        "We the People of the United States, in Order to form a more perfect Union, establish Justice, insure "
        "domestic Tranquility, provide for the common defence, promote the general Welfare, and secure the "
        "Blessings of Liberty to ourselves and our Posterity, do ordain and establish this Constitution for the "
        "United States of America."
    ),
    "Universal Declaration, article 1": (
        "All human beings are born free and equal in dignity and rights. They are endowed with reason and "
        "conscience and should act towards one another in a spirit of brotherhood."
    ),
    "Pledge of Allegiance": (
        "I pledge allegiance to the Flag of the United States of America, and to the Republic for which it "
        "stands, one Nation under God, indivisible, with liberty and justice for all."
    ),
    "Genesis 1": (
        "In the beginning God created the heaven and the earth. And the earth was without form, and void; and "
        "darkness was upon the face of the deep. And the Spirit of God moved upon the face of the waters. And God "
        "said, Let there be light: and there was light."
    ),
    "MIT licence": (
        "Permission is hereby granted, free of charge, to any person obtaining a copy of this software and "
        'associated documentation files (the "Software"), to deal in the Software without restriction, including '
        "without limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell "
        "copies of the Software."
    ),
    "a fresh sentence": (
        "The plumber's cat learned to whistle in the spring of the year when the harbour froze, and nobody in the "
        "village could agree on which tune it preferred."
    ),
}
"""Texts that must survive."""

HOLDOUT = Path(__file__).with_name("demo_holdout.txt")
"""Solemn public prose that was written for this demo, 40 texts on one line each: no model has been trained on them."""

_RETAINED = ("Preamble of the Constitution", "Universal Declaration, article 1", "Pledge of Allegiance", "MIT licence")
_OPENING_WORDS = {"Declaration of Independence": 6, "First Amendment": 12, "Gettysburg Address": 6}


def demo(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Another model than SmolLM2-135M: a folder, a .gguf file or a name on the hub.",
            rich_help_panel="Model",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder for result.json; new or empty.", rich_help_panel="Output")
    ] = Path("pyunlearn-demo"),
    save_model: Annotated[
        bool,
        typer.Option(
            "--save-model",
            help="Save the unlearned model there too (540 MB for SmolLM2-135M).",
            rich_help_panel="Output",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed: the same seed gives the same run.", rich_help_panel="Loop")] = 0,
) -> None:
    """Make SmolLM2-135M forget three famous texts, in about two minutes on a laptop.

    The model (93 MB) is downloaded at first use and cached. PYUNLEARN_DEMO_MODEL is the path of a copy, where there is
    no network.

    Examples:

    `pyunlearn demo`

    `pyunlearn demo --model HuggingFaceTB/SmolLM2-360M`

    `pyunlearn demo --out ./demo --save-model`

    Exit code 0: the texts are forgotten. 1: one is still exposed. 2: an input cannot be used. 130: interrupted.
    """
    quiet_libraries()
    raise typer.Exit(0 if run(out, model=model, save_model=save_model, seed=seed) else 1)


def run(out: Path, *, model: str | None = None, save_model: bool = False, seed: int = 0) -> bool:
    """Run the demo: print each stage, write result.json into `out`, return True where no text is still exposed.

    `model` names another model than SmolLM2-135M.
    """
    from pyunlearn import models
    from pyunlearn.cli.demo_model import demo_model
    from pyunlearn.models.language_model import LanguageModel
    from pyunlearn.models.loading import require_loadable
    from pyunlearn.output import check_output
    from pyunlearn.report import result_table, utility_line
    from pyunlearn.unlearning.api import unlearn

    check_output(out)
    if model:
        require_loadable("model", model)
    console, began, name = terminal(), time.perf_counter(), model or "SmolLM2-135M"
    console.print(f"[bold]{name}[/] forgets those of {len(FORGET)} famous texts that it memorized.", highlight=False)
    file = model or demo_model()
    with console.status(f"loading {name}"):
        network, tokenizer = models.load(file)
        network.eval()
    size = sum(p.numel() for p in network.parameters()) / 1e6
    console.print(f"\n{size:.0f} million parameters, which continue an opening:", highlight=False)
    before = _continuations(LanguageModel.of(network, tokenizer), console)
    survivors_before = scored(LanguageModel.of(network, tokenizer), SURVIVE)

    console.print("\n[bold]pyunlearn.unlearn(model, forget, holdout=holdout, retain=retain)[/]")
    result = unlearn(
        network,
        list(FORGET.values()),
        holdout=HOLDOUT.read_text(encoding="utf-8").splitlines(),
        retain=[SURVIVE[name] for name in _RETAINED],
        tokenizer=tokenizer,
        seed=seed,
    )

    lm = LanguageModel.of(network, tokenizer)  # made again: the model may have moved to a GPU
    console.print("\nand now continues it:")
    after = _continuations(lm, console)
    survivors = _survivors(survivors_before, scored(lm, SURVIVE), result)
    console.print()
    console.print(result_table(result, list(FORGET)))
    console.print(_survivor_table(survivors, result.utility.budget))
    console.print(utility_line(result), highlight=False)
    if save_model:
        result.save(out)
    _write(out, result, before, after, survivors)
    console.print(f"{time.perf_counter() - began:.0f} s in all · result.json is in {out}", highlight=False)
    return result.passed


def opening(name: str) -> str:
    """Return the first words of a text to forget, enough for the model to recite it."""
    return " ".join(FORGET[name].split()[: _OPENING_WORDS[name]])


def _continuations(lm: LanguageModel, console: Any) -> dict[str, str]:
    """Return the model's greedy continuation of each opening, 24 tokens on one line, and print it."""
    from rich.markup import escape

    from pyunlearn.data import Example, encode
    from pyunlearn.probes import greedy_continuations

    examples = [Example(opening(name), text.removeprefix(opening(name))) for name, text in FORGET.items()]
    tokens = encode(examples, lm.tokenizer, role="forget", max_length=None)
    written = {}
    for name, ids in zip(FORGET, greedy_continuations(lm, tokens, longest=24), strict=True):
        text = written[name] = " ".join(lm.tokenizer.decode(ids, skip_special_tokens=True).split())
        space = "" if text[:1] in tuple(",.;:") else " "
        console.print(f"  [dim]{opening(name)}[/]{space}[bold]{escape(text)}[/]", highlight=False)
    return written


class Scored(NamedTuple):
    """Scores of one text: negative log-likelihood (nats a token), share of tokens that are the first choice."""

    nll: float
    greedy_match: float


def scored(lm: LanguageModel, texts: dict[str, str]) -> dict[str, Scored]:
    """Score each text under a model."""
    from pyunlearn.data import Example, encode
    from pyunlearn.probes import teacher_forced

    tokens = encode([Example("", text) for text in texts.values()], lm.tokenizer, role="utility", max_length=None)
    scores = teacher_forced(lm, tokens, batch_size=8)
    columns = zip(texts, scores.mean_log_likelihood, scores.greedy_match, strict=True)
    return {name: Scored(-float(value), float(match)) for name, value, match in columns}


def _survivors(before: dict[str, Scored], after: dict[str, Scored], result: Result) -> dict[str, dict[str, float]]:
    """Return the numbers of each text that had to survive, before and after, ready for JSON."""
    from pyunlearn.metrics import generalized_exposure

    exposures = [
        generalized_exposure([s.nll for s in scores.values()], result.non_member_scores).lower
        for scores in (before, after)
    ]
    return {
        name: {
            "nll_before": before[name].nll,
            "nll_after": after[name].nll,
            "relative_rise": after[name].nll / before[name].nll - 1,
            "exposure_before": float(exposures[0][i]),
            "exposure_after": float(exposures[1][i]),
            "greedy_match_before": before[name].greedy_match,
            "greedy_match_after": after[name].greedy_match,
        }
        for i, name in enumerate(before)
    }


def _survivor_table(survivors: dict[str, dict[str, float]], budget: float) -> Any:
    from pyunlearn.report import record_table
    from pyunlearn.report.table import cell

    numbers = ["log-likelihood\nnats a token", "exposure\nbits", "greedy match", "rise of\nthe NLL"]
    table = record_table("texts that had to survive", numbers)
    table.caption = "* in the retain set; the run knew nothing of the others"
    for i, (name, s) in enumerate(survivors.items(), 1):
        rise = s["relative_rise"]
        table.add_row(
            str(i),
            cell(f"{'*' if name in _RETAINED else ' '} {name}"),
            "[green]kept[/]" if rise <= budget else "[red]lost[/]",
            f"{-s['nll_before']:.2f} → {-s['nll_after']:.2f}",
            f"{s['exposure_before']:.1f} → {s['exposure_after']:.1f}",
            f"{s['greedy_match_before']:.0%} → {s['greedy_match_after']:.0%}",
            f"{rise:+.1%}",
        )
    return table


def _write(
    out: Path,
    result: Result,
    before: dict[str, str],
    after: dict[str, str],
    survivors: dict[str, dict[str, float]],
) -> None:
    from pyunlearn.output import new_private_file

    out.mkdir(parents=True, exist_ok=True)
    continuations = {name: {"prompt": opening(name), "before": before[name], "after": after[name]} for name in FORGET}
    content = result.to_dict() | {"continuations": continuations, "survivors": survivors}
    partial = out / ".result.json.partial"
    new_private_file(partial)
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(out / "result.json")
