"""What rewrites by rule find of a memorized set, against TOFU's own paraphrases: the table of docs/attacks.md.

    python benchmarks/knowledge.py TOFU_FOLDER --out FOLDER [--model MODEL]

TOFU's folder has forget10_perturbed.jsonl and retain_perturbed.jsonl, whose records have a paraphrased answer and a
paraphrased question. A model (SmolLM2-135M by default) is fine-tuned on 20 forget and 40 retain records, and attacked
there, with 60 others as the holdout.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tofu import Recipe, fine_tuned

import pyunlearn
from pyunlearn.attacks import AttackResult
from pyunlearn.cli.demo_model import demo_model

Row = dict[str, Any]
FORGET, RETAIN, HOLDOUT = 20, 40, 60
LONGEST = 250  # characters of a question and its answer
BITS = 4.32
KNOWN = "paraphrase, "


def drawn(folder: Path) -> dict[str, list[Row]]:
    """Draw the records by role: forget and holdout from one file, retain from the other."""
    r = random.Random(0)
    rows = {}
    for name, count in (("forget10_perturbed", FORGET + HOLDOUT), ("retain_perturbed", RETAIN)):
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        short = [x for x in map(json.loads, lines) if len(x["question"] + x["answer"]) <= LONGEST]
        rows[name] = r.sample(short, count)
    both = rows["forget10_perturbed"]
    return {"forget": both[:FORGET], "holdout": both[FORGET:], "retain": rows["retain_perturbed"]}


def plain(x: Row) -> Row:
    """Return the record without its paraphrases."""
    return {"question": x["question"], "answer": x["answer"]}


def with_answer(x: Row) -> Row:
    """Return the record with TOFU's paraphrased answer."""
    return plain(x) | {"paraphrases": [x["paraphrased_answer"]]}


def with_question(x: Row) -> Row:
    """Return the record with TOFU's paraphrased question and its own answer."""
    return plain(x) | {"paraphrases": [{"question": x["paraphrased_question"], "answer": x["answer"]}]}


def attacked(model: Path, rows: dict[str, list[Row]], form: Callable[[Row], Row], **options: Any) -> AttackResult:
    """Attack the model with the records in that form."""
    roles = {role: [form(x) for x in own] for role, own in rows.items()}
    return pyunlearn.attack(
        str(model), roles["forget"], retain=roles["retain"], holdout=roles["holdout"], attacks=["paraphrase"],
        template="none", progress=False, **options,
    )  # fmt: skip


def main() -> None:
    """Print a row for each kind of probe: how many records stand out, and how many of those TOFU's find are among them.

    The last line is the same as JSON.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tofu", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="fine-tuned on these records before")
    options = parser.parse_args()
    rows = drawn(options.tofu)
    texts = [[plain(x) for x in rows[role]] for role in ("forget", "retain")]
    model = options.model or fine_tuned(demo_model(), options.out, texts, Recipe(learning_rate=2e-4, known=0.1))
    exposed: dict[str, set[int]] = {}
    pvalues: dict[str, float | None] = {}
    for name, form in (("TOFU's answers", with_answer), ("TOFU's questions", with_question), ("", plain)):
        result = attacked(model, rows, form)
        for t in result.trials[1:]:
            key = name or t.name.removeprefix(KNOWN)
            exposed[key] = {e.index for e in result.examples if (e.exposures[t.name] or 0) >= BITS - 1e-9}
            pvalues[key] = t.set_pvalue
        print(name or "rewrites", result.verdicts, *result.notes, sep="\n  ", file=sys.stderr, flush=True)
    own = [key for key in exposed if not key.startswith("TOFU")]
    exposed["any of the rewrites"] = set().union(*(exposed[key] for key in own))
    answers, questions = exposed["TOFU's answers"], exposed["TOFU's questions"]
    print(f"probes                 {BITS} bits  of TOFU's answers'  of TOFU's questions'  p of the set")
    for key, found in exposed.items():
        p = pvalues.get(key)
        counts = f"{len(found):>12} {len(found & answers):>18} of {len(answers)} {len(found & questions):>16}"
        print(f"{key:20} {counts} of {len(questions)}  {'' if p is None else f'{p:.1g}'}")
    print(json.dumps({key: sorted(found) for key, found in exposed.items()}))


if __name__ == "__main__":
    main()
