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
from pyunlearn.metrics.exposure_tests import (
    ExposureTest,
    exposure_null_test,
    exposure_two_sample_test,
    reference_drift,
)
from pyunlearn.metrics.verdict import Bounds, Verdict, exposure_interval, verdict

__all__ = [
    "NULL_MEAN",
    "SIGNIFICANT",
    "Bounds",
    "Exposure",
    "ExposureTest",
    "Interval",
    "PairedDifference",
    "SkewNormalFit",
    "Verdict",
    "bootstrap_interval",
    "calibrated_scores",
    "exposure",
    "exposure_interval",
    "exposure_null_test",
    "exposure_two_sample_test",
    "generalized_exposure",
    "paired_difference",
    "reference_drift",
    "verdict",
]
