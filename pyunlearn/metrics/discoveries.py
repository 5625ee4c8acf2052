"""Selection of the texts of a set that stand out, at a false discovery rate over the whole set."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyunlearn.metrics._check import at_least_one, between, numbers

_ROUNDING = 1e-9  # 19 non-members reach log2(20) exactly


class Discoveries(NamedTuple):
    """Outcome of discoveries."""

    significant: NDArray[np.bool_]
    """(n,) True for each text that stands out."""
    threshold: float
    """Bits from which a text of this set stands out: log2(n / (rate * k)) where k do, log2(n / rate) where none."""


def discoveries(exposures: ArrayLike, *, rate: float = 0.05) -> Discoveries:
    """Select the texts that stand out, by the Benjamini-Hochberg procedure on the p-values 2 ** -exposure.

        k = the largest number of texts with an exposure of log2(n / (rate * k)) bits or more

    and these k stand out. Of one text this asks for log2(1 / rate) bits, 4.32 at 5 %. Exposures are conformal p-values;
    those of texts that share their non-members are positively dependent, so that the expected share of unseen texts
    among those selected is at most `rate`, for any n and any law of the scores. Asking each of 400 unseen texts for
    4.32 bits instead would call about 20 memorized.

    Args:
        exposures: (n,) bits, `lower` or `upper` of generalized_exposure.
        rate: the false discovery rate, between 0 and 1.

    Returns:
        Discoveries(significant, threshold), in the order of the exposures. Without texts nothing stands out.

    Raises:
        ArgumentError: NaN or Inf, more than one dimension; a rate outside (0, 1).

    Example:
        >>> discoveries([9.0, 8.0, 5.0, 1.0]).significant.tolist()
        [True, True, True, False]
        >>> discoveries([4.4, 1.0, 1.0, 1.0]).significant.tolist()
        [False, False, False, False]

    See Also:
        non_members_needed: how many make a selection possible. exposure_top_test: the set as a whole.

    Source: Benjamini and Hochberg 1995, J. R. Stat. Soc. B 57, 289-300; Bates et al. 2023, Annals of Statistics 51, for
        conformal p-values.
    """
    between("rate", rate, 0, 1)
    bits = numbers("exposures", exposures)
    n = bits.size
    if n == 0:
        return Discoveries(np.zeros(0, dtype=bool), math.log2(1 / rate))
    thresholds = np.log2(n / (rate * np.arange(1, n + 1)))  # of the 1st, 2nd, ... most exposed text
    reached = np.flatnonzero(np.sort(bits)[::-1] >= thresholds - _ROUNDING)
    threshold = float(thresholds[reached[-1] if reached.size else 0])
    return Discoveries(bits >= threshold - _ROUNDING, threshold)


def non_members_needed(n: int, k: int = 1, *, rate: float = 0.05) -> int:
    """Compute the least number of non-members with which discoveries can select k texts of n.

        m + 1 >= n / (rate * k)

    With fewer, even k texts likelier than every non-member cannot be told from chance: to name 20 memorized texts among
    400 takes 399 non-members at 5 %, to name one 7,999. Where all texts are memorized, 19 are enough.

    Args:
        n: texts in the set, 1 or more.
        k: memorized texts among them, 1 to n.
        rate: the false discovery rate, between 0 and 1.

    Returns:
        m.

    Raises:
        ArgumentError: n or k below 1; a rate outside (0, 1).

    Example:
        >>> non_members_needed(400, 20), non_members_needed(1)
        (399, 19)

    See Also:
        discoveries: the selection.
    """
    at_least_one(n=n, k=k)
    between("rate", rate, 0, 1)
    return max(0, math.ceil(n / (rate * k) - 1 - _ROUNDING))
