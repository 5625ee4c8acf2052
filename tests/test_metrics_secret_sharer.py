"""The exposures of The Secret Sharer (Carlini et al. 2019, arXiv 1802.08232): by rank, sampling and a fitted law."""

import math

import numpy as np
import pytest
from scipy import stats

from pyunlearn.metrics import exposure, generalized_exposure


def test_exposure_by_rank_enumerates_the_space():
    """In a space of eight the most likely secret has log2 8 bits and the least likely 0."""
    space = np.array([3.0, 1.0, 4.0, 1.5, 9.0, 2.6, 5.0, 3.5])
    result = [exposure(space[i], np.delete(space, i)).lower[0] for i in range(8)]
    ranks = stats.rankdata(space)
    np.testing.assert_allclose(result, 3 - np.log2(ranks))
    assert max(result) == 3


def test_exposure_is_never_negative_and_stands_in_the_order_of_the_scores():
    """Exposure is at least 0 and in the order of the scores; interpolation in public code is negative for the least
    likely secret, and sorts its results."""
    non_members, x = np.arange(100.0), np.array([200.0, -1.0, 50.5, 3.5])
    for method in ("rank", "sampling", "skewnorm"):
        result = exposure(x, non_members, method).lower
        assert (result >= 0).all()
        assert np.argsort(result).tolist() == [0, 2, 3, 1]
    assert exposure(200.0, non_members).lower[0] == 0


def test_exposure_by_sampling_is_the_share_of_the_samples():
    """The exposure is -log2 of the share, at most log2 m."""
    non_members = np.arange(64.0)
    result = exposure([-1.0, 0.0, 7.0, 31.5, 99.0], non_members, "sampling")
    np.testing.assert_allclose(result.lower, [6, 6, 3, 1, 0])
    np.testing.assert_allclose(result.upper, [0, 0, 6 - math.log2(57), 1, 6])


def test_exposure_by_skewnorm_is_that_of_the_fitted_law_at_every_score():
    """The exposure is -log2 of scipy's cumulative law with the parameters in `fit`, inside the range of the non-members
    too."""
    non_members = np.random.default_rng(0).gamma(20, size=500)
    x = np.array([5.0, 12.0, 20.0, 40.0])
    result = exposure(x, non_members, "skewnorm")
    law = stats.skewnorm(result.fit.shape[0], result.fit.location[0], result.fit.scale[0])
    np.testing.assert_allclose(result.lower, -np.log2(law.cdf(x)), rtol=1e-6)
    np.testing.assert_allclose(result.upper, -np.log2(law.sf(x)), rtol=1e-6)
    assert result.extrapolated.tolist() == [True, False, False, True]


def test_an_unknown_method_and_non_members_without_spread_are_refused():
    """The error names the choices, or the method that works."""
    with pytest.raises(ValueError, match="method must be 'rank', 'sampling' or 'skewnorm', got 'rnk'"):
        exposure(1.0, [2.0], "rnk")
    with pytest.raises(ValueError, match='got equal ones: use "rank"'):
        exposure(1.0, [2.0, 2.0], "skewnorm")
    result = generalized_exposure(1.0, [2.0, 2.0, 2.0], extrapolate=True)  # nothing to fit: the count stands
    assert (result.lower[0], result.extrapolated[0]) == (2.0, False)
