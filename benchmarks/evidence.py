"""How unseen and famous texts look to verdicts without a holdout: the table and the picture of docs/evidence.md.

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
from pyunlearn.data import encode, read_examples
from pyunlearn.metrics import SIGNIFICANT, generalized_exposure
from pyunlearn.models.language_model import LanguageModel
from pyunlearn.probes.calibration import Expectation, Expected, Features, features
from pyunlearn.probes.non_members import TEXTS

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


def main() -> None:
    """Measure the texts under a model, print the table and draw the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("model", help="a folder, a .gguf file or a name on the hub")
    parser.add_argument("files", nargs="*", type=Path, help='JSONL with {"register": ..., "text": ...}')
    parser.add_argument("--plot", type=Path, help="an SVG file")
    options = parser.parse_args()
    network, tokenizer = models.load(options.model)
    lm = LanguageModel.of(network.eval(), tokenizer)

    def measured(texts: list[str]) -> Features:
        examples = read_examples(texts, role="forget")
        return features(lm, encode(examples, tokenizer, role="forget", max_length=lm.context_length))

    def kinds_and_texts(path: Path) -> tuple[list[str], list[str]]:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [line["register"] for line in lines], [line["text"] for line in lines]

    kinds, texts = kinds_and_texts(TEXTS)
    unseen = measured(texts)
    expectation = Expectation(unseen)
    own = expectation.of_unseen()
    table = rows(kinds, left_out(unseen, own), unseen.nll)
    famous = [text for name, text in {**FORGET, **SURVIVE}.items() if name != "a fresh sentence"]
    for kinds, texts in [*map(kinds_and_texts, options.files), ([FAMOUS] * len(famous), famous)]:
        new = measured(texts)
        exposure = generalized_exposure(new.nll - expectation.of(new).nll, unseen.nll - own.nll)
        table += rows(kinds, (exposure.lower, exposure.upper), new.nll)
    print("| kind | texts | NLL, nats a token | mean exposure, bits | memorized | too unlikely |")
    print("|---|---|---|---|---|---|")
    for row in table:
        print(
            f"| {row.kind} | {row.texts} | {row.nll:.2f} | {row.exposure:.2f} | {row.memorized:.0%} | "
            f"{row.too_unlikely:.0%} |"
        )
    if options.plot:
        plot(table, options.plot)


if __name__ == "__main__":
    main()
