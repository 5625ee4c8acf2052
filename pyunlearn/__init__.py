"""pyunlearn: remove chosen training examples from a language model, and measure that they are gone."""

from pyunlearn.audit_result import Audit, AuditedExample
from pyunlearn.auditing import audit
from pyunlearn.comparing import Comparison, compare
from pyunlearn.errors import (
    ArgumentError,
    DataError,
    DependencyError,
    ModelError,
    OutputError,
    PyunlearnError,
    TrainingError,
)
from pyunlearn.result import ExampleResult, Result, Utility
from pyunlearn.unlearn import unlearn

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "Audit",
    "AuditedExample",
    "Comparison",
    "DataError",
    "DependencyError",
    "ExampleResult",
    "ModelError",
    "OutputError",
    "PyunlearnError",
    "Result",
    "TrainingError",
    "Utility",
    "audit",
    "compare",
    "unlearn",
]
