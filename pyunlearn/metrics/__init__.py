"""The metrics: pure functions, numbers in, numbers out."""

from pyunlearn.metrics.exposure import NULL_MEAN, SIGNIFICANT, Exposure, generalized_exposure

__all__ = ["NULL_MEAN", "SIGNIFICANT", "Exposure", "generalized_exposure"]
