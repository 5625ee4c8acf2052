"""The figures of a study, SVG and PNG, made for print."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from scipy import stats

from pyunlearn.metrics import NULL_MEAN, StepsToForget, generalized_exposure
from pyunlearn.study.config import StudyConfig
from pyunlearn.study.folder import Folder
from pyunlearn.study.outcomes import Examples, Outcome
from pyunlearn.study.sets import Sets

COLOURS = {"id": "#33658a", "mismatched": "#2e7d4f", "canary": "#c77700", "random": "#b3261e"}
NAMES = {"id": "in distribution", "mismatched": "mismatched", "canary": "canaries", "random": "random tokens"}
MARKS = {"id": "o", "mismatched": "s", "canary": "^", "random": "D"}
_INK, _FAINT = "#333a40", "#8a949c"
_STYLE = {
    "svg.fonttype": "none",
    "font.family": ["sans-serif"],
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "lines.linewidth": 1.5,
    "savefig.dpi": 160,
}
FIGURES = {
    "trade-off": "Performance lost (rise of the test NLL) against exposure, during unlearning. Each line is the mean "
    "over draws, each band their range; unlearning goes from right to left. Above: non-members scored once, under the "
    "original model; below: under the model as it is at each step. The dotted line is the mean of unseen text.",
    "steps": "Share of examples still exposed after that many steps (Kaplan-Meier, all draws together). Above: raw "
    "scores; below: calibrated scores. Non-members are anchored.",
    "terciles": "Steps to forget, median and quartiles (Kaplan-Meier; an arrow: more than half are never forgotten) of "
    "the third of each set with the lowest, middle and highest memorization or difficulty, by raw and by calibrated "
    "scores (anchored).",
    "null": "Exposure before unlearning, and under the model retrained without any forget set, against the "
    "distribution of unseen text (dashed).",
    "retrained": "Distance of forget examples and non-members from their NLL under the retrained model, during "
    "unlearning. Non-members that leave it are collateral damage.",
}
"""Name -> caption."""


def draw_all(folder: Folder, config: StudyConfig, sets: Sets, examples: Examples, outcomes: Sequence[Outcome]) -> None:
    """Write figures/NAME.svg and .png, at the first learning rate."""
    first = [o for o in outcomes if o.rate == config.unlearning_rates[0]]
    columns = len(config.repetitions)
    _figure(folder, "trade-off", 2, columns, lambda grid: _trade_off(grid, config, first))
    _figure(folder, "steps", 2, columns, lambda grid: _steps(grid, config, first))
    _figure(folder, "terciles", 2, 2, lambda grid: _terciles(grid, config, examples, first))
    _figure(folder, "null", 1, 2, lambda grid: _null(grid, config, sets, examples, first))
    _figure(folder, "retrained", 2, columns, lambda grid: _retrained(grid, config, first))


Grid = Any  # (rows, columns) of axes


def _trade_off(grid: Grid, config: StudyConfig, outcomes: list[Outcome]) -> None:
    top = 5 * config.budget
    for row, criterion in enumerate(("anchored raw", "current raw")):
        for column, r in enumerate(config.repetitions):
            axes = grid[row][column]
            for kind in config.kinds:
                mine = [o for o in outcomes if o.which.kind == kind and o.which.repetitions == r]
                x = _stack([o.lower[criterion].mean(1) for o in mine])
                y = _stack([o.rise for o in mine])
                axes.plot(
                    x.mean(0), y.mean(0), color=COLOURS[kind], marker=MARKS[kind], markersize=2.5, label=NAMES[kind]
                )
                axes.fill_between(x.mean(0), y.min(0), y.max(0), color=COLOURS[kind], alpha=0.15, linewidth=0)
            axes.axvline(NULL_MEAN, color=_INK, linestyle=":", linewidth=1)
            axes.set_ylim(-0.05 * top, top)
            axes.set_xlim(left=0)
            y_label = f"rise of test NLL, nats\n{criterion.split()[0]} non-members"
            _label(axes, row, column, _times(r), "mean exposure, bits", y_label)


def _steps(grid: Grid, config: StudyConfig, outcomes: list[Outcome]) -> None:
    for row, criterion in enumerate(("anchored raw", "anchored calibrated")):
        for column, r in enumerate(config.repetitions):
            axes = grid[row][column]
            for kind in config.kinds:
                results = [
                    o.forgotten(criterion) for o in outcomes if o.which.kind == kind and o.which.repetitions == r
                ]
                _survival(axes, _joined(results), COLOURS[kind], NAMES[kind], max(config.steps, 1))
            axes.set(xlim=(0, config.steps), ylim=(0, 1.02))
            y_label = f"share still exposed\n{criterion.split()[1]} scores"
            _label(axes, row, column, _times(r), "unlearning step", y_label)


def _terciles(grid: Grid, config: StudyConfig, examples: Examples, outcomes: list[Outcome]) -> None:
    for row, criterion in enumerate(("anchored raw", "anchored calibrated")):
        for column, name in enumerate(("memorization", "difficulty")):
            axes = grid[row][column]
            for number, kind in enumerate(config.kinds):
                mine = [o for o in outcomes if o.which.kind == kind]
                thirds = _thirds(mine, examples, getattr(examples, name), criterion)
                xs = np.arange(3) + 0.12 * (number - (len(config.kinds) - 1) / 2)
                _draw_quartiles(axes, xs, thirds, kind, config.steps)
            axes.set_xticks(range(3), ["lowest third", "middle", "highest third"])
            _label(axes, row, column, "", name, f"steps to forget\n{criterion.split()[1]} scores")
    grid[0][0].set_ylim(bottom=-0.3)


def _thirds(outcomes: list[Outcome], examples: Examples, values: Any, criterion: str) -> list[StepsToForget]:
    """Return the steps to forget of the third of each set with the lowest, middle and highest values."""
    parts: list[list[StepsToForget]] = [[], [], []]
    for o in outcomes:
        result = o.forgotten(criterion)
        third = stats.rankdata(examples.at(values, o.indices), "ordinal") * 3 // (len(o.indices) + 1)
        for t in range(3):
            parts[t].append(StepsToForget(result.steps[third == t], result.censored[third == t]))
    return [_joined(part) for part in parts]


def _draw_quartiles(axes: Any, xs: Any, thirds: list[StepsToForget], kind: str, steps: int) -> None:
    """Draw medians with a line from quartile to quartile, and an arrow where the median lies beyond the run's end."""
    middle, low, high = zip(*(_quartiles(third) for third in thirds), strict=True)
    medians, lows, highs = (np.minimum(values, steps * 1.04) for values in (middle, low, high))
    axes.vlines(xs, lows, highs, color=COLOURS[kind], alpha=0.45, linewidth=1.2)
    style: dict[str, Any] = {"color": COLOURS[kind], "linewidth": 0.8, "label": NAMES[kind]}
    axes.plot(xs, medians, marker=MARKS[kind], markersize=4, **style)
    gone = [i for i in range(3) if middle[i] > steps]
    axes.plot(xs[gone], medians[gone], linestyle="", marker=r"$\uparrow$", markersize=8, color=COLOURS[kind])


def _null(grid: Grid, config: StudyConfig, sets: Sets, examples: Examples, outcomes: list[Outcome]) -> None:
    retrained = {kind: retrained_exposures(sets, examples, kind) for kind in config.kinds}
    for column, title in enumerate(("trained on it", "retrained without it")):
        axes = grid[0][column]
        for kind in config.kinds:
            mine = [o.lower["anchored raw"][0] for o in outcomes if o.which.kind == kind]
            values = np.sort(np.concatenate(mine) if column == 0 else retrained[kind])
            share = 1 - np.arange(len(values)) / len(values)
            axes.step(values, share, where="pre", color=COLOURS[kind], label=NAMES[kind])
        top = np.log2(config.non_members + 1)
        bits = np.linspace(0, top, 100)
        axes.plot(bits, 2.0**-bits, color=_INK, linestyle="--", linewidth=1)
        axes.set(title=title, xlabel="exposure, bits", xlim=(0, top + 0.1), ylim=(0, 1.02))
    grid[0][0].set_ylabel("share of examples\nwith at least that exposure")


def _retrained(grid: Grid, config: StudyConfig, outcomes: list[Outcome]) -> None:
    for row, name in enumerate(("from_retrained", "non_members_from_retrained")):
        for column, r in enumerate(config.repetitions):
            axes = grid[row][column]
            for kind in config.kinds:
                mine = [o for o in outcomes if o.which.kind == kind and o.which.repetitions == r]
                away = _stack([getattr(o, name) for o in mine])
                steps = mine[0].steps[: away.shape[1]]
                axes.plot(steps, away.mean(0), color=COLOURS[kind], label=NAMES[kind])
                axes.fill_between(steps, away.min(0), away.max(0), color=COLOURS[kind], alpha=0.15, linewidth=0)
            axes.set_xlim(0, config.steps)
            y_label = f"{'non-members' if row else 'forget examples'}:\n|NLL - NLL retrained|, nats"
            _label(axes, row, column, _times(r), "unlearning step", y_label)
        grid[row][0].set_ylim(bottom=0)  # after all is drawn: it ends the scaling of the whole row


def retrained_exposures(sets: Sets, examples: Examples, kind: str) -> Any:
    """Return the exposure of every forget example of a kind under the model that saw none of them, bits."""
    indices = [i for which, group in sets.forget.items() if which.kind == kind for i in group]
    return generalized_exposure(
        examples.at(examples.retrained, indices), examples.at(examples.retrained, sets.non_members[kind])
    ).lower


def _survival(axes: Any, result: StepsToForget, colour: str, label: str, end: float) -> None:
    curve = stats.ecdf(stats.CensoredData.right_censored(result.steps, result.censored)).sf
    x = np.concatenate([[0.0], curve.quantiles, [end]])
    y = np.concatenate([[1.0], curve.probabilities, curve.probabilities[-1:]])
    axes.step(x, y, where="post", color=colour, label=label)


def _quartiles(result: StepsToForget) -> tuple[float, float, float]:
    """Return the Kaplan-Meier median, first and third quartile; inf where the curve does not fall to the level."""
    curve = stats.ecdf(stats.CensoredData.right_censored(result.steps, result.censored)).sf
    quartiles = []
    for level in (0.5, 0.75, 0.25):
        below = curve.probabilities <= level + 1e-12
        quartiles.append(float(curve.quantiles[below.argmax()]) if below.any() else np.inf)
    return quartiles[0], quartiles[1], quartiles[2]


def _joined(results: Sequence[StepsToForget]) -> StepsToForget:
    return StepsToForget(np.concatenate([r.steps for r in results]), np.concatenate([r.censored for r in results]))


def _stack(rows: Sequence[Any]) -> Any:
    """Return (draws, T), each row cut to the length of the shortest run."""
    shortest = min(map(len, rows))
    return np.stack([row[:shortest] for row in rows])


def _label(axes: Any, row: int, column: int, title: str, x: str, y: str) -> None:
    """Label axes in a grid of two rows: the title above, the x axis below, the y axis on the left."""
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
