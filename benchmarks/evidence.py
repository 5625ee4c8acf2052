"""How unseen and famous texts look to verdicts without a holdout: the tables and the picture of docs/evidence.md.

python -m benchmarks.evidence MODEL [TEXTS.jsonl ...] [--plot FILE.svg]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyunlearn import models
from pyunlearn.cli.demo import FORGET, SURVIVE
from pyunlearn.data import read_examples
from pyunlearn.metrics import SIGNIFICANT, generalized_exposure
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.probes.calibration import Expectation, Expected, Features, features
from pyunlearn.probes.unseen import ANSWERS, TEXTS

Floats = NDArray[np.float64]
FAMOUS = "famous passages"


class Row(NamedTuple):
    """One kind of text."""

    kind: str
    texts: int
    nll: float
    exposure: float
    memorized: float
    too_unlikely: float


def rows(kinds: Sequence[str], exposures: tuple[Floats, Floats], nll: Floats) -> list[Row]:
    """Return a row for each kind: mean NLL and exposure, shares of 4.32 bits or more on either side."""
    table = []
    for kind in dict.fromkeys(kinds):
        its = np.array([each == kind for each in kinds])
        lower, upper = (side[its] for side in exposures)
        beyond = [float(np.mean(side >= SIGNIFICANT - 1e-9)) for side in (lower, upper)]
        table.append(Row(kind, int(its.sum()), float(nll[its].mean()), float(lower.mean()), *beyond))
    return table


def left_out(unseen: Features, own: Expected) -> tuple[Floats, Floats]:
    """Return lower and upper exposures of each of the package's texts among the others."""
    scores = unseen.nll - own.nll
    pairs = [generalized_exposure(scores[i : i + 1], np.delete(scores, i)) for i in range(len(scores))]
    return np.concatenate([e.lower for e in pairs]), np.concatenate([e.upper for e in pairs])


def plot(table: Sequence[Row], path: Path) -> None:
    """Draw the mean exposure of each kind, with the range in which unseen text should lie."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 0.28 * len(table) + 1.2), layout="constrained")
    axes.axvspan(1.0, 1.9, color="#2e7d4f", alpha=0.15, lw=0)
    axes.axvline(1 / np.log(2), color="#2e7d4f", lw=1)
    axes.axvline(SIGNIFICANT, color="#777777", lw=1, ls=":")
    for at, row in enumerate(reversed(table)):
        axes.plot(row.exposure, at, "o", color="#b3261e" if row.kind == FAMOUS else "#33658a")
    axes.set_yticks(range(len(table)), [f"{row.kind} ({row.texts})" for row in reversed(table)])
    axes.set_xlabel("mean exposure, bits (line: 1.44, expected of unseen text; dots: 4.32, memorized)")
    axes.set_xlim(0, 8.2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def measured(lm: LanguageModel, lines: Sequence[dict[str, str]]) -> Features:
    """Return the features of texts, or of answers to questions in the tokenizer's chat template."""
    records = [
        {"question": row["prompt"], "answer": row["completion"]} if "prompt" in row else row["text"] for row in lines
    ]
    return features(lm, lm.encode({"forget": read_examples(records, role="forget")})["forget"])


def tabulated(lm: LanguageModel, own: Sequence[dict[str, str]], others: Sequence[dict[str, str]]) -> list[Row]:
    """Return a row for each kind of the package's texts, each left out of its own comparison, and of other texts."""
    unseen = measured(lm, own)
    expectation = Expectation(unseen)
    expected = expectation.of_unseen()
    table = rows([row["register"] for row in own], left_out(unseen, expected), unseen.nll)
    new = measured(lm, others)
    exposure = generalized_exposure(new.nll - expectation.of(new).nll, unseen.nll - expected.nll)
    return table + rows([row["register"] for row in others], (exposure.lower, exposure.upper), new.nll)


def main() -> None:
    """Measure the texts under a model, print the tables and draw the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("model", help="a folder, a .gguf file or a name on the hub")
    parser.add_argument(
        "files", nargs="*", type=Path, help='JSONL with "register" and "text", or "register", "prompt" and "completion"'
    )
    parser.add_argument("--plot", type=Path, help="an SVG file for the picture of the texts")
    options = parser.parse_args()
    network, tokenizer = models.load(options.model)
    lm = LanguageModel.of(network.eval(), tokenizer)
    others = [line for path in options.files for line in lines_of(path)]
    famous = {name: text for name, text in {**FORGET, **SURVIVE}.items() if name != "a fresh sentence"}
    texts = [{"register": FAMOUS, "text": text} for text in famous.values()]
    answers = [{"register": FAMOUS, "prompt": f"Recite {name}.", "completion": text} for name, text in famous.items()]
    for own, more in ((TEXTS, texts), (ANSWERS, answers)):
        prompted = "prompt" in more[0]
        table = tabulated(lm, lines_of(own), [row for row in others if ("prompt" in row) == prompted] + more)
        print(f"\n| kind | {'answers' if prompted else 'texts'} | NLL, nats a token | mean exposure, bits | ", end="")
        print("memorized | too unlikely |\n|---|---|---|---|---|---|")
        for row in table:
            print(
                f"| {row.kind} | {row.texts} | {row.nll:.2f} | {row.exposure:.2f} | {row.memorized:.0%} | "
                f"{row.too_unlikely:.0%} |"
            )
        if options.plot and not prompted:
            plot(table, options.plot)


def lines_of(path: Path) -> list[dict[str, str]]:
    """Return the rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
