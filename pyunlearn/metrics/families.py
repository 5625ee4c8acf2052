"""Families of texts: those in which the memorized ones are selected, where texts have other forms too."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pyunlearn.metrics._check import Floats
from pyunlearn.metrics.exposure_tests import exposure_top_test

Numbers = NDArray[np.int64]

SET = 5
"""Texts from which a set is more than its texts."""
KNOWN = 0.01
"""p-value of the forget set under the original model, up to which it is known by a kind of probes."""


def stands_out(exposure: Floats, m: int, seed: int) -> float:
    """Return the chance that of as many unseen texts as many stand out among m non-members."""
    test = exposure_top_test(exposure, m, seed=seed)
    if exposure.size == 1:
        return float(2.0 ** -exposure[0])
    return min(1.0, 2 * min(test.pvalue, test.exact_pvalue))  # the simulated one is not below 1 in 2000


def families_of(exposure: Floats, forms: Numbers, own: Numbers) -> Numbers:
    """Return the families of texts in which those that are memorized are selected, each at the false discovery rate.

    The texts as they are; the forms by which the set as a whole stands out; the others, which would hide them among
    many: 0, 1 and 2, (B,). Of few texts all forms are one family, since they are no set.

    Args:
        exposure: (B,) under the original model, bits.
        forms: (B,) number of each text's form, 0 for texts as they are.
        own: (m,) the same of the non-members.
    """
    families = np.minimum(forms, 1)
    for form in np.unique(forms[forms > 0]):
        bits = exposure[forms == form]
        if bits.size >= SET and stands_out(bits, int((own == form).sum()), seed=0) > KNOWN:
            families[forms == form] = 2
    return families
