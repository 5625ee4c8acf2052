"""Fused log-likelihood ops and the objectives built on them; their definitions are in pyunlearn.ops.reference."""

from pyunlearn.ops.example_objective import ExampleObjective, example_objective
from pyunlearn.ops.kl_divergence import kl_divergence
from pyunlearn.ops.linear_log_likelihood import linear_log_likelihood
from pyunlearn.ops.log_likelihood import log_likelihood
from pyunlearn.ops.logit_margin import logit_margin
from pyunlearn.ops.token_objective import TokenObjective, token_objective
from pyunlearn.ops.token_statistics import TokenStatistics, token_statistics, token_statistics_from_logits
from pyunlearn.ops.weighted_log_likelihood import weighted_log_likelihood

__all__ = [
    "ExampleObjective",
    "TokenObjective",
    "TokenStatistics",
    "example_objective",
    "kl_divergence",
    "linear_log_likelihood",
    "log_likelihood",
    "logit_margin",
    "token_objective",
    "token_statistics",
    "token_statistics_from_logits",
    "weighted_log_likelihood",
]
