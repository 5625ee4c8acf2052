"""The metrics: pure functions, numbers in, numbers out."""

from pyunlearn.metrics._skew_normal import SkewNormalFit
from pyunlearn.metrics.confidence import Interval, PairedDifference, bootstrap_interval, paired_difference
from pyunlearn.metrics.exposure import (
    NULL_MEAN,
    SIGNIFICANT,
    Exposure,
    calibrated_scores,
    exposure,
    generalized_exposure,
)
from pyunlearn.metrics.exposure_tests import ExposureTest, exposure_null_test, exposure_two_sample_test, reference_drift
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
from pyunlearn.metrics.verdict import Bounds, Verdict, exposure_interval, verdict

__all__ = [
    "NULL_MEAN",
    "SIGNIFICANT",
    "Bounds",
    "Exposure",
    "ExposureTest",
    "GreedyExtraction",
    "Interval",
    "PairedDifference",
    "SkewNormalFit",
    "VerbatimMatch",
    "Verdict",
    "bootstrap_interval",
    "calibrated_scores",
    "counterfactual_memorization",
    "discoverable_extraction",
    "exact_memorization",
    "exposure",
    "exposure_interval",
    "exposure_null_test",
    "exposure_two_sample_test",
    "extraction_likelihood",
    "extraction_probability",
    "extraction_strength",
    "extraction_strength_by_bisection",
    "extraction_strength_by_scan",
    "generalized_exposure",
    "log_queries_to_extract",
    "memorization_accuracy",
    "paired_difference",
    "reference_drift",
    "rouge_l",
    "simplicity",
    "verbatim_match",
    "verdict",
]
