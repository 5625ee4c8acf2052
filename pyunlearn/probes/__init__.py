"""The probes: each runs a model and returns numbers, for the metrics."""

from pyunlearn.probes.gradients import GROUPS, gradient_inner_products, gradient_norms, layer_groups, mean_gradient
from pyunlearn.probes.perturbation import noisy_log_likelihoods, perturbed
from pyunlearn.probes.representations import Representations, representations
from pyunlearn.probes.subset_models import SubsetScores, score_models, subset_masks, subset_models

__all__ = [
    "GROUPS",
    "Representations",
    "SubsetScores",
    "gradient_inner_products",
    "gradient_norms",
    "layer_groups",
    "mean_gradient",
    "noisy_log_likelihoods",
    "perturbed",
    "representations",
    "score_models",
    "subset_masks",
    "subset_models",
]
