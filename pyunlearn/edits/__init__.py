"""Weight edits: unlearning in one step without training, one paper per file, and each edit can be undone."""

from pyunlearn.edits.base import EditResult
from pyunlearn.edits.dampening import selective_synaptic_dampening
from pyunlearn.edits.ekfac import ekfac_step
from pyunlearn.edits.fisher import fisher_step
from pyunlearn.edits.influence import first_order_influence, second_order_influence
from pyunlearn.edits.lunar import lunar
from pyunlearn.edits.mixing import Mixed, calibrate_by_mixing
from pyunlearn.edits.prune import Pruned, prune
from pyunlearn.edits.registry import EDITS, Edit
from pyunlearn.edits.saliency import saliency_mask
from pyunlearn.edits.smoothing import zero_shot_smoothing
from pyunlearn.edits.task_vector import task_vector
from pyunlearn.edits.woodfisher import woodfisher_step

__all__ = [
    "EDITS",
    "Edit",
    "EditResult",
    "Mixed",
    "Pruned",
    "calibrate_by_mixing",
    "ekfac_step",
    "first_order_influence",
    "fisher_step",
    "lunar",
    "prune",
    "saliency_mask",
    "second_order_influence",
    "selective_synaptic_dampening",
    "task_vector",
    "woodfisher_step",
    "zero_shot_smoothing",
]
