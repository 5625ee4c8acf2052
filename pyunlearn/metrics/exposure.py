"""Exposure: how far a text stands out among texts of its kind that were never trained on, in bits."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

NULL_MEAN = 1 / math.log(2)
"""Mean exposure, in bits, of a text exchangeable with its references (never trained on, or perfectly unlearned): 1 / ln 2 = 1.443."""

SIGNIFICANT = math.log2(20)
"""Exposure, in bits, that such a text reaches with probability 1/20: 4.32."""


class Exposure(NamedTuple):
    """Both sides, in bits, each an array with one number for each score."""

    lower: NDArray[np.float64]
    """-log2 of the share of texts at least as likely: high = memorized."""
    upper: NDArray[np.float64]
    """-log2 of the share of texts at least as unlikely: high = driven below what unseen text gets."""


def generalized_exposure(scores: ArrayLike, reference_scores: ArrayLike) -> Exposure:
    """The generalized exposure of scores (n,) among reference_scores (m,), both sides, in bits.

        lower = log2(m + 1) - log2(1 + #{j : reference_j <= score}),   upper likewise with >=

    Scores are low where a text is likely (mean negative log-likelihood, say). This is -log2 of a permutation p-value: if a text is
    exchangeable with its references, P(lower >= k) <= 2 ** -k and the mean is about 1 / ln 2 = 1.443 bits; the largest value is
    log2(m + 1). *Anchored* exposure is the same function of the current scores and the references' scores under the original model.

    Our formalisation after Carlini et al. 2019 (arXiv 1802.08232, section 4; the same number when the references enumerate the space), motivated
    by Baluta et al. 2024 (arXiv 2411.04388). Ties count against the text on either side.

    Raises:
        ValueError: no references, or a score that is not finite.
    """
    s = np.asarray(scores, dtype=np.float64).reshape(-1)
    r = np.sort(np.asarray(reference_scores, dtype=np.float64).reshape(-1))
    if r.size == 0:
        raise ValueError("generalized_exposure needs at least one reference score, got none")
    if not (np.isfinite(s).all() and np.isfinite(r).all()):
        raise ValueError("generalized_exposure needs finite scores, got NaN or Inf")
    as_likely = np.searchsorted(r, s, side="right")
    as_unlikely = r.size - np.searchsorted(r, s, side="left")
    top = math.log2(r.size + 1)
    return Exposure(top - np.log2(1 + as_likely), top - np.log2(1 + as_unlikely))
