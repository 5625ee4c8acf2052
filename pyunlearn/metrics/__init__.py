"""The metrics: pure functions, numbers in, numbers out."""

from pyunlearn.metrics._skew_normal import SkewNormalFit
from pyunlearn.metrics.attacks import (
    gradient_norm_score,
    lira,
    logit_score,
    loss_score,
    min_k,
    min_k_plus_plus,
    reference_score,
    zlib_score,
)
from pyunlearn.metrics.canaries import (
    ALPHABETS,
    Canaries,
    InsertedCanaries,
    canary_exposure,
    insert_canaries,
    make_canaries,
)
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
from pyunlearn.metrics.privacy import TruePositiveRate, auc, example_epsilon, privleak, tpr_at_fpr
from pyunlearn.metrics.quality import (
    UTILITY_PARTS,
    AnswerPrior,
    ForgetQuality,
    TruthRatio,
    answer_prior,
    forget_quality,
    model_utility,
    option_probability,
    truth_ratio,
)
from pyunlearn.metrics.verdict import Bounds, Verdict, exposure_interval, verdict

__all__ = [
    "ALPHABETS",
    "NULL_MEAN",
    "SIGNIFICANT",
    "UTILITY_PARTS",
    "AnswerPrior",
    "Bounds",
    "Canaries",
    "Exposure",
    "ExposureTest",
    "ForgetQuality",
    "InsertedCanaries",
    "Interval",
    "PairedDifference",
    "SkewNormalFit",
    "TruePositiveRate",
    "TruthRatio",
    "Verdict",
    "answer_prior",
    "auc",
    "bootstrap_interval",
    "calibrated_scores",
    "canary_exposure",
    "example_epsilon",
    "exposure",
    "exposure_interval",
    "exposure_null_test",
    "exposure_two_sample_test",
    "forget_quality",
    "generalized_exposure",
    "gradient_norm_score",
    "insert_canaries",
    "lira",
    "logit_score",
    "loss_score",
    "make_canaries",
    "min_k",
    "min_k_plus_plus",
    "model_utility",
    "option_probability",
    "paired_difference",
    "privleak",
    "reference_drift",
    "reference_score",
    "tpr_at_fpr",
    "truth_ratio",
    "verdict",
    "zlib_score",
]
