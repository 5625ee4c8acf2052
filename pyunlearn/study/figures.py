"""The figures of a study, SVG and PNG, made for print."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from pyunlearn.study.claims import CLAIMS, Claim
from pyunlearn.study.config import StudyConfig
from pyunlearn.study.folder import Folder
from pyunlearn.study.outcomes import Outcome

COLOURS = {"id": "#33658a", "mismatched": "#2e7d4f", "canary": "#c77700", "random": "#b3261e"}
NAMES = {"id": "in distribution", "mismatched": "mismatched", "canary": "canaries", "random": "random tokens"}
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
    "claims": "The contrast of each claim in every seed (dots), its mean and 95 % interval (line). Above 0 speaks for "
    "the claim; the grey band is the margin that does not matter.",
    "distance": "Distance of the forget sets from the models that never saw them, during unlearning: mean over seeds, "
    "and their range. A set counts as forgotten at 0.",
    "trade-off": "Rise of the test NLL against that distance: the price on the way to 0. Unlearning goes from left to "
    "right; mean over seeds.",
}
"""Name -> caption."""
Grid = Any  # (rows, columns) of axes


def draw_all(folder: Folder, config: StudyConfig, outcomes: Sequence[Outcome], claims: Sequence[Claim]) -> None:
    """Write figures/NAME.svg and .png, at the learning rate that decides."""
    first = [o for o in outcomes if o.rate == config.unlearning_rates[0]]
    _figure(folder, "claims", len(claims), lambda grid: _claims(grid, claims))
    _figure(folder, "distance", len(config.doses), lambda grid: _distance(grid, config, first))
    _figure(folder, "trade-off", len(config.doses), lambda grid: _trade_off(grid, config, first))


def _claims(grid: Grid, claims: Sequence[Claim]) -> None:
    for axes, claim in zip(grid[0], claims, strict=True):
        d, values = claim.decision, np.array(claim.contrasts)
        axes.axhspan(-d.margin, d.margin, color=_FAINT, alpha=0.25, linewidth=0)
        axes.axhline(0, color=_FAINT, linewidth=0.8)
        axes.plot(np.linspace(-0.25, 0.25, len(values)), values, ".", color=COLOURS["id"], markersize=4, alpha=0.7)
        axes.vlines(0.5, d.low, d.high, color=_INK)
        axes.plot(0.5, d.mean, "o", color=_INK, markersize=4)
        axes.set(title=claim.name, xlim=(-0.5, 0.8), xticks=[], xlabel=d.outcome)
        axes.set_ylabel(CLAIMS[claim.name].unit)


def _distance(grid: Grid, config: StudyConfig, outcomes: list[Outcome]) -> None:
    for axes, kind, mine in _panels(grid, config, outcomes):
        away = _stack([o.distance.mean(1) for o in mine])
        steps = mine[0].steps[: away.shape[1]]
        axes.plot(steps, away.mean(0), color=COLOURS[kind], label=NAMES[kind])
        axes.fill_between(steps, away.min(0), away.max(0), color=COLOURS[kind], alpha=0.15, linewidth=0)
        axes.axhline(0, color=_INK, linestyle=":", linewidth=1)
        axes.set(xlim=(0, config.steps), xlabel="unlearning step")
    lowest = min(float(o.distance.mean(1).min()) for o in outcomes)
    grid[0][0].set_ylim(1.1 * lowest, max(1.0, -0.5 * lowest))
    grid[0][0].set_ylabel("NLL minus that of\nretrained models, nats")


def _trade_off(grid: Grid, config: StudyConfig, outcomes: list[Outcome]) -> None:
    for axes, kind, mine in _panels(grid, config, outcomes):
        away, rise = _stack([o.distance.mean(1) for o in mine]), _stack([o.rise for o in mine])
        axes.plot(away.mean(0), rise.mean(0), color=COLOURS[kind], marker=".", markersize=3, label=NAMES[kind])
        axes.axvline(0, color=_INK, linestyle=":", linewidth=1)
        axes.set(xlabel="NLL minus that of\nretrained models, nats", ylim=(-0.02, 0.3))
    for axes in grid[0]:
        starts = [float(line.get_xdata()[0]) for line in axes.lines if line.get_marker() == "."]
        axes.set_xlim(1.05 * min(starts) - 0.1, 2)
    grid[0][0].set_ylabel("rise of the test NLL, nats")


def _panels(grid: Grid, config: StudyConfig, outcomes: list[Outcome]) -> list[tuple[Any, str, list[Outcome]]]:
    """Return (axes, kind, runs) of every dose and kind."""
    panels = []
    for axes, dose in zip(grid[0], config.doses, strict=True):
        axes.set_title("seen once" if dose == 1 else f"seen {dose} times")
        for kind in config.kinds:
            panels.append((axes, kind, [o for o in outcomes if (o.which.kind, o.which.dose) == (kind, dose)]))
    return panels


def _stack(rows: Sequence[Any]) -> Any:
    """Return (seeds, T), each row cut to the length of the shortest run."""
    shortest = min(map(len, rows))
    return np.stack([row[:shortest] for row in rows])


def _figure(folder: Folder, name: str, columns: int, draw: Callable[[Grid], None]) -> None:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_STYLE | {"svg.hashsalt": name}):
        width = 1.9 if name == "claims" else 2.4
        figure = Figure(figsize=(1.0 + width * columns, 2.6), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(1, columns, squeeze=False, sharey=name != "claims")
        draw(grid)
        lines, labels = grid[0][0].get_legend_handles_labels()
        if labels:
            figure.legend(lines, labels, loc="outside upper center", ncols=len(labels), handlelength=1.4)
        for suffix, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
            save = partial(figure.savefig, format=suffix, metadata=metadata)
            folder.write(f"figures/{name}.{suffix}", save)
