"""The metrics: pure functions, numbers in, numbers out."""

from pyunlearn.metrics.exposure import NULL_MEAN, SIGNIFICANT, Exposure, generalized_exposure
from pyunlearn.metrics.extraction import (
    GreedyExtraction,
    VerbatimMatch,
    extraction_likelihood,
    extraction_probability,
    extraction_strength_by_bisection,
    extraction_strength_by_scan,
    log_queries_to_extract,
    rouge_l,
    verbatim_match,
)
from pyunlearn.metrics.memorization import (
    counterfactual_memorization,
    discoverable_extraction,
    exact_memorization,
    extraction_strength,
    memorization_accuracy,
    simplicity,
)

__all__ = [
    "NULL_MEAN",
    "SIGNIFICANT",
    "Exposure",
    "GreedyExtraction",
    "VerbatimMatch",
    "counterfactual_memorization",
    "discoverable_extraction",
    "exact_memorization",
    "extraction_likelihood",
    "extraction_probability",
    "extraction_strength",
    "extraction_strength_by_bisection",
    "extraction_strength_by_scan",
    "generalized_exposure",
    "log_queries_to_extract",
    "memorization_accuracy",
    "rouge_l",
    "simplicity",
    "verbatim_match",
]
