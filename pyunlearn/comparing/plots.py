"""Show a comparison of methods as one table and one plot."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pyunlearn.comparing.result import Comparison, Measurement, Row
from pyunlearn.errors import ArgumentError, missing_packages
from pyunlearn.metrics import NULL_MEAN
from pyunlearn.output import write_bytes
from pyunlearn.probes.non_members import NO_LIKELIER

_INK, _FAINT, _POINT, _MIXED = "#333a40", "#8a949c", "#33658a", "#c77700"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "comparison",
    "font.family": ["sans-serif"],
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}


class _Column(NamedTuple):
    """A table column: its text is made of a measurement in a comparison, or of a method's row."""

    title: str
    narrow: bool  # also part of a table of 80 columns
    of_measurement: Callable[[Measurement, Comparison], str] | None
    of_row: Callable[[Row], str] = str


def comparison_table(comparison: Comparison, *, wide: bool = True) -> Any:
    """Return a rich table: the original, then each method at equal utility; below it why a method was not measured.

    Narrow, for 80 columns, it leaves out extraction strength, negative log-likelihoods, the holdout and memory.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    tau, metric = comparison.settings["tau"], comparison.settings["metric"].replace("_", " ")
    more = "" if comparison.equalized else "or more "
    table = Table(
        title=f"exposure in bits at {tau:.0%} {more}of the original's {metric}, {comparison.utility_text}",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("method", no_wrap=True)
    columns = [column for column in _columns(comparison) if wide or column.narrow]
    for column in columns:
        table.add_column(column.title, justify="right", no_wrap=True)
    table.add_row("original", *_cells(comparison, comparison.original, None, columns), style="dim")
    for row in comparison.rows:
        if row.calibrated is None:
            table.add_row(row.method, row.status, *["-"] * (len(columns) - 1), style="red")
        else:
            table.add_row(row.method, *_cells(comparison, row.calibrated, row, columns))
    table.caption = "\n".join(_captions(comparison)) or None
    return table


def _cells(comparison: Comparison, measured: Measurement, row: Row | None, columns: list[_Column]) -> list[str]:
    cells = []
    for column in columns:
        if column.of_measurement is not None:
            cells.append(column.of_measurement(measured, comparison))
        else:
            cells.append("-" if row is None else column.of_row(row))
    return cells


def _range(low: float, high: float) -> str:
    """Return an interval as text; one text has none."""
    return "-" if math.isnan(low) else f"{low:.1f}-{high:.1f}"


_FORGOTTEN = _Column("for-\ngotten", True, lambda m, _: f"{m.share('forgotten'):.0%}")
_NO_LIKELIER = _Column("no like-\nlier", True, lambda m, _: f"{m.share(NO_LIKELIER):.0%}")
_HOLDOUT = _Column("hold-\nout", False, lambda m, c: f"{c.unseen_share(m):.1%}")
_COLUMNS = [
    _Column("expo-\nsure", True, lambda m, _: f"{m.exposure.estimate:.2f}"),
    _Column("95 %\ninterval", True, lambda m, _: _range(m.exposure.low, m.exposure.high)),
    _FORGOTTEN,
    _Column("ex-\nposed", True, lambda m, _: f"{m.share('still exposed'):.0%}"),
    _Column("over", True, lambda m, _: f"{m.share('over-unlearned'):.0%}"),
    _Column("ex-\ntracted", False, lambda m, _: f"{m.extraction_strength.estimate:.0%}"),
    _Column("forget\nNLL", False, lambda m, _: f"{m.forget_nll.estimate:.2f}"),
    _Column("utility\nNLL", False, lambda m, _: f"{m.utility_nll.estimate:.2f}"),
    _Column("util-\nity", True, lambda m, c: f"{c.utility_share(m):.1%}"),
    _HOLDOUT,
    _Column("mix", True, None, lambda r: f"{r.weight:.2f}{_mark(r)}"),
    _Column("steps", True, None, lambda r: f"{r.steps}"),
    _Column("s", True, None, lambda r: f"{r.seconds:.0f}"),
    _Column("peak\nMiB", False, None, lambda r: "-" if r.peak_memory is None else f"{r.peak_memory / 2**20:.0f}"),
]


def _columns(comparison: Comparison) -> list[_Column]:
    """Return the columns: the best verdict that the non-members allow, and the holdout where that is another text."""
    weak, apart = comparison.evidence == "self-sampled", comparison.evidence == "holdout" != comparison.utility_text
    columns = [_NO_LIKELIER if weak and column is _FORGOTTEN else column for column in _COLUMNS]
    return [column for column in columns if apart or column is not _HOLDOUT]


def _mark(row: Row) -> str:
    """Return the marks of a weight, which the caption explains."""
    return "~" * _may_be_larger(row) + "+" * (row.equalized is False)


def _may_be_larger(row: Row) -> bool:
    return row.monotone is False and row.weight != 1


def _captions(comparison: Comparison) -> list[str]:
    lines = [f"{row.method}: {row.status}, {row.reason}" for row in comparison.rows if not row.done]
    if any(_may_be_larger(row) for row in comparison.rows):
        lines.append("~ the utility did not fall steadily with the weight: a larger weight may retain it too")
    if any("+" in _mark(row) for row in comparison.rows):
        lines.append(f"+ not at equal utility: mixing cannot bring it nearer to {comparison.settings['tau']:.0%}")
    if not_memorized := comparison.original.verdicts["not memorized"]:
        lines.append(
            f"{not_memorized} of {len(comparison.original.exposures)} forget texts are not memorized by the original, "
            "and are left alone"
        )
    return lines


def require_plot_package() -> None:
    """Raise DependencyError unless plots can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise missing_packages("the plot", "matplotlib", otherwise="leave it out (--no-plot)")


def draws_plots(plot: bool | None) -> bool:
    """Return whether a comparison draws its plots: as `plot` says, by default where matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None if plot is None else plot


def comparison_plot(comparison: Comparison, kind: str = "svg") -> bytes:
    """Draw mean exposure of the forget set against the share of the original's utility; return the file's bytes.

    A filled point is a method's mixture at equal utility, or at more where no weight gives less, with its 95 %
    interval; a hollow one, joined to it, the same method before mixing. Lower is more forgotten, down to the line of
    unseen text; further right is more utility.

    Args:
        comparison: what `pyunlearn.compare` returned.
        kind: "svg" or "png".

    Raises DependencyError without matplotlib; ArgumentError for another kind.
    """
    if kind not in ("svg", "png"):
        raise ArgumentError(f'kind must be "svg" or "png", got {kind!r}')
    require_plot_package()
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    done = [row for row in comparison.rows if row.calibrated is not None and row.uncalibrated is not None]
    with rc_context(_STYLE):
        figure = Figure(figsize=(6.4, max(3.6, 1.2 + 0.19 * len(done))), layout="constrained")
        FigureCanvasAgg(figure)
        _draw(figure.add_subplot(), comparison, done)
        out = io.BytesIO()
        figure.savefig(out, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    return out.getvalue()


def save_plots(comparison: Comparison, folder: Path) -> None:
    """Write comparison.svg and comparison.png into a folder. Raises DependencyError without matplotlib."""
    for kind in ("svg", "png"):
        write_bytes(folder / f"comparison.{kind}", comparison_plot(comparison, kind))


def _draw(axes: Any, comparison: Comparison, done: list[Row]) -> None:
    points = [_draw_method(axes, comparison, row) for row in done]  # (exposure, share, share before mixing, method)
    axes.plot(100, comparison.original.exposure.estimate, "*", markersize=12, color=_INK)
    axes.annotate(
        "original", (100, comparison.original.exposure.estimate), (0, 7), textcoords="offset points", ha="center"
    )
    tau, top = 100 * comparison.settings["tau"], float(np.log2(comparison.non_members + 1))
    shares = [share for point in points for share in point[1:3]]
    left, right = min([*shares, tau, 100]), max([*shares, 100])
    span = max(right - left, 1.0)
    right += 0.04 * span
    axes.axhline(NULL_MEAN, color=_INK, linestyle=":", linewidth=1)
    axes.axvline(tau, color=_INK, linestyle=":", linewidth=1)
    metric = comparison.settings["metric"].replace("_", " ")
    axes.set(
        xlim=(left - 0.06 * span, right),
        ylim=(-0.25, top + 0.5),
        ylabel="mean exposure of the forget set, bits",
        xlabel=f"{metric} on the {comparison.utility_text}, % of the original's",
    )
    axes.text(left - 0.05 * span, NULL_MEAN, "unseen text", va="bottom", fontsize=7)
    # names in a column at the right, each with a line to its point, so that none covers another
    named = sorted((exposure, share, method) for exposure, share, _, method in points)
    gap = 0.85 * (top + 0.75) / max(len(named), 12)
    heights = _spread([exposure for exposure, _, _ in named], gap, -0.15, top + 0.4)
    for (exposure, share, method), height in zip(named, heights, strict=True):
        axes.annotate(
            method,
            (share, exposure),
            (right + 0.05 * span, height),
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": _FAINT, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 3},
        )


def _draw_method(axes: Any, comparison: Comparison, row: Row) -> tuple[float, float, float, str]:
    """Draw a method before and after mixing; return (exposure, utility share, share before mixing, its name)."""
    assert row.calibrated is not None
    assert row.uncalibrated is not None
    (x, y), (x0, y0) = (
        (100 * comparison.utility_share(m), m.exposure.estimate) for m in (row.calibrated, row.uncalibrated)
    )
    axes.plot([x0, x], [y0, y], color=_MIXED, linewidth=0.8, alpha=0.5)
    axes.plot(x0, y0, "o", markersize=4, color="white", markeredgecolor=_MIXED)
    low, high = row.calibrated.exposure.low, row.calibrated.exposure.high
    axes.plot([x, x], [low, high], color=_POINT, linewidth=1, alpha=0.35)
    axes.plot(x, y, "o", markersize=5, color=_POINT)
    return y, x, x0, row.method


def _spread(heights: list[float], gap: float, low: float, high: float) -> list[float]:
    """Move ascending heights apart by at least `gap`, within the limits where they fit: one sweep up, one down."""
    spread: list[float] = []
    for height in heights:
        spread.append(max(height, spread[-1] + gap if spread else low))
    limit = high
    for i in reversed(range(len(spread))):
        spread[i] = min(spread[i], limit)
        limit = spread[i] - gap
    return spread
