"""The ops: fused log-likelihoods and what is made of them, with their definitions in pyunlearn.ops.reference."""

from pyunlearn.ops.example_objective import ExampleObjective, example_objective
from pyunlearn.ops.linear_log_likelihood import linear_log_likelihood
from pyunlearn.ops.log_likelihood import log_likelihood
from pyunlearn.ops.weighted_log_likelihood import weighted_log_likelihood

__all__ = [
    "ExampleObjective", "example_objective", "linear_log_likelihood", "log_likelihood", "weighted_log_likelihood",
]  # fmt: skip
