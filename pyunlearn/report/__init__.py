"""Reports: what a person reads of a result."""

from pyunlearn.report.table import result_table, utility_line

__all__ = ["result_table", "utility_line"]
