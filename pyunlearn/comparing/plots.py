"""A comparison for the eye: one table, one plot."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pyunlearn.comparing.result import Comparison, Row, Standing, write_file
from pyunlearn.errors import ArgumentError, DependencyError
from pyunlearn.metrics import NULL_MEAN

_INK, _FAINT, _POINT, _MIXED = "#333a40", "#8a949c", "#33658a", "#c77700"
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "comparison", "font.family": ["sans-serif"], "font.size": 9, "text.color": _INK, "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT, "xtick.color": _INK, "ytick.color": _INK, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
}  # fmt: skip


def comparison_table(comparison: Comparison, *, wide: bool = True) -> Any:
    """A rich table: the original, then a row for each method at equal utility; below it why any could not be measured.

    Narrow, for 80 columns, it leaves out extraction strength, negative log-likelihoods and memory.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    tau, metric = comparison.settings["tau"], comparison.settings["metric"].replace("_", " ")
    table = Table(
        title=f"exposure in bits at {tau:.0%} of the original's {metric}, {comparison.utility_text}", title_justify="left", caption_justify="left",
        box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False,
    )  # fmt: skip
    table.add_column("method", no_wrap=True)
    shown = [column for column in _COLUMNS if wide or column[1]]
    for name, _, _, _ in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for row in [None, *comparison.rows]:
        s = comparison.original if row is None else row.calibrated
        if row is not None and s is None:
            cells = [row.status, *["-"] * (len(shown) - 1)]
        else:
            assert s is not None  # for mypy: a done row has one
            cells = [
                of_standing(s) if of_standing else "-" if row is None else of_row(row)
                for _, _, of_standing, of_row in shown
            ]
            cells = [f"{comparison.utility_share(s):.1%}" if cell == "kept" else cell for cell in cells]
        style = "dim" if row is None else "" if row.done else "red"
        table.add_row("original" if row is None else row.method, *cells, style=style)
    table.caption = "\n".join(_captions(comparison)) or None
    return table


_COLUMNS: list[
    tuple[str, bool, Callable[[Standing], str] | None, Callable[[Row], str]]
] = [  # name, whether narrow has it, of what
    ("expo-\nsure", True, lambda s: f"{s.exposure.estimate:.2f}", str),
    ("95 %\ninterval", True, lambda s: f"{s.exposure.low:.1f}-{s.exposure.high:.1f}", str),
    ("for-\ngotten", True, lambda s: f"{s.share('forgotten'):.0%}", str),
    ("ex-\nposed", True, lambda s: f"{s.share('still exposed'):.0%}", str),
    ("over", True, lambda s: f"{s.share('over-unlearned'):.0%}", str),
    ("ex-\ntracted", False, lambda s: f"{s.extraction_strength.estimate:.0%}", str),
    ("forget\nNLL", False, lambda s: f"{s.forget_nll.estimate:.2f}", str),
    ("kept\nNLL", False, lambda s: f"{s.utility_nll.estimate:.2f}", str),
    ("kept", True, lambda s: "kept", str),
    ("mix", True, None, lambda r: f"{r.weight:.2f}{'~' if _may_be_larger(r) else ''}"),
    ("steps", True, None, lambda r: f"{r.steps}"),
    ("s", True, None, lambda r: f"{r.seconds:.0f}"),
    ("peak\nMiB", False, None, lambda r: "-" if r.peak_memory is None else f"{r.peak_memory / 2**20:.0f}"),
]


def _may_be_larger(row: Row) -> bool:
    return row.monotone is False and row.weight != 1


def _captions(comparison: Comparison) -> list[str]:
    found = [f"{row.method}: {row.status}, {row.reason}" for row in comparison.rows if not row.done]
    if any(_may_be_larger(row) for row in comparison.rows):
        found.append("~ the utility did not fall steadily with the weight: a larger weight may keep it too")
    if unmemorized := comparison.original.verdicts["not memorized"]:
        found.append(
            f"{unmemorized} of {len(comparison.original.exposures)} forget texts are not memorized by the original, and left alone"
        )
    return found


def require_plot_package() -> None:
    """Raises DependencyError unless plots can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise DependencyError(
            'the plot needs matplotlib, not installed here: run `pip install "pyunlearn[report]"`, or leave it out (--no-plot)'
        )


def comparison_plot(comparison: Comparison, kind: str = "svg") -> bytes:
    """Mean exposure of the forget set against the share of the original's utility, as "svg" or "png": the file's bytes.

    A filled point is a method at equal utility, with its 95 % interval; a hollow one, joined to it, the same method before mixing. Lower is more
    forgotten, until the line of unseen text; further right is more kept.

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
        write_file(folder / f"comparison.{kind}", comparison_plot(comparison, kind))


def _draw(axes: Any, comparison: Comparison, done: list[Row]) -> None:
    top, kept, bits = float(np.log2(comparison.references + 1)), [], []
    for row in done:
        assert row.calibrated is not None
        assert row.uncalibrated is not None
        (x, y), (x0, y0) = (
            (100 * comparison.utility_share(s), s.exposure.estimate) for s in (row.calibrated, row.uncalibrated)
        )
        kept += [x, x0]
        bits.append((y, x, row.method))
        axes.plot([x0, x], [y0, y], color=_MIXED, linewidth=0.8, alpha=0.5)
        axes.plot(x0, y0, "o", markersize=4, color="white", markeredgecolor=_MIXED)
        low, high = row.calibrated.exposure.low, row.calibrated.exposure.high
        axes.plot([x, x], [low, high], color=_POINT, linewidth=1, alpha=0.35)
        axes.plot(x, y, "o", markersize=5, color=_POINT)
    original = comparison.original.exposure.estimate
    axes.plot(100, original, "*", markersize=12, color=_INK)
    axes.annotate("original", (100, original), (0, 7), textcoords="offset points", ha="center")
    left, right = min([*kept, 100 * comparison.settings["tau"], 100]), max([*kept, 100])
    span = max(right - left, 1.0)
    right += 0.04 * span
    axes.axhline(NULL_MEAN, color=_INK, linestyle=":", linewidth=1)
    axes.axvline(100 * comparison.settings["tau"], color=_INK, linestyle=":", linewidth=1)
    axes.set(
        xlim=(left - 0.06 * span, right), ylim=(-0.25, top + 0.5), ylabel="mean exposure of the forget set, bits",
        xlabel=f"{comparison.settings['metric'].replace('_', ' ')} on the {comparison.utility_text}, % of the original's",
    )  # fmt: skip
    axes.text(left - 0.05 * span, NULL_MEAN, "unseen text", va="bottom", fontsize=7)
    # the names stand in a column at the right, each led to its point, so that none covers another
    heights = _spread([y for y, _, _ in sorted(bits)], 0.85 * (top + 0.75) / max(len(bits), 12), -0.15, top + 0.4)
    for (y, x, name), at in zip(sorted(bits), heights, strict=True):
        axes.annotate(
            name, (x, y), (right + 0.05 * span, at), va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": _FAINT, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 3},
        )  # fmt: skip


def _spread(places: list[float], gap: float, low: float, high: float) -> list[float]:
    """The places, in order, moved as little as a sweep up and one down need to bring them `gap` apart, within the limits where they fit."""
    found: list[float] = []
    for place in places:
        found.append(max(place, low if not found else found[-1] + gap))
    limit = high
    for i in reversed(range(len(found))):
        found[i] = min(found[i], limit)
        limit = found[i] - gap
    return found
