"""Methods side by side: each from the same weights, brought to equal utility by mixing, then measured."""

from pyunlearn.comparing._compare import compare
from pyunlearn.comparing._comparison import Comparison, Row, Standing
from pyunlearn.comparing._drawing import comparison_plot, comparison_table, require_plot_package
from pyunlearn.comparing._yardstick import UTILITY_METRICS

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
