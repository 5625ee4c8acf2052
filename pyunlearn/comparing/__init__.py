"""Methods side by side: each from the same weights, brought to equal utility by mixing, then measured."""

from pyunlearn.comparing.api import compare
from pyunlearn.comparing.measurement import UTILITY_METRICS
from pyunlearn.comparing.plots import comparison_plot, comparison_table, require_plot_package
from pyunlearn.comparing.result import Comparison, Row, Standing

__all__ = [
    "UTILITY_METRICS",
    "Comparison",
    "Row",
    "Standing",
    "compare",
    "comparison_plot",
    "comparison_table",
    "require_plot_package",
]
