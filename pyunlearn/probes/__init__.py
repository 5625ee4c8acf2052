"""Probes: run a model over tokenized texts and return numbers for the metrics; the model is not changed."""

from pyunlearn.probes.decoding import greedy_continuations
from pyunlearn.probes.gradients import gradient_inner_products, gradient_norms, mean_gradient
from pyunlearn.probes.representations import Representations, representations
from pyunlearn.probes.subset_masks import subset_masks
from pyunlearn.probes.teacher_forced import TeacherForced, teacher_forced, without_prompt

__all__ = [
    "Representations",
    "TeacherForced",
    "gradient_inner_products",
    "gradient_norms",
    "greedy_continuations",
    "mean_gradient",
    "representations",
    "subset_masks",
    "teacher_forced",
    "without_prompt",
]
