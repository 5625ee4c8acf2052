"""The ops: fused log-likelihoods, with their definitions in pyunlearn.ops.reference."""

from pyunlearn.ops.linear_log_likelihood import linear_log_likelihood
from pyunlearn.ops.log_likelihood import log_likelihood

__all__ = ["linear_log_likelihood", "log_likelihood"]
