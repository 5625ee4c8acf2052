"""The unlearning loop: configuration, gradient ascent with per-example stopping, checkpoints, result."""

from pyunlearn.unlearning.api import unlearn
from pyunlearn.unlearning.result import ExampleResult, Result, Utility

__all__ = ["ExampleResult", "Result", "Utility", "unlearn"]
