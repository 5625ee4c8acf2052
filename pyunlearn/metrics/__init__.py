"""Metrics: pure functions of arrays, numbers in, numbers out.

One law for names and directions. A suffix or word stands for one direction in the whole package:

- `*_score`, `*_scores` and every argument of that name: LOW where the model finds a text likely, so low = more likely
  a member of the training set. Attacks (`loss_score`, `zlib_score`, `reference_score`, `min_k_score`,
  `min_k_plus_plus_score`, `logit_score`, `lira_score`), exposures, `auc` and `tpr_at_fpr` all read scores this way.
  For scores of other code, where high means member, `auc`, `tpr_at_fpr`, `privleak_interval` and `lira_score` take
  `members="high"`.
- `*exposure*`, `*memorization`, `*extraction*`, `verbatim_match`, `rouge_l`, `auc`, `tpr_at_fpr`: HIGH = memorized
  (`Exposure.upper`: HIGH = driven below unseen text).
- `*_difficulty`, `*steps*`: HIGH = hard to unlearn.
- `*_quality`, `*_utility`: HIGH = good. `perplexity`, `repetition`: HIGH = bad.
- `*_difference`, `*_drift`: after minus before; 0 = nothing changed.
- `*_test`: a statistic and a p-value; LOW statistic, HIGH p-value = no difference seen.
- `*_interval`: the ends of a confidence interval, with the estimate where it is one number.
- `log_likelihood`: nats, 0 or less, HIGH = likely. Exposures are in bits.
"""

from pyunlearn.metrics._skew_normal import SkewNormalFit
from pyunlearn.metrics.attacks import (
    lira_score,
    logit_score,
    loss_score,
    min_k_plus_plus_score,
    min_k_score,
    reference_score,
    zlib_score,
)
from pyunlearn.metrics.audit_order import Audited, audit_within
from pyunlearn.metrics.canaries import Canaries, InsertedCanaries, insert_canaries, make_canaries
from pyunlearn.metrics.confidence import (
    Interval,
    PairedDifference,
    aggregate_interval,
    bootstrap_interval,
    mean_interval,
    paired_difference,
)
from pyunlearn.metrics.discoveries import Discoveries, discoveries, non_members_needed
from pyunlearn.metrics.distribution import knn_radius, out_of_distribution
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
    TopTest,
    exposure_null_test,
    exposure_top_test,
    exposure_two_sample_test,
    non_member_drift,
)
from pyunlearn.metrics.extraction import VerbatimMatch, extraction_probability, rouge_l, verbatim_match
from pyunlearn.metrics.left import Left, Scores, left
from pyunlearn.metrics.mean_exposure import mean_exposure_interval
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
from pyunlearn.metrics.recovery import Recovery, recovery
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
    "Discoveries",
    "Exposure",
    "ExposureTest",
    "ForgetQuality",
    "InsertedCanaries",
    "Interval",
    "Left",
    "PairedDifference",
    "Recovery",
    "Scores",
    "SkewNormalFit",
    "StepsToForget",
    "TopTest",
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
    "discoveries",
    "distinct_n",
    "exact_memorization",
    "exposure",
    "exposure_interval",
    "exposure_null_test",
    "exposure_top_test",
    "exposure_two_sample_test",
    "extraction_probability",
    "extraction_strength",
    "forget_quality",
    "generalized_exposure",
    "insert_canaries",
    "knn_radius",
    "ksd_difficulty",
    "left",
    "lira_score",
    "logit_score",
    "loss_score",
    "make_canaries",
    "mean_exposure_interval",
    "mean_interval",
    "median_steps",
    "min_k_plus_plus_score",
    "min_k_score",
    "model_utility",
    "model_utility_interval",
    "non_member_drift",
    "non_members_needed",
    "option_probability",
    "out_of_distribution",
    "paired_difference",
    "perplexity",
    "privleak",
    "privleak_interval",
    "recovery",
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
