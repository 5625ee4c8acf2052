"""Plots of an audit as inline SVG: no script, no font, nothing loaded from elsewhere."""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pyunlearn.errors import missing_packages
from pyunlearn.metrics import NULL_MEAN, SIGNIFICANT

COLOURS = {
    "forgotten": "#2e7d4f",
    "no likelier": "#5b8fa8",
    "not memorized": "#33658a",
    "undecided": "#b59f3b",
    "still exposed": "#c77700",
    "over-unlearned": "#b3261e",
}
_INK, _FAINT, _BARS = "#333a40", "#8a949c", "#9fb8ca"
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
}
_PAIRS = 24  # texts drawn as lines; more are points


def require_packages() -> None:
    """Raise DependencyError unless pages and plots can be made."""
    missing = [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise missing_packages("the HTML page", *missing, otherwise="leave the page out (--no-html)")


def exposure_histogram(exposures: Sequence[float], non_members: int, verdicts: Sequence[str]) -> str:
    """Draw the histogram of exposures in bits, coloured by verdict, with that expected of unseen text as a line.

    The null is exact: with m non-members, a text exchangeable with them has each of the m + 1 ranks equally often.
    """
    top = float(np.log2(non_members + 1))
    edges = np.linspace(0, max(top, *exposures) + 1e-9, 13)
    null = np.log2((non_members + 1) / np.arange(1, non_members + 2))
    expected = np.histogram(null, edges)[0] * len(exposures) / (non_members + 1)

    def draw(axes: Any) -> None:
        kinds = [kind for kind in COLOURS if kind in verdicts]
        values = [[e for e, v in zip(exposures, verdicts, strict=True) if v == kind] for kind in kinds]
        axes.hist(values, edges, stacked=True, color=[COLOURS[k] for k in kinds], label=kinds, rwidth=0.9)
        axes.stairs(expected, edges, color=_INK, linewidth=1.4, label="unseen text")
        axes.axvline(SIGNIFICANT, color=_INK, linestyle=":", linewidth=1)
        axes.set(xlabel="exposure, bits (right: stands out as memorized)", ylabel="texts", xlim=(0, edges[-1]))
        axes.yaxis.get_major_locator().set_params(integer=True)
        _legend(axes, len(kinds) + 1)

    return _svg("histogram", draw, 2.9)


def before_after(before: Sequence[float], after: Sequence[float], verdicts: Sequence[str], names: Sequence[str]) -> str:
    """Draw each text's exposure in bits before and now: as a line, or where there are many as a point."""
    few = len(before) <= _PAIRS
    order = np.argsort(before, kind="stable")

    def arrows(axes: Any) -> None:
        for row, i in enumerate(order):
            colour = COLOURS[verdicts[i]]
            axes.plot([before[i], after[i]], [row, row], color=colour, linewidth=1.4, alpha=0.6)
            axes.plot(before[i], row, "o", color="white", markeredgecolor=colour, markersize=5)
            axes.plot(after[i], row, "o", color=colour, markersize=5)
        axes.set_yticks(range(len(order)), [names[i] for i in order])
        for at in (NULL_MEAN, SIGNIFICANT):
            axes.axvline(at, color=_INK, linestyle=":", linewidth=1)
        axes.set(xlabel="exposure, bits: before (hollow), now (filled)", ylim=(-0.7, len(order) - 0.3))
        axes.set_xlim(left=0)

    def points(axes: Any) -> None:
        for kind in COLOURS:
            chosen = [i for i, v in enumerate(verdicts) if v == kind]
            if chosen:
                axes.plot(
                    [before[i] for i in chosen],
                    [after[i] for i in chosen],
                    "o",
                    color=COLOURS[kind],
                    alpha=0.55,
                    markersize=4,
                    label=kind,
                )
        far = max(*before, *after)
        axes.plot([0, far], [0, far], color=_FAINT, linewidth=1)
        axes.axhline(NULL_MEAN, color=_INK, linestyle=":", linewidth=1)
        axes.set(xlabel="exposure before, bits", ylabel="exposure now, bits")
        _legend(axes, len(set(verdicts)))

    return _svg("before-after", arrows if few else points, max(1.6, 0.8 + 0.22 * len(before)) if few else 3.2)


def roc(curves: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> str:
    """Draw the ROC curve of each score: (label, its (false, true) positive rates)."""

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=_FAINT, linewidth=1, linestyle="--", label="guessing")
        for (label, points), colour in zip(
            curves, ("#33658a", "#c77700", "#2e7d4f", "#7a4b94", "#b3261e"), strict=False
        ):
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.5, label=label)
        axes.set(xlabel="false alarms among unseen texts", ylabel="forget texts found", xlim=(0, 1), ylim=(0, 1.02))
        _legend(axes, 1)  # above: curves go everywhere

    return _svg("roc", draw, 4.2)


def _legend(axes: Any, columns: int) -> None:
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=min(columns, 3),
        borderaxespad=0.2,
        handlelength=1.2,
        columnspacing=1.2,
    )


def _svg(name: str, draw: Callable[[Any], None], height: float) -> str:
    """Return the drawing as an <svg> element, 4.4 inches wide, that scales with its container."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # the salt makes ids that are the same every time and differ between plots
    with rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(4.4, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", out.getvalue(), flags=re.S)
    text = text[text.index("<svg") :]
    return re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", re.sub(r'height="[^"]*pt"', "", text, count=1), count=1)
