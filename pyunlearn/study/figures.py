"""The figures: SVG and PNG, made for print."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from scipy import stats

from pyunlearn.metrics import NULL_MEAN, StepsToForget, generalized_exposure
from pyunlearn.study.folder import Folder
from pyunlearn.study.old_config import Config
from pyunlearn.study.outcomes import Examples, Outcome
from pyunlearn.study.sets import Sets

COLOURS = {"id": "#33658a", "mismatched": "#2e7d4f", "canary": "#c77700", "random": "#b3261e"}
NAMES = {"id": "in distribution", "mismatched": "mismatched", "canary": "canaries", "random": "random tokens"}
MARKS = {"id": "o", "mismatched": "s", "canary": "^", "random": "D"}
_INK, _FAINT = "#333a40", "#8a949c"
_STYLE = {
    "svg.fonttype": "none", "font.family": ["sans-serif"], "font.size": 9, "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _FAINT,
    "xtick.color": _INK, "ytick.color": _INK, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "axes.axisbelow": True,
    "axes.titlesize": 9, "lines.linewidth": 1.5, "savefig.dpi": 160,
}  # fmt: skip
FIGURES = {
    "trade-off": "Performance lost (rise of the test NLL) against exposure, during unlearning. Each line is the mean over draws, each band their range; "
    "unlearning goes from right to left. Above: references scored once, under the original model; below: under the model as it is now. The dotted line "
    "is the mean of unseen text.",
    "steps": "Share of examples still exposed after so many steps (Kaplan-Meier, all draws together). Above: raw scores; below: calibrated scores. "
    "References are anchored.",
    "terciles": "Steps to forget, median and quartiles (Kaplan-Meier; an arrow: more than half are never forgotten) of the third of each set with the lowest, middle and highest "
    "memorization or difficulty, by raw and by calibrated scores (anchored).",
    "null": "Exposure before unlearning, and under the model retrained without any forget set, against the law of unseen text (dashed).",
    "retrained": "How far forget examples and references are from what the retrained model gives them, during unlearning. Unseen references that leave "
    "it are collateral damage.",
}
"""Name -> caption."""


def draw_all(folder: Folder, config: Config, sets: Sets, examples: Examples, outcomes: Sequence[Outcome]) -> None:
    """figures/NAME.svg and .png, at the first learning rate."""
    first = [o for o in outcomes if o.rate == config.unlearning_rates[0]]
    for name, draw, rows, columns in (
        ("trade-off", _trade_off, 2, len(config.repetitions)), ("steps", _steps, 2, len(config.repetitions)), ("terciles", _terciles, 2, 2),
        ("null", _null, 1, 2), ("retrained", _retrained, 2, len(config.repetitions)),
    ):  # fmt: skip
        _figure(folder, name, rows, columns, lambda grid, draw=draw: draw(grid, config, sets, examples, first, folder))  # type: ignore[misc]


Grid = Any  # (rows, columns) of axes


def _trade_off(
    grid: Grid, config: Config, sets: Sets, examples: Examples, outcomes: list[Outcome], folder: Folder
) -> None:
    top = 5 * config.budget
    for row, yardstick in enumerate(("anchored raw", "current raw")):
        for column, r in enumerate(config.repetitions):
            axes = grid[row][column]
            for kind in config.kinds:
                mine = [o for o in outcomes if o.which.kind == kind and o.which.repetitions == r]
                x = _stack([o.lower[yardstick].mean(1) for o in mine])
                y = _stack([o.rise for o in mine])
                axes.plot(
                    x.mean(0), y.mean(0), color=COLOURS[kind], marker=MARKS[kind], markersize=2.5, label=NAMES[kind]
                )
                axes.fill_between(x.mean(0), y.min(0), y.max(0), color=COLOURS[kind], alpha=0.15, linewidth=0)
            axes.axvline(NULL_MEAN, color=_INK, linestyle=":", linewidth=1)
            axes.set_ylim(-0.05 * top, top)
            axes.set_xlim(left=0)
            y_label = f"rise of test NLL, nats\n{yardstick.split()[0]} references"
            _label(axes, row, column, _times(r), "mean exposure, bits", y_label)


def _steps(grid: Grid, config: Config, sets: Sets, examples: Examples, outcomes: list[Outcome], folder: Folder) -> None:
    for row, yardstick in enumerate(("anchored raw", "anchored calibrated")):
        for column, r in enumerate(config.repetitions):
            axes = grid[row][column]
            for kind in config.kinds:
                taken = [o.forgotten(yardstick) for o in outcomes if o.which.kind == kind and o.which.repetitions == r]
                _survival(axes, _joined(taken), COLOURS[kind], NAMES[kind], max(config.steps, 1))
            axes.set(xlim=(0, config.steps), ylim=(0, 1.02))
            y_label = f"share still exposed\n{yardstick.split()[1]} scores"
            _label(axes, row, column, _times(r), "unlearning step", y_label)


def _terciles(
    grid: Grid, config: Config, sets: Sets, examples: Examples, outcomes: list[Outcome], folder: Folder
) -> None:
    for row, yardstick in enumerate(("anchored raw", "anchored calibrated")):
        for column, name in enumerate(("memorization", "difficulty")):
            axes = grid[row][column]
            values = getattr(examples, name)
            for shift, kind in enumerate(config.kinds):
                parts: list[list[StepsToForget]] = [[], [], []]
                for o in outcomes:
                    if o.which.kind == kind:
                        taken = o.forgotten(yardstick)
                        third = stats.rankdata(examples.at(values, o.places), "ordinal") * 3 // (len(o.places) + 1)
                        for t in range(3):
                            parts[t].append(StepsToForget(taken.steps[third == t], taken.censored[third == t]))
                xs = np.arange(3) + 0.12 * (shift - (len(config.kinds) - 1) / 2)
                middle, low, high = zip(*(_quartiles(_joined(p)) for p in parts), strict=True)
                end = config.steps * 1.04
                capped = [np.minimum(v, end) for v in (middle, low, high)]
                axes.vlines(xs, capped[1], capped[2], color=COLOURS[kind], alpha=0.45, linewidth=1.2)
                axes.plot(
                    xs,
                    capped[0],
                    color=COLOURS[kind],
                    marker=MARKS[kind],
                    markersize=4,
                    linewidth=0.8,
                    label=NAMES[kind],
                )
                gone = [i for i in range(3) if middle[i] > config.steps]
                axes.plot(
                    xs[gone], capped[0][gone], linestyle="", marker=r"$\uparrow$", markersize=8, color=COLOURS[kind]
                )
            axes.set_xticks(range(3), ["lowest third", "middle", "highest third"])
            _label(axes, row, column, "", name, f"steps to forget\n{yardstick.split()[1]} scores")
    grid[0][0].set_ylim(bottom=-0.3)


def _null(grid: Grid, config: Config, sets: Sets, examples: Examples, outcomes: list[Outcome], folder: Folder) -> None:
    retrained = {kind: retrained_exposures(sets, examples, kind) for kind in config.kinds}
    for column, title in enumerate(("trained on it", "retrained without it")):
        axes = grid[0][column]
        for kind in config.kinds:
            mine = [o.lower["anchored raw"][0] for o in outcomes if o.which.kind == kind]
            values = np.sort(np.concatenate(mine) if column == 0 else retrained[kind])
            share = 1 - np.arange(len(values)) / len(values)
            axes.step(values, share, where="pre", color=COLOURS[kind], label=NAMES[kind])
        top = np.log2(config.references + 1)
        bits = np.linspace(0, top, 100)
        axes.plot(bits, 2.0**-bits, color=_INK, linestyle="--", linewidth=1)
        axes.set(title=title, xlabel="exposure, bits", xlim=(0, top + 0.1), ylim=(0, 1.02))
    grid[0][0].set_ylabel("share of examples\nwith at least that exposure")


def _retrained(
    grid: Grid, config: Config, sets: Sets, examples: Examples, outcomes: list[Outcome], folder: Folder
) -> None:
    for row, name in enumerate(("from_retrained", "references_from_retrained")):
        for column, r in enumerate(config.repetitions):
            axes = grid[row][column]
            for kind in config.kinds:
                mine = [o for o in outcomes if o.which.kind == kind and o.which.repetitions == r]
                away = _stack([getattr(o, name) for o in mine])
                steps = mine[0].steps[: away.shape[1]]
                axes.plot(steps, away.mean(0), color=COLOURS[kind], label=NAMES[kind])
                axes.fill_between(steps, away.min(0), away.max(0), color=COLOURS[kind], alpha=0.15, linewidth=0)
            axes.set_xlim(0, config.steps)
            y_label = f"{'references' if row else 'forget examples'}:\n|NLL - NLL retrained|, nats"
            _label(axes, row, column, _times(r), "unlearning step", y_label)
        grid[row][0].set_ylim(bottom=0)  # when all is drawn: it ends the scaling of the whole row


def retrained_exposures(sets: Sets, examples: Examples, kind: str) -> Any:
    """Exposure of every forget example of a kind under the model that saw none of them, bits."""
    places = [i for which, group in sets.forget.items() if which.kind == kind for i in group]
    return generalized_exposure(
        examples.at(examples.retrained, places), examples.at(examples.retrained, sets.references[kind])
    ).lower


def _survival(axes: Any, taken: StepsToForget, colour: str, label: str, end: float) -> None:
    curve = stats.ecdf(stats.CensoredData.right_censored(taken.steps, taken.censored)).sf
    x = np.concatenate([[0.0], curve.quantiles, [end]])
    y = np.concatenate([[1.0], curve.probabilities, curve.probabilities[-1:]])
    axes.step(x, y, where="post", color=colour, label=label)


def _quartiles(taken: StepsToForget) -> tuple[float, float, float]:
    """Kaplan-Meier median, first and third quartile; inf where the curve does not come down so far."""
    curve = stats.ecdf(stats.CensoredData.right_censored(taken.steps, taken.censored)).sf
    found = []
    for level in (0.5, 0.75, 0.25):
        below = curve.probabilities <= level + 1e-12
        found.append(float(curve.quantiles[below.argmax()]) if below.any() else np.inf)
    return found[0], found[1], found[2]


def _joined(taken: Sequence[StepsToForget]) -> StepsToForget:
    return StepsToForget(np.concatenate([t.steps for t in taken]), np.concatenate([t.censored for t in taken]))


def _stack(rows: Sequence[Any]) -> Any:
    """(draws, T): to the length of the shortest run."""
    shortest = min(map(len, rows))
    return np.stack([row[:shortest] for row in rows])


def _label(axes: Any, row: int, column: int, title: str, x: str, y: str) -> None:
    """Of one in a grid of two rows: the title above, the x axis below, the y axis on the left."""
    if row == 0:
        axes.set_title(title)
    else:
        axes.set_xlabel(x)
    if column == 0:
        axes.set_ylabel(y)


def _times(r: int) -> str:
    return "seen once an epoch" if r == 1 else f"seen {r} times an epoch"


def _figure(folder: Folder, name: str, rows: int, columns: int, draw: Callable[[Grid], None]) -> None:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(1.2 + 2.25 * columns, 0.7 + 1.95 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        shared: Any = "all" if name in ("trade-off", "steps", "terciles", "null") else "row"
        grid = figure.subplots(rows, columns, squeeze=False, sharey=shared)
        draw(grid)
        lines, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside upper center", ncols=len(labels), handlelength=1.4)
        for suffix, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
            save = partial(figure.savefig, format=suffix, metadata=metadata)
            folder.write(f"figures/{name}.{suffix}", save)
