"""Time against memory, one panel a case: the effect of a memory allowance."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from benchmarks.harness import result_path


def time_against_memory(rows: list[dict[str, Any]], about: dict[str, Any], folder: Path) -> Path | None:
    """Plot milliseconds against extra memory of every unmasked case with both gradients, on logarithmic axes.

    None without such a case, or without matplotlib.
    """
    panels: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        size, dtype, masked, mode = row["case"].split(", ")
        if masked == "0% masked" and mode in ("full", "workspace"):
            panels.setdefault(f"{size}, {dtype}", []).append(row)
    if not panels or importlib.util.find_spec("matplotlib") is None:
        return None
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(6.5 * len(panels), 4.5), squeeze=False, layout="constrained"
    )
    for axis, (name, points) in zip(axes[0], panels.items(), strict=True):
        seen: set[str] = set()
        for row in points:
            if row["name"] in seen:
                continue
            seen.add(row["name"])
            mine = row["name"].startswith("pyunlearn")
            kind = "one pass" if "one pass" in row["name"] else "two passes"
            colour = {"one pass": "#0b6e4f", "two passes": "#1f5fa8"}[kind] if mine else "#888888"
            axis.plot(max(row["extra_mib"], 1), row["ms"], "o" if mine else "s", color=colour)
            axis.annotate(
                row["name"].removeprefix("pyunlearn, ").removeprefix("pyunlearn "),
                (max(row["extra_mib"], 1), row["ms"]),
                fontsize=7,
                xytext=(4, 4),
                textcoords="offset points",
                color=colour,
            )
        axis.set(xscale="log", yscale="log", xlabel="extra memory, MiB", ylabel="forward + backward, ms", title=name)
        axis.margins(x=0.3, y=0.15)  # room for the names
        axis.grid(alpha=0.3, which="both")
    figure.suptitle(
        f"linear log-likelihood on {about['device']}: blue two passes, green one pass, grey others", fontsize=10
    )
    path = result_path("linear_log_likelihood", about, "svg", folder)
    figure.savefig(path)
    return path
