"""Reports: tables, sentences and pages that present a result."""

from pyunlearn.report.attacks import attack_lines, attack_table, show_attack, trial_table
from pyunlearn.report.audit import audit_lines, audit_table, write_audit
from pyunlearn.report.html import audit_page, require_page_packages
from pyunlearn.report.table import edit_line, edit_table, record_table, result_table, utility_line
from pyunlearn.report.tasks import comparison_task_table, task_table

__all__ = [
    "attack_lines",
    "attack_table",
    "audit_lines",
    "audit_page",
    "audit_table",
    "comparison_task_table",
    "edit_line",
    "edit_table",
    "record_table",
    "require_page_packages",
    "result_table",
    "show_attack",
    "task_table",
    "trial_table",
    "utility_line",
    "write_audit",
]
