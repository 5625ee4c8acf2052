"""Top tests that share one level: the statistic is its definition, and any of them rejects 5 % of unseen sets."""

import math

import numpy as np
import pytest
from coverings import in_full

from pyunlearn.metrics import exposure_top_test
from pyunlearn.metrics.exposure_tests import WEIGHTS, tail
from pyunlearn.metrics.joint_tests import Comparison, _Statistic, joint_top_tests


@pytest.mark.parametrize("ties", [False, True])
def test_the_statistic_is_its_definition(ties):
    """The smallest P(K_j >= k_j) with its factor; of alike ones, the farther text has the smaller statistic."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        n, m = rng.integers(1, 8), rng.integers(1, 30)
        compared, size = rng.integers(1, n + 1), rng.standard_normal(n + m)
        scores = rng.integers(0, 12, n + m).astype(float) if ties else rng.standard_normal(n + m)
        chosen = rng.permutation(n + m)[:n]
        texts, non_members = scores[chosen[:compared]], np.sort(np.delete(scores, chosen))
        chances = [f * tail(j, compared, m, True) for j, f in WEIGHTS.items() if j <= m]
        counts = [(texts < non_members[j - 1]).sum() for j in WEIGHTS if j <= m]
        smallest = min(1.0, *(chance[k] for chance, k in zip(chances, counts, strict=True)))
        farther = smallest - 1e-9 * size[chosen[:compared]].max()
        statistic = _Statistic(Comparison(scores, size, int(compared)), int(m))(chosen[None])
        assert statistic.tolist() == pytest.approx([farther], abs=1e-12)


@pytest.mark.parametrize(("n", "m"), [(1, 19), *in_full((4, 40), (8, 60))])
def test_any_of_three_rejects_one_unseen_set_in_twenty_at_most(n, m):
    """Two of them compare the same texts in two ways, which have much in common; one compares all texts from below."""
    rng, rejected, draws = np.random.default_rng(n), 0, 200
    for _ in range(draws):
        scores = rng.standard_normal(n + m)
        shares = np.round(5 * (scores + rng.standard_normal(n + m))) / 5
        compared = (n + 1) // 2
        comparisons = [
            Comparison(scores, -scores, compared),
            Comparison(shares, -scores, compared),
            Comparison(-scores, scores, n),
        ]
        rejected += joint_top_tests(comparisons, n).min() <= 0.05
    assert 0 < rejected / draws <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws)


def test_alone_it_is_the_top_test():
    """Up to the draws of both, and the scores that tell sets with alike numbers apart."""
    rng, m = np.random.default_rng(0), 99
    for shift in (0.0, 0.5, 1.0):
        scores = np.concatenate([rng.standard_normal(20) - shift, rng.standard_normal(m)])
        rank = 1 + (scores[20:] <= scores[:20, None]).sum(axis=1)
        expected = exposure_top_test(np.log2((m + 1) / rank), m).pvalue
        assert joint_top_tests([Comparison(scores, -scores, 20)], 20)[0] == pytest.approx(expected, abs=0.03)
