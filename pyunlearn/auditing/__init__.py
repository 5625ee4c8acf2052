"""The audit: measure what a model remembers of given texts, without changing it."""

from pyunlearn.auditing.api import audit
from pyunlearn.auditing.result import Audit, AuditedExample

__all__ = ["Audit", "AuditedExample", "audit"]
