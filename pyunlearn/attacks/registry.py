"""Every attack: its function and the kind of its scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from pyunlearn.attacks.adapters import adapter
from pyunlearn.attacks.instructions import instruction
from pyunlearn.attacks.layers import layers
from pyunlearn.attacks.merging import merging
from pyunlearn.attacks.paraphrases import paraphrase
from pyunlearn.attacks.prefixes import prefix
from pyunlearn.attacks.quantization import quantization
from pyunlearn.attacks.recitation import recitation, sampling
from pyunlearn.attacks.relearning import relearning, relearning_retain, relearning_unrelated
from pyunlearn.attacks.renderings import rendering
from pyunlearn.attacks.target import Target, Trial


class Attack(NamedTuple):
    """One attack."""

    run: Callable[[Target], Iterator[Trial]]
    """Yields the scores of each of its forms; raises Unsuited where it cannot be tried."""
    whole: bool = False
    """True where the whole text is scored as it is: what is expected of unseen text holds for such scores alone."""
    writes: bool = False
    """True where the model writes, and the scores are of what it wrote; else they are likelihoods."""


ATTACKS: dict[str, Attack] = {
    "prefix": Attack(prefix),
    "quantization": Attack(quantization, whole=True),
    "relearning": Attack(relearning, whole=True),
    "relearning-retain": Attack(relearning_retain, whole=True),
    "relearning-unrelated": Attack(relearning_unrelated, whole=True),
    "instruction": Attack(instruction),
    "rendering": Attack(rendering),
    "paraphrase": Attack(paraphrase),
    "recitation": Attack(recitation, writes=True),
    "sampling": Attack(sampling, writes=True),
    "merging": Attack(merging, whole=True),
    "adapter": Attack(adapter, whole=True),
    "layers": Attack(layers),
}
"""Name -> Attack, in the order in which they are tried. To add one: docs/contributing/add-an-attack.md."""
