"""The metrics: pure functions, numbers in, numbers out."""

from pyunlearn.metrics._skew_normal import SkewNormalFit
from pyunlearn.metrics.attacks import lira, logit_score, loss_score, min_k, min_k_plus_plus, reference_score, zlib_score
from pyunlearn.metrics.audit_order import Audited, audit_within
from pyunlearn.metrics.canaries import Canaries, InsertedCanaries, insert_canaries, make_canaries
from pyunlearn.metrics.confidence import (
    Interval,
    PairedDifference,
    aggregate_interval,
    bootstrap_interval,
    paired_difference,
)
from pyunlearn.metrics.distribution import knn_radius, out_of_distribution
from pyunlearn.metrics.exposure import (
    NULL_MEAN,
    SIGNIFICANT,
    Exposure,
    calibrated_scores,
    exposure,
    generalized_exposure,
)
from pyunlearn.metrics.exposure_tests import ExposureTest, exposure_null_test, exposure_two_sample_test, reference_drift
from pyunlearn.metrics.extraction import VerbatimMatch, extraction_probability, rouge_l, verbatim_match
from pyunlearn.metrics.memorization import counterfactual_memorization, exact_memorization, extraction_strength
from pyunlearn.metrics.privacy import TruePositiveRate, auc, privleak, privleak_interval, tpr_at_fpr
from pyunlearn.metrics.quality import (
    UTILITY_PARTS,
    AnswerPrior,
    ForgetQuality,
    TruthRatio,
    answer_prior,
    forget_quality,
    model_utility,
    model_utility_interval,
    option_probability,
    truth_ratio,
)
from pyunlearn.metrics.stein import ksd_difficulty
from pyunlearn.metrics.steps_to_forget import StepsToForget, median_steps, steps_to_forget
from pyunlearn.metrics.utility import bleu, collapsed, distinct_n, perplexity, repetition
from pyunlearn.metrics.verdict import Bounds, Verdict, exposure_interval, verdict

__all__ = [
    "NULL_MEAN",
    "SIGNIFICANT",
    "UTILITY_PARTS",
    "AnswerPrior",
    "Audited",
    "Bounds",
    "Canaries",
    "Exposure",
    "ExposureTest",
    "ForgetQuality",
    "InsertedCanaries",
    "Interval",
    "PairedDifference",
    "SkewNormalFit",
    "StepsToForget",
    "TruePositiveRate",
    "TruthRatio",
    "VerbatimMatch",
    "Verdict",
    "aggregate_interval",
    "answer_prior",
    "auc",
    "audit_within",
    "bleu",
    "bootstrap_interval",
    "calibrated_scores",
    "collapsed",
    "counterfactual_memorization",
    "distinct_n",
    "exact_memorization",
    "exposure",
    "exposure_interval",
    "exposure_null_test",
    "exposure_two_sample_test",
    "extraction_probability",
    "extraction_strength",
    "forget_quality",
    "generalized_exposure",
    "insert_canaries",
    "knn_radius",
    "ksd_difficulty",
    "lira",
    "logit_score",
    "loss_score",
    "make_canaries",
    "median_steps",
    "min_k",
    "min_k_plus_plus",
    "model_utility",
    "model_utility_interval",
    "option_probability",
    "out_of_distribution",
    "paired_difference",
    "perplexity",
    "privleak",
    "privleak_interval",
    "reference_drift",
    "reference_score",
    "repetition",
    "rouge_l",
    "steps_to_forget",
    "tpr_at_fpr",
    "truth_ratio",
    "verbatim_match",
    "verdict",
    "zlib_score",
]
