"""Reports: what a person reads of a result."""

from pyunlearn.report.table import narrow_table, result_table, utility_line

__all__ = ["narrow_table", "result_table", "utility_line"]
