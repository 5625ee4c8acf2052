"""Probes: run a model over tokenized texts and return numbers for the metrics; the model is not changed."""

from pyunlearn.probes.decoding import greedy_continuations
from pyunlearn.probes.extraction import greedy_extractor, greedy_rests
from pyunlearn.probes.gradients import GROUPS, gradient_inner_products, gradient_norms, layer_groups, mean_gradient
from pyunlearn.probes.perturbation import noisy_log_likelihoods, perturbed
from pyunlearn.probes.representations import Representations, representations
from pyunlearn.probes.subset_models import SubsetScores, score_models, subset_masks, subset_models
from pyunlearn.probes.teacher_forced import TeacherForced, teacher_forced, without_prompt

__all__ = [
    "GROUPS",
    "Representations",
    "SubsetScores",
    "TeacherForced",
    "gradient_inner_products",
    "gradient_norms",
    "greedy_continuations",
    "greedy_extractor",
    "greedy_rests",
    "layer_groups",
    "mean_gradient",
    "noisy_log_likelihoods",
    "perturbed",
    "representations",
    "score_models",
    "subset_masks",
    "subset_models",
    "teacher_forced",
    "without_prompt",
]
