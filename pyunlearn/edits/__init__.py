"""Weight edits: unlearning in one step without training, one paper per file, and each edit can be undone."""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported at first use: the command line prints its help without torch
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

_HOMES = {
    "base": ("EditResult",),
    "dampening": ("selective_synaptic_dampening",),
    "ekfac": ("ekfac_step",),
    "fisher": ("fisher_step",),
    "influence": ("first_order_influence", "second_order_influence"),
    "lunar": ("lunar",),
    "mixing": ("Mixed", "calibrate_by_mixing"),
    "prune": ("Pruned", "prune"),
    "registry": ("EDITS", "Edit"),
    "saliency": ("saliency_mask",),
    "smoothing": ("zero_shot_smoothing",),
    "task_vector": ("task_vector",),
    "woodfisher": ("woodfisher_step",),
}


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


class _Package(types.ModuleType):
    """Module type of this package: importing the file prune.py does not replace the function prune."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
